"""What did the calls cost? The records of all, and the sums of each day, as SETTLE has written them.

``store/lua/ledger.lua`` writes both, in the step that settles the call. Here is the reading.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from redis.exceptions import ResponseError

from attune_worker.budget import usd_of
from attune_worker.jobs import NANO_USD
from attune_worker.ledger_record import LedgerRecord
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, close_idle, connect, reaching
from attune_worker.store.keys import FleetKeys, part

logger = logging.getLogger(__name__)

DIMENSIONS = ("tenant", "workflow", "provider", "model", "tier", "mode")
"""What the sums of a day are kept by, in the order in which a group names them."""

OTHER = "~other"
"""What stands for all groups of a day beyond the 20,000th."""

_PAGE = 1000
_SCAN = 5000


@dataclass(frozen=True, slots=True)
class Comparison:
    """What calls cost, held against what was expected before each of them.

    They are those that succeeded and whose cost is known. ``off_usd`` adds up by how much each estimate was off,
    whichever way.
    """

    calls: int = 0
    expected_usd: Decimal = Decimal(0)
    actual_usd: Decimal = Decimal(0)
    off_usd: Decimal = Decimal(0)

    @property
    def ratio(self) -> float | None:
        """Actual cost by expected cost; None: nothing can be compared."""
        return float(self.actual_usd / self.expected_usd) if self.expected_usd else None

    @property
    def mean_off_usd(self) -> Decimal | None:
        """By how much the estimate of a call was off on average; None: there was none."""
        return (self.off_usd / self.calls).quantize(NANO_USD) if self.calls else None


@dataclass(frozen=True, slots=True)
class CostRow:
    """What the calls of one group cost. ``keys`` names the group; None: these calls had no such name.

    ``cost_usd`` is what is known, to the nano-dollar. ``unknown_calls`` may have cost something besides, at most
    ``unknown_usd`` together, and ``orphaned_calls``, whose workers died, ``orphaned_usd``; ``unpriced_calls`` of both
    have no known price, and are in neither amount. ``compared`` holds what calls cost against what was expected.
    """

    keys: Mapping[str, str | None]
    calls: int
    cost_usd: Decimal
    unknown_calls: int
    unknown_usd: Decimal
    orphaned_calls: int
    orphaned_usd: Decimal
    unpriced_calls: int
    input_tokens: int
    output_tokens: int
    compared: Comparison = Comparison()


class Ledger:
    """The calls of one namespace and their costs. Raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._keys = FleetKeys(settings.namespace)
        self._redis = redis or connect(settings)
        self.skipped = 0
        """Entries that were read and are no records: somebody else's, or garbled."""

    def records(self, since: datetime | None = None, until: datetime | None = None) -> Iterator[LedgerRecord]:
        """Yield the records written from ``since`` (included) to ``until`` (excluded), oldest first.

        A call that was taken for orphaned and settled after all has two, see ``latest``. What is no record is
        passed over, counted in ``skipped``, and logged once at the end.
        """
        skipped = self.skipped
        for entry_id, fields in self._entries(since, until):
            try:
                yield LedgerRecord.from_entry(entry_id, fields)
            except ValueError:
                self.skipped += 1
        if self.skipped > skipped:
            logger.warning("%d entries of the ledger are no records", self.skipped - skipped)

    def report(self, days: int, by: Sequence[str] = ()) -> list[CostRow]:
        """Return the sums of the last ``days`` days (UTC, today included), a row for each group.

        ``by`` names what to group by: ``day`` and any of ``DIMENSIONS``; nothing: one row for all. A call counts for
        the day of its admission. Raises ``ValueError`` for other names and for ``days`` below 1.
        """
        unknown = [name for name in by if name not in {"day", *DIMENSIONS}]
        if unknown or days < 1:
            raise ValueError(f"costs are grouped by {', '.join(('day', *DIMENSIONS))}, over 1 day or more")
        found: dict[tuple[str | None, ...], _Sums] = {} if by else {(): _Sums()}
        with reaching(self._settings):
            for day, group, name, count in self._days(days):
                names = {"day": day, **dict(zip(DIMENSIONS, group, strict=True))}
                found.setdefault(tuple(names[one] for one in by), _Sums()).add(name, count)
        ranked = sorted(found.items(), key=lambda row: tuple((name is not None, name or "") for name in row[0]))
        return [sums.row(dict(zip(by, names, strict=True))) for names, sums in ranked]

    def compared(self, workflow: str, days: int) -> dict[str, Comparison]:
        """Return, for each ``provider/model`` of a workflow, how far estimates were off in the last ``days`` days."""
        found: dict[str, _Sums] = {}
        with reaching(self._settings):
            for _, group, name, count in self._days(days, f"*:{part(workflow)}:*:*:*:*|*"):
                names = dict(zip(DIMENSIONS, group, strict=True))
                found.setdefault(f"{names['provider']}/{names['model']}", _Sums()).add(name, count)
        compared = {ref: sums.compared() for ref, sums in found.items()}
        return {ref: one for ref, one in compared.items() if one.calls}

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _days(self, days: int, match: str | None = None) -> Iterator[tuple[str, Sequence[str | None], str, int]]:
        """Yield the last days, oldest first, with each group's names and one of its counters."""
        seconds, _ = self._redis.time()
        today = datetime.fromtimestamp(seconds, UTC)
        for back in reversed(range(min(days, self._settings.ledger.sums_retention_days))):
            day = today - timedelta(days=back)
            for group, name, count in self._sums(f"{day:%Y%m%d}", match):
                yield f"{day:%Y-%m-%d}", group, name, count

    def _entries(self, since: datetime | None, until: datetime | None) -> Iterator[tuple[bytes, Mapping[bytes, bytes]]]:
        start = "-" if since is None else _ms(since)
        end = "+" if until is None else f"({_ms(until)}-0"
        key = self._keys.ledger
        read: Callable[..., Any] = self._redis.xrange
        while True:
            with reaching(self._settings):
                try:
                    page = read(key, start, end, _PAGE)
                except ResponseError as error:
                    if not str(error).startswith("WRONGTYPE"):  # has no class of its own: the key is somebody else's
                        raise
                    self.skipped += 1
                    return
            yield from page
            if len(page) < _PAGE:
                return
            start = f"({page[-1][0].decode()}"

    def _sums(self, day: str, match: str | None) -> Iterator[tuple[Sequence[str | None], str, int]]:
        """Yield each group's names, and one of its counters; of the fields that ``match``, where that is given."""
        key = self._keys.costs(day)
        fields: dict[bytes, bytes] = {}
        try:
            fields.update(self._redis.hscan_iter(key, match, count=_SCAN))  # a scan may meet a field twice
        except ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            self.skipped += 1
        for name, value in fields.items():
            group, bar, counter = name.decode(errors="replace").partition("|")
            parts = [OTHER] * len(DIMENSIONS) if group == OTHER else group.split(":")
            if bar and len(parts) == len(DIMENSIONS) and counter in _SUMS:
                yield [_name(one) for one in parts], counter, _count(value)


