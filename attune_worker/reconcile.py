"""Does the provider's account agree with ours? Its lines beside the ledger's records, call by call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Literal, TypeVar

from attune_worker.invoices import InvoiceLine
from attune_worker.ledger import LedgerRecord, latest

Kind = Literal["not in the ledger", "not in the invoice", "the cost differs", "the tokens differ"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that one side has and the other has not, or has otherwise.

    It is about one call, or, where the invoice names no calls, about one model's calls of one day. Of the two costs
    one is None where that side has no such call; of tokens that differ, both sides' stand in ``detail``.
    """

    kind: Kind
    model_id: str
    call_id: str | None = None
    request_id: str | None = None
    day: date | None = None
    billed_usd: Decimal | None = None
    recorded_usd: Decimal | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Uncertain:
    """A call of which only the provider knows what it cost: its answer never came, or its worker died.

    ``billed_usd`` is None where the invoice does not have it, or has no price for it. ``within_estimate`` says
    whether it was billed at no more than budgets have counted; None: there is nothing to compare.
    """

    record: LedgerRecord
    billed_usd: Decimal | None
    within_estimate: bool | None


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Both accounts side by side. ``unpriced_lines`` of the invoice have no cost and are not in ``billed_usd``."""

    billed_calls: int
    billed_usd: Decimal
    unpriced_lines: int
    recorded_calls: int
    recorded_usd: Decimal
    matched_calls: int
    differences: tuple[Difference, ...]
    uncertain: tuple[Uncertain, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing differs, and no uncertain call was billed at more than budgets have counted."""
        return not self.differences and all(one.within_estimate is not False for one in self.uncertain)


def reconcile(ledger_records: Iterable[LedgerRecord], invoice_lines: Iterable[InvoiceLine]) -> Reconciliation:
    """Hold an invoice against the ledger's records of the same time.

    A line belongs to the call that its ``client_request_id`` names (our id of the call, which providers are sent), or
    else to the one with its ``request_id``. Lines without an id are added up by day and model, and held against the
    calls of that day (UTC) and model that no other line belongs to.
    """
    records, lines = latest(ledger_records), list(invoice_lines)
    by_call, strange, anonymous = _assigned(records, lines)
    left = [record for record in records if record.call_id not in by_call]
    known = [record for record in records if record.call_id in by_call]
    by_sum = {_place(line) for line in anonymous}
    summed = [record for record in left if (record.time.date(), record.model_id) in by_sum]
    alone = [record for record in left if (record.time.date(), record.model_id) not in by_sum]
    compared = [_compared(record, by_call[record.call_id]) for record in known]
    differences = [
        *(_unknown(line) for line in strange),
        *(found for found in compared if isinstance(found, Difference)),
        *(_missing(record) for record in alone if record.cost_usd),
        *_by_sums(summed, anonymous),
    ]
    uncertain = [
        *(found for found in compared if isinstance(found, Uncertain)),
        *(Uncertain(record, None, None) for record in left if record.uncertain),
    ]
    return Reconciliation(
        billed_calls=sum(line.calls for line in lines),
        billed_usd=sum((line.cost_usd for line in lines if line.cost_usd is not None), Decimal(0)),
        unpriced_lines=sum(line.cost_usd is None for line in lines),
        recorded_calls=len(records),
        recorded_usd=sum((record.cost_usd for record in records if record.cost_usd is not None), Decimal(0)),
        matched_calls=len(known),
        differences=tuple(differences),
        uncertain=tuple(uncertain),
    )


def _assigned(
    records: Sequence[LedgerRecord], lines: Sequence[InvoiceLine]
) -> tuple[dict[str, list[InvoiceLine]], list[InvoiceLine], list[InvoiceLine]]:
    """Return the lines of each call, those whose id no call has, and those without an id."""
    calls = {record.call_id for record in records}
    requests = {record.request_id: record.call_id for record in records if record.request_id}
    by_call: dict[str, list[InvoiceLine]] = defaultdict(list)
    strange, anonymous = [], []
    for line in lines:
        if line.client_request_id is None and line.request_id is None:
            anonymous.append(line)
        elif line.client_request_id in calls:
            by_call[line.client_request_id].append(line)
        elif line.request_id in requests:
            by_call[requests[line.request_id]].append(line)
        else:
            strange.append(line)
    return by_call, strange, anonymous


