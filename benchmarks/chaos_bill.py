"""Does the ledger agree with the provider's bill, call by call?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from chaos_checks import Check

from attune_worker.invoices import lines_of
from attune_worker.ledger import latest
from attune_worker.ledger_record import LedgerRecord
from attune_worker.reconcile import Reconciliation, reconcile

PROMISE = "the ledger is the provider's bill"
EXAMPLES = 3


def bill_agrees(written: Iterable[LedgerRecord], bill: Sequence[Mapping[str, Any]]) -> Check:
    """Every call is in both with the same cost; what is uncertain was billed at no more than its estimate."""
    found = reconcile(written, lines_of({"calls": list(bill)}))
    uncertain_usd = sum((one.billed_usd for one in found.uncertain if one.billed_usd is not None), Decimal(0))
    adds_up = found.recorded_usd + uncertain_usd == found.billed_usd
    return Check(PROMISE, found.agrees and adds_up, _line(found, uncertain_usd))


def uncertain_figures(written: Iterable[LedgerRecord]) -> dict[str, Any]:
    """Return how many calls nobody knows the cost of, and the most that they can have cost."""
    found: dict[str, Any] = {}
    calls = [one for one in latest(written) if one.uncertain]
    for name, orphaned in (("orphaned", True), ("unknown", False)):
        chosen = [one for one in calls if (one.outcome == "orphaned") is orphaned]
        usd = sum((one.estimate_usd or Decimal(0) for one in chosen), Decimal(0))
        found[f"calls_{name}"] = f"{len(chosen):,}, at most ${usd:f}"
    return found


def _line(found: Reconciliation, uncertain_usd: Decimal) -> str:
    billed = sum(one.billed_usd is not None for one in found.uncertain)
    beyond = sum(one.within_estimate is False for one in found.uncertain)
    parts = [
        f"{found.billed_calls:,} calls billed ${found.billed_usd:f}",
        f"{found.recorded_calls:,} recorded ${found.recorded_usd:f}",
        f"{len(found.uncertain):,} uncertain, {billed:,} of them billed ${uncertain_usd:f}",
    ]
    if beyond:
        parts.append(f"{beyond:,} beyond their estimate")
    kinds = Counter(one.kind for one in found.differences)
    parts += [f"{number:,} × {kind}" for kind, number in kinds.items()]  # noqa: RUF001  # it is a product
    parts += [
        f"{one.call_id}: {one.billed_usd} billed, {one.recorded_usd} recorded" for one in found.differences[:EXAMPLES]
    ]
    return "; ".join(parts)
