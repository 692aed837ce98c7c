"""Which budgets does a call count against, what is left of them, and who changes a limit while the fleet runs?

``store/lua/budget.lua`` decides and counts, inside ADMIT and SETTLE. Here is what it is told, and the reading of it.
Of several budgets of one kind (hard or soft) for the same names, the one that spells out most of them holds:
``tenant = "acme"`` takes the place of ``tenant = "*"`` for acme. Where that leaves several, the lowest does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import unquote

from redis.exceptions import ResponseError

from attune_worker.errors import ConfigurationError
from attune_worker.jobs import NANO_USD
from attune_worker.sections import BudgetSettings
from attune_worker.set_limits import BUDGET_SET, SET_FIELDS, SetLimit, Until, set_limit_in, wish
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, close_idle, connect, reaching, together
from attune_worker.store.keys import FleetKeys, part

EACH = "*"
"""In settings: each name has a budget of its own."""

Names = tuple[str | None, str | None, str | None]
"""Tenant, workflow and provider; None: the budget is not about that."""

Per = Literal["day", "month"]


@dataclass(frozen=True, slots=True)
class BudgetKey:
    """One counter, and its limits in nano-USD; None: no limit of that kind."""

    per: Per
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
    """A budget in its current window. Amounts are in USD; ``left_usd`` is below 0 where more went than was meant to.

    ``limit_usd`` is what holds now: ``configured_usd``, unless somebody ``set`` another.
    """

    per: Per
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
    configured_usd: Decimal
    set: SetLimit | None = None


class Budgets:
    """The budgets of one namespace, as they stand. Raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._keys = FleetKeys(settings.namespace)
        self._redis = redis or connect(settings)
        self._owns_redis = redis is None

    def status(
        self, tenant: str | None = None, workflow: str | None = None, provider: str | None = None
    ) -> list[BudgetStatus]:
        """Return every budget that names whom it is for, and of the others those that have been used.

        With names, only the budgets that are about these, used or not. Changes nothing. It scans the keys of Redis
        where a budget is for each name and that is not given: for people, not for hot paths.
        """
        with reaching(self._settings):
            counters = self._counters((tenant, workflow, provider))
            now = self._now()
            windows = [window_at(now, counter.per)[0] for counter in counters.values()]
            fields = [(f"{window}:spent", f"{window}:reserved", *SET_FIELDS) for window in windows]
            commands = [(key, ("HMGET", key, *names)) for key, names in zip(counters, fields, strict=True)]
            answers = together(self._redis, commands)
        rows: list[BudgetStatus] = []
        for counter, answer in zip(counters.values(), answers, strict=True):
            if isinstance(answer, Exception) and type(answer) is not ResponseError:
                raise answer
            foreign = isinstance(answer, Exception)
            rows += _rows(counter, [None] * (2 + len(SET_FIELDS)) if foreign else answer, now)
        return sorted(rows, key=lambda row: (row.per, *(name or "" for name in _names(row)), not row.hard))

    def set_limit(
        self,
        per: Per,
        names: Names,
        limit_usd: Decimal | None,
        *,
        hard: bool = True,
        until: Until = "window_end",
        by: str = "",
        reason: str = "",
    ) -> BudgetStatus:
        """Set a budget's limit for the running fleet, from the next call on; None: the configured one holds again.

        It holds until the window ends, or a time, or for good. What is spent and reserved stays as it is, so that a
        limit below it refuses at once. Raises ``ConfigurationError`` for a budget that is not configured, because
        no worker would look at it, and for an amount or a time that makes no sense.
        """
        counter = self._configured(per, names, hard=hard)
        with reaching(self._settings):
            asked = wish(limit_usd, until, self._now()) | {"per": per, "hard": hard, "by": by, "reason": reason}
            BUDGET_SET(self._redis, [counter.key(self._keys)], [json.dumps(asked)])
        return next(row for row in self.status(*names) if (row.per, row.hard, _names(row)) == (per, hard, names))

    def close(self) -> None:
        """Give the connections back, unless they are the caller's."""
        if self._owns_redis:
            close_idle(self._redis)

    def _now(self) -> datetime:
        seconds, micros = self._redis.time()
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micros)

    def _configured(self, per: Per, names: Names, *, hard: bool) -> BudgetKey:
        budgets = [one for one in self._settings.budgets if one.per == per]
        if any(one.hard is hard and _covers(_names(one), names) for one in budgets) and EACH not in names:
            return next(one for one in budgets_for(budgets, *names) if _names(one) == names)
        there = ", ".join(
            dict.fromkeys(_described(one.per, _names(one), hard=one.hard) for one in self._settings.budgets)
        )
        wanted = _described(per, names, hard=hard)
        hint = f"; {EACH!r} stands for each name: give one" if EACH in names else ""
        raise ConfigurationError(f"no {wanted} is configured{hint}; configured: {there or 'none'}")

    def _counters(self, only: Names) -> dict[str, BudgetKey]:
        """Return the counters that are about these names, by their keys; None: about any name, or none."""
        budgets, counters = self._settings.budgets, dict[str, BudgetKey]()
        scopes = [_narrowed(_names(one), only) for one in budgets]
        for scope in scopes:
            if scope is not None and EACH not in scope:
                found = [one for one in budgets_for(budgets, *scope) if _names(one) == scope]
                counters |= {counter.key(self._keys): counter for counter in found}
        if any(scope is not None and EACH in scope for scope in scopes):
            prefix = f"{self._keys.tag}:budget:"
            for key in self._redis.scan_iter(f"{prefix}*", count=1000):
                text = key.decode(errors="replace")
                parts = text.removeprefix(prefix).split(":")
                if all(name is None or _fits(name, text) for name, text in zip(only, parts, strict=False)):
                    for counter in _counter_of(budgets, parts):
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


