"""Does the provider's account agree with ours? Its lines beside the ledger's records, call by call."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Literal

from attune_worker.invoices import InvoiceLine
from attune_worker.jobs import ModelTier
from attune_worker.ledger import latest
from attune_worker.ledger_record import LedgerRecord
from attune_worker.models.price_list import get_pricing
from attune_worker.models.registry import ModelInfo

Kind = Literal[
    "not in the ledger",
    "not in the invoice",
    "the cost differs",
    "the tokens differ",
    "the model differs",
    "the calls differ",
    "billed more than once",
    "cannot be judged",
]

_VERSION = re.compile(r"[-@](\d{8}|\d{4}-\d{2}-\d{2})$")
"""What a provider adds to a model's name where it says which version answered."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that one side has and the other has not, or has otherwise.

    It is about one call, or, where the invoice names no calls, about one model's calls of one day. Of the two costs
    one is None where that side has no such call, or has no amount for it; ``detail`` says the rest, such as both
    sides' tokens. What cannot be judged is charged, and nothing says whether it is too much.
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
    whether it was billed at no more than budgets have counted; None: there is nothing to compare. What was charged
    and cannot be compared is a ``Difference`` besides.
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
    differences = [
        *(_unknown(line) for line in strange),
        *(found for record in known if (found := _compared(record, by_call[record.call_id]))),
        *(_missing(record) for record in alone if record.cost_usd),
        *_by_sums(summed, anonymous),
    ]
    uncertain = [
        *(_unsettled(record, by_call[record.call_id]) for record in known if record.uncertain),
        *(_unsettled(record, ()) for record in left if record.uncertain),
    ]
    return Reconciliation(
        billed_calls=sum(1 if line.calls is None else line.calls for line in lines),
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


def _compared(record: LedgerRecord, lines: Sequence[InvoiceLine]) -> Difference | None:
    """Compare a call with its lines; there are several where the provider served it more than once."""
    fault = _fault_of_call(record, lines)
    return _differs(record, lines, *fault) if fault else None


def _unsettled(record: LedgerRecord, lines: Sequence[InvoiceLine]) -> Uncertain:
    """Hold what an uncertain call was billed at against its estimate; lines without a price can only add to it."""
    billed_usd = _known(line.cost_usd for line in lines)
    if billed_usd is None or record.estimate_usd is None:
        return Uncertain(record, billed_usd, None)
    within = billed_usd <= record.estimate_usd
    return Uncertain(record, billed_usd, None if within and _unpriced(lines) else within)


Fault = tuple[Kind, str]
"""What is wrong, and its detail."""


def _fault_of_call(record: LedgerRecord, lines: Sequence[InvoiceLine]) -> Fault | None:
    """Say what is wrong with the lines of one call; what is known of the costs is compared first."""
    billed_usd, calls = _known(line.cost_usd for line in lines), max(line.calls or 1 for line in lines)
    if None not in {billed_usd, record.cost_usd} and billed_usd != record.cost_usd:
        return "the cost differs", ", ".join(filter(None, (_times(lines), _mixed(lines))))
    if calls > 1:
        return "the calls differ", f"billed as {calls} calls"
    if record.uncertain and len(lines) > 1:
        return "billed more than once", _times(lines)
    if billed_usd is None:
        return _fault_of_tokens([record], lines) or _fault_of_model(record, lines)
    beyond_judging = billed_usd and record.uncertain and record.estimate_usd is None
    detail = _mixed(lines) or ("no price is known" if beyond_judging else "")
    return ("cannot be judged", detail) if detail else None


def _times(lines: Sequence[InvoiceLine]) -> str:
    return f"billed {len(lines)} times" if len(lines) > 1 else ""


def _mixed(lines: Sequence[InvoiceLine]) -> str:
    """Say how many of the lines have no price, where others have one."""
    unpriced = _unpriced(lines)
    return f"{unpriced} of {len(lines)} lines without a price" if 0 < unpriced < len(lines) else ""


def _unpriced(lines: Sequence[InvoiceLine]) -> int:
    return sum(line.cost_usd is None for line in lines)


def _differs(record: LedgerRecord, lines: Sequence[InvoiceLine], kind: Kind, detail: str) -> Difference:
    return Difference(
        kind,
        record.model_id,
        record.call_id,
        record.request_id or next((line.request_id for line in lines if line.request_id), None),
        record.time.date(),
        _known(line.cost_usd for line in lines),
        record.cost_usd,
        detail,
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
        recorded, billed_usd = ours[day, model_id], _known(line.cost_usd for line in billed)
        if not recorded:
            yield Difference("not in the ledger", model_id, day=day, billed_usd=billed_usd)
        elif fault := _fault_of_sum(recorded, billed):
            kind, detail = fault
            recorded_usd = _known(record.cost_usd for record in recorded)
            yield Difference(kind, model_id, None, None, day, billed_usd, recorded_usd, detail)


def _fault_of_sum(records: Sequence[LedgerRecord], lines: Sequence[InvoiceLine]) -> Fault | None:
    """Say what is wrong with the lines of one model's calls of one day."""
    billed_usd, mixed = _known(line.cost_usd for line in lines), _mixed(lines)
    if billed_usd is None:
        return _fault_of_tokens(records, lines) or _fault_of_count(records, lines)
    if fault := _fault_of_cost(billed_usd, records):
        return fault[0], ", ".join(filter(None, (fault[1], mixed)))
    return _fault_of_count(records, lines) or (("cannot be judged", mixed) if mixed else None)


def _fault_of_cost(billed_usd: Decimal, records: Sequence[LedgerRecord]) -> Fault | None:
    """Hold the bill of several calls against what is recorded, and what the uncertain ones may have cost besides."""
    recorded_usd = _known(record.cost_usd for record in records) or Decimal(0)
    estimates = [record.estimate_usd for record in records if record.uncertain]
    most = recorded_usd + (_known(estimates) or Decimal(0))
    if recorded_usd <= billed_usd <= most:
        return None
    unpriced = sum(estimate is None for estimate in estimates)
    if billed_usd > most and unpriced:  # theirs may be the rest, and nobody can say how much is too much
        return "cannot be judged", f"recorded without a known price: {unpriced}"
    return "the cost differs", ""


def _fault_of_count(records: Sequence[LedgerRecord], lines: Sequence[InvoiceLine]) -> Fault | None:
    """Compare how many calls there were; those that cost nothing, and uncertain ones, may be counted or not."""
    said = [line.calls for line in lines if line.calls is not None]
    billed, charged = sum(said), sum(bool(record.cost_usd) for record in records)
    if billed <= len(records) and (billed >= charged or len(said) < len(lines)):
        return None
    return "the calls differ", f"billed {billed}, recorded {len(records)}, {charged} of them with a cost"


def _fault_of_tokens(records: Sequence[LedgerRecord], lines: Sequence[InvoiceLine]) -> Fault | None:
    """Compare tokens where nothing has a price; what a call that ended without a cost did not count is none."""
    if any(line.input_tokens is None or line.output_tokens is None for line in lines):
        return "cannot be judged", "billed with neither a price nor tokens"
    theirs = _tokens(lines)
    ours = _tokens(records)
    if ours == theirs:
        return None
    detail = f"billed {theirs[0]} in and {theirs[1]} out, recorded {ours[0]} in and {ours[1]} out"
    uncounted = any(one.uncertain and (one.input_tokens is None or one.output_tokens is None) for one in records)
    if uncounted and theirs[0] >= ours[0] and theirs[1] >= ours[1]:
        return "cannot be judged", detail
    return "the tokens differ", detail


def _tokens(counted: Sequence[LedgerRecord] | Sequence[InvoiceLine]) -> tuple[int, int]:
    return sum(one.input_tokens or 0 for one in counted), sum(one.output_tokens or 0 for one in counted)


def _fault_of_model(record: LedgerRecord, lines: Sequence[InvoiceLine]) -> Fault | None:
    """Compare models: the same tokens of another one may cost more."""
    hour = record.time.replace(minute=0, second=0, microsecond=0)
    for line in lines:
        if not _costs_the_same(record.provider, record.model_id, line.model_id, hour):
            return "the model differs", f"billed as {line.model_id}"
    return None


@lru_cache(maxsize=1024)  # an export without prices may name thousands of calls, and few models
def _costs_the_same(provider: str, ours: str, theirs: str, at: datetime) -> bool:
    """Whether both names are of one model: by their published prices, else by all but the version.

    Providers charge a call of ``gpt-4o`` as ``gpt-4o-2024-08-06``; two versions are two models.
    """
    if ours == theirs:
        return True
    prices = [get_pricing(ModelInfo(name, provider, ModelTier.CHEAP), at) for name in (ours, theirs)]
    if prices[0] is not None and prices[1] is not None:
        return (prices[0].tiers, prices[0].request_cost_usd) == (prices[1].tiers, prices[1].request_cost_usd)
    ours, theirs = ours.removesuffix("-latest"), theirs.removesuffix("-latest")
    return ours in {theirs, _VERSION.sub("", theirs)} or theirs == _VERSION.sub("", ours)


def _place(line: InvoiceLine) -> tuple[date | None, str]:
    return line.day, line.model_id


def _known(amounts: Iterable[Decimal | None]) -> Decimal | None:
    """Add up the amounts that are known; None where none is."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known, Decimal(0)) if known else None
