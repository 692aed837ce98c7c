"""Which budgets does a call count against, and what is left of them?

``store/lua/budget.lua`` decides and counts, inside ADMIT and SETTLE. Here is what it is told, and the reading of it.
Of several budgets of one kind (hard or soft) for the same names, the one that spells out most of them holds:
``tenant = "acme"`` takes the place of ``tenant = "*"`` for acme. Where that leaves several, the lowest does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import unquote

from redis.exceptions import ResponseError

from attune_worker.jobs import NANO_USD
from attune_worker.sections import BudgetSettings
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, connect, reaching, together
from attune_worker.store.keys import FleetKeys, part

EACH = "*"
"""In settings: each name has a budget of its own."""

Names = tuple[str | None, str | None, str | None]
"""Tenant, workflow and provider; None: the budget is not about that."""


@dataclass(frozen=True, slots=True)
class BudgetKey:
    """One counter, and its limits in nano-USD; None: no limit of that kind."""

    per: Literal["day", "month"]
    tenant: str | None
    workflow: str | None
    provider: str | None
    hard_nano: int | None
    soft_nano: int | None

    def key(self, keys: FleetKeys) -> str:
        """Return where the counter is."""
        return keys.budget(self.tenant, self.workflow, self.provider, self.per)

    def want(self, amount_nano: int | None) -> dict[str, Any]:
        """Return what ``budget_look`` is asked; ``amount_nano`` is the most that the call can cost, None: unknown."""
        hard = self.hard_nano is not None
        limit_nano = self.hard_nano if hard else self.soft_nano
        return _told({"per": self.per, "hard": hard, "limit_nano": limit_nano, "amount_nano": amount_nano})

    def settled(self, window: str, reserved_nano: int, cost_nano: int | None) -> dict[str, Any]:
        """Return what ``budget_settle`` is told; ``window`` and ``reserved_nano`` are the admission's."""
        fields = {"per": self.per, "window": window, "reserved_nano": reserved_nano, "cost_nano": cost_nano}
        return _told(fields | {"limit_nano": self.soft_nano})


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """A budget in its current window. Amounts are in USD; ``left_usd`` is below 0 where more went than was meant to."""

    per: Literal["day", "month"]
    tenant: str | None
    workflow: str | None
    provider: str | None
    hard: bool
    limit_usd: Decimal
    spent_usd: Decimal
    reserved_usd: Decimal
    left_usd: Decimal
    window: str
    resets_at: datetime