def window_at(now: datetime, per: Per) -> tuple[str, datetime]:
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
    return len(parts) == len(names) and all(map(_fits, names, parts))


def _fits(name: str | None, text: str) -> bool:
    """Whether a part of a key is what a budget is about; ``EACH`` is about any name."""
    return text != part(None) if name == EACH else text == part(name)


def _covers(names: Names, wanted: Names) -> bool:
    """Whether a budget keeps this counter."""
    return all(
        (name is None) == (want is None) and name in {want, EACH} for name, want in zip(names, wanted, strict=True)
    )


def _narrowed(names: Names, only: Names) -> Names | None:
    """Return what of a budget is about the names asked for; None: nothing."""
    tenant, workflow, provider = (
        want if name == EACH and want is not None else name for name, want in zip(names, only, strict=True)
    )
    narrowed = (tenant, workflow, provider)
    return narrowed if all(want in {None, name} for name, want in zip(narrowed, only, strict=True)) else None


def _described(per: Per, names: Names, *, hard: bool) -> str:
    kinds = ("tenant", "workflow", "provider")
    scope = [f" of {kind} {name}" for kind, name in zip(kinds, names, strict=True) if name is not None]
    return f"{'hard' if hard else 'soft'} budget per {per}{''.join(scope)}"


def _rows(counter: BudgetKey, values: Sequence[bytes | None], now: datetime) -> Iterator[BudgetStatus]:
    window, resets_at = window_at(now, counter.per)
    spent_nano, reserved_nano, *limits = values
    used_nano = _count(spent_nano) + _count(reserved_nano)
    set_limits = dict(zip(SET_FIELDS, limits, strict=True))
    for hard, configured_nano in ((True, counter.hard_nano), (False, counter.soft_nano)):
        if configured_nano is None:
            continue
        found = set_limit_in(set_limits, "hard" if hard else "soft", now)
        limit_nano = configured_nano if found is None else nano_of(found.limit_usd)
        yield BudgetStatus(
            per=counter.per,
            tenant=counter.tenant,
            workflow=counter.workflow,
            provider=counter.provider,
            hard=hard,
            limit_usd=usd_of(limit_nano),
            spent_usd=usd_of(_count(spent_nano)),
            reserved_usd=usd_of(_count(reserved_nano)),
            left_usd=usd_of(limit_nano - used_nano),
            window=window,
            resets_at=resets_at,
            configured_usd=usd_of(configured_nano),
            set=found,
        )


def _count(text: bytes | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _told(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
