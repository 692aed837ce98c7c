"""Which budgets does a call count against, and what do people see of them?"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from attune_worker.budget import BudgetKey, Budgets, BudgetStatus, budgets_for, nano_of, usd_of, window_at
from attune_worker.errors import ConfigurationError
from attune_worker.sections import BudgetSettings
from attune_worker.settings import Settings
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

SPEND = """
local steps, now = cjson.decode(ARGV[1]), now_in_ms()
local look = budget_look(KEYS[1], now, steps.want)
budget_take(look, now)
if steps.settled then
  steps.settled.window = look.window
  budget_settle(KEYS[1], now, steps.settled)
end
"""

NANO = 10**9


def budget(limit: float, **fields: Any) -> BudgetSettings:
    return BudgetSettings(limit_usd=Decimal(str(limit)), **{"per": "day", **fields})


def counters(budgets: list[BudgetSettings], tenant: str | None = None, workflow: str = "wf") -> list[BudgetKey]:
    return list(budgets_for(budgets, tenant, workflow, "anthropic"))


@pytest.fixture
def with_budgets(settings: Settings) -> Callable[..., Settings]:
    return lambda *budgets: settings.model_copy(update={"budgets": budgets})


@pytest.fixture
def spend(redis: Redis, settings: Settings) -> Callable[..., None]:
    """Return a function that reserves an amount for each of a call's counters, and settles it when it has a cost."""
    text = f"{Script('budget', 'values').text}\n{SPEND}"

    def call(spent_on: list[BudgetKey], reserved_nano: int, cost_nano: int | None = None) -> None:
        for counter in spent_on:
            steps = {"want": counter.want(reserved_nano)}
            if cost_nano is not None:
                steps["settled"] = counter.settled("", reserved_nano, cost_nano)
            redis.eval(text, 1, counter.key(FleetKeys(settings.namespace)), json.dumps(steps))

    return call


def test_budget_for_all_counts_every_call() -> None:
    """Whose call it is plays no part, so all share one counter."""
    [one] = counters([budget(5)], "acme")
    assert (one.tenant, one.workflow, one.provider, one.hard_nano) == (None, None, None, 5 * NANO)
    assert counters([budget(5)]) == [one]


def test_named_budget_counts_calls_of_that_name_only() -> None:
    """Each part that is named must fit."""
    named = [budget(5, tenant="acme", workflow="wf")]
    assert len(counters(named, "acme")) == 1
    assert counters(named, "other") == counters(named) == counters(named, "acme", "else") == []


def test_budget_for_each_name_counts_them_apart() -> None:
    """``*`` stands for the actual name, which is what the key holds."""
    each = [budget(5, tenant="*", workflow="*")]
    [one], [other] = counters(each, "acme"), counters(each, "umbrella")
    assert (one.tenant, one.workflow, other.tenant) == ("acme", "wf", "umbrella")
    assert one.key(FleetKeys("ns")) != other.key(FleetKeys("ns"))


def test_job_without_a_tenant_has_no_tenants_budget() -> None:
    """Nobody else pays for it, either."""
    assert counters([budget(5, tenant="*")]) == []


def test_one_call_counts_once_in_each_window_and_scope() -> None:
    """A day's and a month's budget are two counters; two limits on the same counter are one."""
    several = [budget(5), budget(9, per="month"), budget(7, provider="anthropic"), budget(3, hard=False), budget(4)]
    assert [(one.per, one.provider, one.hard_nano, one.soft_nano) for one in counters(several)] == [
        ("day", None, 4 * NANO, 3 * NANO),
        ("month", None, 9 * NANO, None),
        ("day", "anthropic", 7 * NANO, None),
    ]


def test_budget_that_names_someone_takes_the_place_of_the_one_for_each() -> None:
    """Ten for every tenant, a hundred for acme; but a soft limit never takes away a hard one."""
    both = [budget(100, tenant="acme"), budget(10, tenant="*")]
    assert [one.hard_nano for name in ("acme", "other") for one in counters(both, name)] == [100 * NANO, 10 * NANO]
    [kinds] = counters([budget(1, tenant="acme", hard=False), budget(10, tenant="*")], "acme")
    assert (kinds.hard_nano, kinds.soft_nano) == (10 * NANO, NANO)


def test_what_the_scripts_are_told() -> None:
    """Absent means unknown or no limit, never null."""
    hard, soft = counters([budget(5), budget(4, hard=False)]), counters([budget(4, hard=False)])
    assert hard[0].want(7) == {
        "per": "day",
        "hard": True,
        "limit_nano": 5 * NANO,
        "amount_nano": 7,
    }
    assert soft[0].want(None) == {"per": "day", "hard": False, "limit_nano": 4 * NANO}
    settled = {"per": "day", "window": "2026-11-23", "reserved_nano": 7, "limit_nano": 4 * NANO}
    assert soft[0].settled("2026-11-23", 7, None) == settled
    assert hard[0].settled("2026-11-23", 7, 3) == settled | {"cost_nano": 3}