class Budgets:
    """The budgets of one namespace, as they stand. Raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._keys = FleetKeys(settings.namespace)
        self._redis = redis or connect(settings)

    def status(self) -> list[BudgetStatus]:
        """Return every budget that names whom it is for, and of the others those that have been used.

        Changes nothing. It scans the keys of Redis when a budget is for each name: for people, not for hot paths.
        """
        with reaching(self._settings):
            counters = self._counters()
            seconds, micros = self._redis.time()
            now = datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micros)
            commands = []
            for key, counter in counters.items():
                window, _ = window_at(now, counter.per)
                commands.append((key, ("HMGET", key, f"{window}:spent", f"{window}:reserved")))
            answers = together(self._redis, commands)
            rows: list[BudgetStatus] = []
            for counter, answer in zip(counters.values(), answers, strict=True):
                if isinstance(answer, Exception) and type(answer) is not ResponseError:
                    raise answer
                spent, reserved = (None, None) if isinstance(answer, Exception) else answer  # that: a foreign key
                rows += _rows(counter, _count(spent), _count(reserved), now)
        return sorted(rows, key=lambda row: (row.per, *(name or "" for name in _names(row)), not row.hard))

    def _counters(self) -> dict[str, BudgetKey]:
        budgets = self._settings.budgets
        named = [
            counter for one in budgets if EACH not in _names(one) for counter in budgets_for(budgets, *_names(one))
        ]
        counters = {counter.key(self._keys): counter for counter in named}
        if any(EACH in _names(budget) for budget in budgets):
            prefix = f"{self._keys.tag}:budget:"
            for key in self._redis.scan_iter(f"{prefix}*", count=1000):
                text = key.decode(errors="replace")
                for counter in _counter_of(budgets, text.removeprefix(prefix).split(":")):
                    counters.setdefault(text, counter)
        return counters


def budgets_for(
    budgets: Sequence[BudgetSettings], tenant: str | None, workflow: str | None, provider: str | None
) -> tuple[BudgetKey, ...]:
    """Return the counters that a call counts against, each of them once.

    What a call has no name for (a job without a tenant) counts against no budget that is about such names.
    """
    names = (tenant, workflow, provider)
    groups: dict[tuple[str, Names], list[BudgetSettings]] = {}
    for budget in budgets:
        wanted = _names(budget)
        if all(want in {None, name} or (want == EACH and name) for want, name in zip(wanted, names, strict=True)):
            scope = (budget.tenant and tenant, budget.workflow and workflow, budget.provider and provider)
            groups.setdefault((budget.per, scope), []).append(budget)
    return tuple(_counter(scope, group) for (_, scope), group in groups.items())


def nano_of(amount_usd: Decimal) -> int:
    """Return an amount in whole nano-USD; raises ``ValueError`` for one that is finer."""
    numerator, denominator = amount_usd.as_integer_ratio()
    nano, rest = divmod(numerator * 10**9, denominator)
    if rest:
        raise ValueError(f"{amount_usd} USD is not a whole number of nano-USD")
    return nano


def usd_of(nano: int) -> Decimal:
    """Return whole nano-USD as an amount, exactly."""
    return Decimal(nano) * NANO_USD


def window_at(now: datetime, per: Literal["day", "month"]) -> tuple[str, datetime]:
    """Return the window that ``now`` is in, as ``store/lua/budget.lua`` names it, and when it ends (UTC)."""
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if per == "day":
        return today.strftime("%Y-%m-%d"), today + timedelta(days=1)
    return today.strftime("%Y-%m"), (today.replace(day=1) + timedelta(days=32)).replace(day=1)


def _names(scope: BudgetSettings | BudgetKey | BudgetStatus) -> Names:
    return scope.tenant, scope.workflow, scope.provider


def _counter(names: Names, budgets: Sequence[BudgetSettings]) -> BudgetKey:
    return BudgetKey(budgets[0].per, *names, _limit_nano(budgets, hard=True), _limit_nano(budgets, hard=False))


def _limit_nano(budgets: Iterable[BudgetSettings], *, hard: bool) -> int | None:
    ranked = [(_names(one).count(EACH), nano_of(one.limit_usd)) for one in budgets if one.hard is hard]
    return min(ranked)[1] if ranked else None


def _counter_of(budgets: Iterable[BudgetSettings], parts: Sequence[str]) -> Iterator[BudgetKey]:
    """Yield the counter whose key has these parts, if it is configured; a name that was hashed stays a hash."""
    *scope, per = parts
    matching = [one for one in budgets if one.per == per and _stands_for(_names(one), scope)]
    if matching:
        tenant, workflow, provider = (None if text == part(None) else unquote(text) for text in scope)
        yield _counter((tenant, workflow, provider), matching)


def _stands_for(names: Names, parts: Sequence[str]) -> bool:
    return len(parts) == len(names) and all(
        text != part(None) if name == EACH else text == part(name) for name, text in zip(names, parts, strict=True)
    )


def _rows(counter: BudgetKey, spent_nano: int, reserved_nano: int, now: datetime) -> Iterator[BudgetStatus]:
    window, resets_at = window_at(now, counter.per)
    for hard, limit_nano in ((True, counter.hard_nano), (False, counter.soft_nano)):
        if limit_nano is not None:
            yield BudgetStatus(
                per=counter.per,
                tenant=counter.tenant,
                workflow=counter.workflow,
                provider=counter.provider,
                hard=hard,
                limit_usd=usd_of(limit_nano),
                spent_usd=usd_of(spent_nano),
                reserved_usd=usd_of(reserved_nano),
                left_usd=usd_of(limit_nano - spent_nano - reserved_nano),
                window=window,
                resets_at=resets_at,
            )


def _count(text: bytes | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _told(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