def _compared(record: LedgerRecord, lines: Sequence[InvoiceLine]) -> Difference | Uncertain | None:
    """Compare a call with its lines; there are several where the provider served it more than once."""
    billed_usd = _total(line.cost_usd for line in lines)
    if record.cost_usd is None:
        if billed_usd is None or record.estimate_usd is None:
            return Uncertain(record, billed_usd, None)
        return Uncertain(record, billed_usd, billed_usd <= record.estimate_usd)
    if billed_usd is not None and billed_usd != record.cost_usd:
        return _differs(record, lines, billed_usd, "the cost differs", "")
    if billed_usd is None and (detail := _tokens_differ([record], lines)):
        return _differs(record, lines, None, "the tokens differ", detail)
    return None


def _differs(
    record: LedgerRecord, lines: Sequence[InvoiceLine], billed_usd: Decimal | None, kind: Kind, detail: str
) -> Difference:
    return Difference(
        kind,
        record.model_id,
        record.call_id,
        record.request_id or next((line.request_id for line in lines if line.request_id), None),
        record.time.date(),
        billed_usd,
        record.cost_usd,
        detail or (f"billed {len(lines)} times" if len(lines) > 1 else ""),
    )


def _unknown(line: InvoiceLine) -> Difference:
    return Difference(
        "not in the ledger", line.model_id, line.client_request_id, line.request_id, line.day, line.cost_usd
    )


def _missing(record: LedgerRecord) -> Difference:
    return Difference(
        "not in the invoice",
        record.model_id,
        record.call_id,
        record.request_id,
        record.time.date(),
        recorded_usd=record.cost_usd,
    )


def _by_sums(records: Sequence[LedgerRecord], lines: Sequence[InvoiceLine]) -> Iterator[Difference]:
    """Compare what names no calls, by day and model; where calls are uncertain, up to their estimates may be billed."""
    ours: dict[tuple[date | None, str], list[LedgerRecord]] = defaultdict(list)
    theirs: dict[tuple[date | None, str], list[InvoiceLine]] = defaultdict(list)
    for record in records:
        ours[record.time.date(), record.model_id].append(record)
    for line in lines:
        theirs[_place(line)].append(line)
    for (day, model_id), billed in sorted(theirs.items(), key=lambda one: (str(one[0][0]), one[0][1])):
        recorded, billed_usd = ours[day, model_id], _total(line.cost_usd for line in billed)
        recorded_usd = sum((record.cost_usd for record in recorded if record.cost_usd is not None), Decimal(0))
        if not recorded:
            yield Difference("not in the ledger", model_id, day=day, billed_usd=billed_usd)
        elif billed_usd is None:
            detail = _tokens_differ(recorded, billed)
            if detail:
                yield Difference("the tokens differ", model_id, day=day, recorded_usd=recorded_usd, detail=detail)
        elif not _may_be(billed_usd, recorded_usd, recorded):
            yield Difference("the cost differs", model_id, day=day, billed_usd=billed_usd, recorded_usd=recorded_usd)


def _may_be(billed_usd: Decimal, recorded_usd: Decimal, records: Sequence[LedgerRecord]) -> bool:
    """Whether the bill of several calls is what is recorded, with what the uncertain ones may have cost besides."""
    estimates = [record.estimate_usd for record in records if record.uncertain]
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):  # of one without a price nobody can say how much is too much
        return recorded_usd <= billed_usd
    return recorded_usd <= billed_usd <= recorded_usd + sum(known, Decimal(0))


def _tokens_differ(records: Sequence[LedgerRecord], lines: Sequence[InvoiceLine]) -> str:
    """Say how the tokens differ, or return nothing where they do not, or where one side has not counted them."""
    ours = (_total(record.input_tokens for record in records), _total(record.output_tokens for record in records))
    theirs = (_total(line.input_tokens for line in lines), _total(line.output_tokens for line in lines))
    if ours == theirs or None in theirs:
        return ""
    return f"billed {theirs[0]} in and {theirs[1]} out, recorded {ours[0]} in and {ours[1]} out"


def _place(line: InvoiceLine) -> tuple[date | None, str]:
    return line.day, line.model_id


Amount = TypeVar("Amount", int, Decimal)


def _total(amounts: Iterable[Amount | None]) -> Amount | None:
    """Add up amounts; None where one of them is not known."""
    total: Amount | None = None
    for amount in amounts:
        if amount is None:
            return None
        total = amount if total is None else total + amount
    return total
