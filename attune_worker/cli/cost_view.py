"""What does a reader see of costs? Sums of what is known, and beside them, never in them, what is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from rich.console import Console

from attune_worker.cli.output import Column, Rows, counted, print_fitting, say, usd
from attune_worker.ledger import CostRow
from attune_worker.reconcile import Difference, Reconciliation, Uncertain

if TYPE_CHECKING:
    from attune_worker.models.savings import Savings


def print_report(on: Console, rows: Sequence[CostRow], total: CostRow, by: Sequence[str], title: str) -> None:
    """Print the sums, and what may come on top of them."""
    print_fitting(on, _table(rows, by, total, title))
    if total.unknown_calls:
        amount = usd(total.unknown_usd)
        say(on, f"broken off, or without a price: {counted(total.unknown_calls, 'call')}, at most ${amount} more")
    if total.orphaned_calls:
        amount = usd(total.orphaned_usd)
        say(on, f"orphaned, their workers lost: {counted(total.orphaned_calls, 'call')}, at most ${amount} more")
    if total.unpriced_calls:
        say(on, f"of these without a known price, and in neither amount: {counted(total.unpriced_calls, 'call')}")
    if total.compared.calls:
        compared = total.compared
        say(
            on,
            f"expected of {counted(compared.calls, 'call')}: ${usd(compared.expected_usd)}; they cost "
            f"${usd(compared.actual_usd)}, {_signed(percent_off(total))}; off by ${usd(compared.mean_off_usd)} a call",
        )


def print_savings(on: Console, saved: Savings) -> None:
    """Print what the same tokens would have cost at a premium model."""
    if saved.calls:
        share = "" if saved.saved_percent is None else f" ({saved.saved_percent:.1f}%)"
        say(
            on,
            f"all at {saved.provider}/{saved.model_id}, {counted(saved.calls, 'call')}: ${usd(saved.premium_usd)} "
            f"instead of ${usd(saved.cost_usd)}; saved ${usd(saved.saved_usd)}{share}",
        )
    if saved.left_out_calls:
        say(on, f"left out of that, without a known price: {counted(saved.left_out_calls, 'call')}")
    if saved.subscription_calls:
        without = f", {counted(saved.subscription_unpriced_calls, 'call')} without a known price"
        say(
            on,
            f"by subscription: {counted(saved.subscription_calls, 'call')}, by the token "
            f"${usd(saved.subscription_api_usd)}{without if saved.subscription_unpriced_calls else ''}",
        )


def percent_off(row: CostRow) -> float | None:
    """Return by how many percent calls cost more than was expected, negative for less; None: nothing to compare."""
    ratio = row.compared.ratio
    return None if ratio is None else round(100 * (ratio - 1), 1)


def _signed(percent: float | None) -> str:
    return "" if percent is None else f"{percent:+.1f}%"


def _table(rows: Sequence[CostRow], by: Sequence[str], total: CostRow, title: str) -> Rows:
    """Lay out the sums; columns about uncertain calls are there when there are such calls."""
    shown: list[tuple[Column, Callable[[CostRow], str]]] = [
        (Column("calls", right=True), lambda row: str(row.calls)),
        (Column("USD", right=True), lambda row: usd(row.cost_usd)),
    ]
    if total.unknown_calls:
        shown.append((Column("unknown", right=True), lambda row: _at_most(row.unknown_calls, row.unknown_usd)))
    if total.orphaned_calls:
        shown.append((Column("orphaned", right=True), lambda row: _at_most(row.orphaned_calls, row.orphaned_usd)))
    if total.compared.calls:
        shown.append((Column("expected", 1, right=True), lambda row: usd(row.compared.expected_usd)))
        shown.append((Column("actual", 2, right=True), lambda row: usd(row.compared.actual_usd)))
        shown.append((Column("off", 1, right=True), lambda row: _signed(percent_off(row))))
    shown.append((Column("tokens in", 3, right=True), lambda row: f"{row.input_tokens:,}"))
    shown.append((Column("tokens out", 3, right=True), lambda row: f"{row.output_tokens:,}"))
    names = [[row.keys[name] or "(none)" for name in by] for row in rows]
    return Rows(
        [*(Column(name) for name in by), *(column for column, _ in shown)],
        [(*names[place], *(cell(row) for _, cell in shown)) for place, row in enumerate(rows)],
        title,
        footer=(*("total" if place == 0 else "" for place in range(len(by))), *(cell(total) for _, cell in shown)),
    )


def _at_most(calls: int, amount: Decimal) -> str:
    return f"{calls}: ≤ {usd(amount)}" if calls else ""


DIFFERENCES = (
    Column("what"),
    Column("of"),
    Column("billed", right=True),
    Column("recorded", right=True),
    Column("model", 1),
    Column("day", 3),
    Column("provider's id", 4),
    Column("detail", 2),
)

UNCERTAIN = (
    Column("call"),
    Column("outcome"),
    Column("at most", right=True),
    Column("billed", right=True),
    Column("within"),
    Column("model", 1),
    Column("job", 2),
)


def print_reconciled(on: Console, found: Reconciliation) -> None:
    """Print both totals, every difference, and the calls of which only the provider knows the cost."""
    unpriced = f", {counted(found.unpriced_lines, 'line')} without a price" if found.unpriced_lines else ""
    recorded = f"{counted(found.recorded_calls, 'call')}, ${usd(found.recorded_usd)}"
    say(on, f"invoice: {counted(found.billed_calls, 'call')}, ${usd(found.billed_usd)}{unpriced}")
    say(on, f"ledger:  {recorded}; {found.matched_calls} of them matched")
    if found.differences:
        cells = [_difference(one) for one in found.differences]
        print_fitting(on, Rows(DIFFERENCES, cells, title=counted(len(cells), "difference")))
    if found.uncertain:
        cells = [_uncertain(one) for one in found.uncertain]
        print_fitting(
            on, Rows(UNCERTAIN, cells, title=f"{counted(len(cells), 'call')} of which only the provider knows the cost")
        )
    say(on, "They agree." if found.agrees else "They do not agree.")


def _difference(one: Difference) -> tuple[str, ...]:
    day = "" if one.day is None else one.day.isoformat()
    of = one.call_id or one.request_id or f"{one.model_id} on {day}"
    amounts = (_or_nothing(one.billed_usd), _or_nothing(one.recorded_usd))
    return (one.kind, of, *amounts, one.model_id, day, one.request_id or "", one.detail)


def _uncertain(one: Uncertain) -> tuple[str, ...]:
    record = one.record
    within = {True: "yes", False: "no", None: ""}[one.within_estimate]
    amounts = (usd(record.estimate_usd), _or_nothing(one.billed_usd))
    return (record.call_id, record.outcome, *amounts, within, record.model_id, record.job_id)


def _or_nothing(amount: Decimal | None) -> str:
    return "" if amount is None else usd(amount)