@given(st.integers(-(10**18), 10**18))
def test_money_is_converted_exactly(nano: int) -> None:
    """There and back, to the nano-dollar."""
    assert nano_of(usd_of(nano)) == nano


def test_finer_than_a_nano_dollar_is_refused() -> None:
    """It would have to be rounded, and nobody said which way."""
    with pytest.raises(ValueError, match="nano-USD"):
        nano_of(Decimal("1.00000000000000000000000000000001"))


def test_day_and_month_end_in_utc() -> None:
    """Whatever time zone the caller is in."""
    late = datetime(2026, 12, 31, 23, 30, tzinfo=UTC).astimezone()
    assert window_at(late, "day") == ("2026-12-31", datetime(2027, 1, 1, tzinfo=UTC))
    assert window_at(late, "month") == ("2026-12", datetime(2027, 1, 1, tzinfo=UTC))


def seen(rows: list[BudgetStatus]) -> list[tuple[Any, ...]]:
    return [
        (row.tenant, row.workflow, row.hard, *map(str, (row.limit_usd, row.spent_usd, row.reserved_usd, row.left_usd)))
        for row in rows
    ]


def test_status_shows_what_is_spent_reserved_and_left(
    redis: Redis, spend: Callable[..., None], with_budgets: Callable[..., Settings]
) -> None:
    """Also of a budget that nobody has used yet; both limits of one counter have a line."""
    budgets = (budget(5), budget(4, hard=False), budget(9, workflow="idle", per="month"))
    for reserved, cost in ((2 * NANO, NANO // 2), (NANO, None)):
        spend(counters(list(budgets)), reserved, cost)
    rows = Budgets(with_budgets(*budgets), redis).status()
    assert seen(rows) == [
        (None, None, True, "5.000000000", "0.500000000", "1.000000000", "3.500000000"),
        (None, None, False, "4.000000000", "0.500000000", "1.000000000", "2.500000000"),
        (None, "idle", True, "9.000000000", "0E-9", "0E-9", "9.000000000"),
    ]
    assert rows[0].resets_at - datetime.now(UTC) <= timedelta(days=1, minutes=5)


def test_status_finds_the_names_that_were_used(
    redis: Redis, spend: Callable[..., None], with_budgets: Callable[..., Settings]
) -> None:
    """Whatever characters they have; and not what is configured no more, or somebody else's."""
    budgets = [budget(5, tenant="*"), budget(7, tenant="a:b*ü")]
    for name in ("acme", "a:b*ü", "*"):
        spend(counters(budgets, name), NANO)
    spend(counters([budget(1, tenant="acme", workflow="wf")], "acme"), NANO)
    found = seen(Budgets(with_budgets(*budgets), redis).status())
    assert [(row[0], row[3]) for row in found] == [
        ("*", "5.000000000"),
        ("a:b*ü", "7.000000000"),
        ("acme", "5.000000000"),
    ]


def test_long_name_is_seen_by_its_hash_and_keeps_its_own_limit(
    redis: Redis, spend: Callable[..., None], with_budgets: Callable[..., Settings]
) -> None:
    """Keys hold no name of two hundred characters."""
    name = "x" * 200
    budgets = [budget(5, tenant="*")]
    spend(counters(budgets, name), NANO)
    [row] = Budgets(with_budgets(*budgets), redis).status()
    assert row.tenant is not None
    assert row.tenant.startswith("~")
    assert str(row.reserved_usd) == "1.000000000"
    [named] = Budgets(with_budgets(*budgets, budget(7, tenant=name)), redis).status()
    assert (named.tenant, named.limit_usd) == (name, 7)


def test_foreign_values_count_as_nothing_spent(
    redis: Redis, settings: Settings, with_budgets: Callable[..., Settings]
) -> None:
    """Looking at budgets never fails for what is in the keys, and never changes it."""
    keys = FleetKeys(settings.namespace)
    window = datetime.now(UTC).strftime("%Y-%m")
    redis.set(keys.budget(None, None, None, "day"), "foreign")
    redis.hset(keys.budget(None, None, None, "month"), mapping={f"{window}:spent": "-5", f"{window}:reserved": "x"})
    redis.set(f"{keys.tag}:budget:odd", "foreign")
    rows = Budgets(with_budgets(budget(5), budget(5, per="month"), budget(1, tenant="*")), redis).status()
    assert [row.left_usd for row in rows] == [5, 5]
    assert redis.get(keys.budget(None, None, None, "day")) == b"foreign"


def test_limit_that_was_set_is_shown_with_who_when_and_why(
    redis: Redis, spend: Callable[..., None], with_budgets: Callable[..., Settings]
) -> None:
    """Beside the configured one; calls count on, and what is left is left of the new one."""
    budgets = [budget(5, tenant="*"), budget(4, tenant="acme", hard=False)]
    found = Budgets(with_budgets(*budgets), redis)
    spend(counters(budgets, "acme"), 2 * NANO, NANO)
    row = found.set_limit("day", ("acme", None, None), Decimal("7.5"), by="ada@host", reason="month's end")
    assert (row.limit_usd, row.configured_usd, row.left_usd) == (Decimal("7.5"), 5, Decimal("6.5"))
    assert row.set is not None
    assert (row.set.by, row.set.reason, row.set.until) == ("ada@host", "month's end", row.resets_at)
    assert row.set.at is not None
    assert abs(datetime.now(UTC) - row.set.at) < timedelta(minutes=5)
    [hard, soft] = found.status()
    assert (hard, soft.set, soft.limit_usd) == (row, None, 4)
    assert found.set_limit("day", ("acme", None, None), None).set is None


def test_names_narrow_what_is_shown_also_to_what_was_never_used(
    redis: Redis, spend: Callable[..., None], with_budgets: Callable[..., Settings]
) -> None:
    """Of a budget for each name, too; what is about others, or about everybody, is left out."""
    budgets = [budget(5), budget(6, tenant="*"), budget(7, tenant="*", workflow="*"), budget(8, tenant="acme")]
    found = Budgets(with_budgets(*budgets), redis)
    for name in ("acme", "other"):
        spend(counters(budgets, name), NANO)
    assert [(row.tenant, row.workflow, row.limit_usd) for row in found.status("acme")] == [
        ("acme", None, 8),
        ("acme", "wf", 7),
    ]
    assert [row.limit_usd for row in found.status("new")] == [6]
    assert [row.limit_usd for row in found.status("new", "flow")] == [7]
    assert found.status(provider="anthropic") == []
    long = "x" * 200
    assert [row.tenant for row in found.status(long)] == [long]


@pytest.mark.parametrize(
    ("per", "names", "hard"),
    [
        ("month", ("acme", None, None), True),
        ("day", ("acme", None, None), False),
        ("day", (None, None, None), True),
        ("day", ("acme", "wf", None), True),
        ("day", ("*", None, None), True),
    ],
)
def test_only_a_configured_limit_can_be_set(
    redis: Redis, with_budgets: Callable[..., Settings], per: Any, names: Any, hard: bool
) -> None:
    """No worker would look at any other; the error says which there are."""
    found = Budgets(with_budgets(budget(5, tenant="*")), redis)
    with pytest.raises(ConfigurationError, match=r"configured: hard budget per day of tenant \*$"):
        found.set_limit(per, names, Decimal(1), hard=hard)


@pytest.mark.parametrize("amount", ["-1", "1000000.000000001", "nan", "inf", "-Infinity", "1e-10", "1e-400", "sNaN"])
def test_amounts_that_make_no_sense_are_refused(
    redis: Redis, with_budgets: Callable[..., Settings], amount: str
) -> None:
    """Nothing is written."""
    found = Budgets(with_budgets(budget(5)), redis)
    with pytest.raises(ConfigurationError, match="is not allowed"):
        found.set_limit("day", (None, None, None), Decimal(amount))
    assert found.status()[0].set is None


@pytest.mark.parametrize("days", [-1, 3661])
def test_time_that_is_over_or_too_far_is_refused(
    redis: Redis, with_budgets: Callable[..., Settings], days: int
) -> None:
    """A limit that has ended before it began would be none."""
    found = Budgets(with_budgets(budget(5)), redis)
    with pytest.raises(ConfigurationError, match="a time to come"):
        found.set_limit("day", (None, None, None), Decimal(1), until=datetime.now(UTC) + timedelta(days=days))


def test_highest_limit_is_kept_exactly(redis: Redis, with_budgets: Callable[..., Settings]) -> None:
    """A million dollars less a nano-dollar, and nothing at all."""
    found = Budgets(with_budgets(budget(5)), redis)
    for amount in ("999999.999999999", "1000000", "0", "0.000000001", "1E+3"):
        row = found.set_limit("day", (None, None, None), Decimal(amount), until="for_good")
        assert row.limit_usd == Decimal(amount)


@pytest.mark.parametrize("value", ["x", "5", "5 1", "-5 0", "5 " + "9" * 30, "\xff 0"])
def test_garbled_limit_is_not_shown(
    redis: Redis, settings: Settings, with_budgets: Callable[..., Settings], value: str
) -> None:
    """People see what the scripts go by."""
    key = FleetKeys(settings.namespace).budget(None, None, None, "day")
    redis.hset(key, mapping={"hard_limit": value, "hard_ms": "x", "hard_by": b"\xff"})
    [row] = Budgets(with_budgets(budget(5)), redis).status()
    assert (row.limit_usd, row.set) == (5, None)