def latest(records: Iterable[LedgerRecord]) -> list[LedgerRecord]:
    """Return one record for each call that was made: where an orphan was settled after all, that settlement."""
    by_call = {record.call_id: record for record in records}  # the last one stands
    return [record for record in by_call.values() if record.outcome != "released"]


_SUMS = (
    *("calls", "cost_nano", "unknown", "unknown_nano", "orphaned", "orphaned_nano", "unpriced", "input", "output"),
    *("compared", "expected_nano", "compared_nano", "off_nano"),
)


@dataclass(slots=True)
class _Sums:
    """The counters of one group, added up."""

    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0))

    def add(self, name: str, count: int) -> None:
        self.counters[name] += count

    def row(self, keys: Mapping[str, str | None]) -> CostRow:
        sums = self.counters
        return CostRow(
            keys=keys,
            calls=sums["calls"],
            cost_usd=usd_of(sums["cost_nano"]),
            unknown_calls=sums["unknown"],
            unknown_usd=usd_of(sums["unknown_nano"]),
            orphaned_calls=sums["orphaned"],
            orphaned_usd=usd_of(sums["orphaned_nano"]),
            unpriced_calls=sums["unpriced"],
            input_tokens=sums["input"],
            output_tokens=sums["output"],
            compared=self.compared(),
        )

    def compared(self) -> Comparison:
        sums = self.counters
        return Comparison(
            sums["compared"], usd_of(sums["expected_nano"]), usd_of(sums["compared_nano"]), usd_of(sums["off_nano"])
        )


def _ms(moment: datetime) -> int:
    """Return the first whole millisecond from ``moment`` on, since 1970."""
    return max(0, -((datetime.fromtimestamp(0, UTC) - moment.astimezone(UTC)) // timedelta(milliseconds=1)))


def _name(text: str) -> str | None:
    """Return the name that a part of a group stands for; one that was hashed stays a hash."""
    return None if text == part(None) else unquote(text)


def _count(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
