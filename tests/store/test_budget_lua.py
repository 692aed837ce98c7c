"""Is a hard budget hard, and is every nano-dollar counted once? The fragment ``budget.lua``, on any day."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis import Redis

from attune_worker.budget import window_at
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, connect
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

DRIVER = """
local answers, now = {}, now_in_ms()
for index, step in ipairs(cjson.decode(ARGV[1])) do
  local at = step.at or now
  if step.settled then
    answers[index] = budget_settle(KEYS[1], at, step.settled)
  elseif step.set then
    answers[index] = budget_set(KEYS[1], at, step.set)
  else
    local look = budget_look(KEYS[1], at, step.want)
    if look.allowed and step.take then
      budget_take(look, at)
    end
    answers[index] = { allowed = look.allowed, left_nano = integer(look.left_nano), resets_at = look.resets_at,
      window = look.window, reason = look.reason }
  end
end
return cjson.encode(answers)
"""

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY = "2026-11-23"
TTL_SECONDS = 63 * 86_400


def ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)


class Budget:
    """Runs steps in one go: ``{at, want, take}`` (a look, and perhaps a take), ``{at, settled}`` or ``{at, set}``."""

    def __init__(self, redis: RedisClient, namespace: str) -> None:
        self.redis = redis
        self.key = FleetKeys(namespace).budget("acme", None, None, "day")
        self.text = f"{Script('budget', 'values').text}\n{DRIVER}"

    def run(self, *steps: dict[str, Any]) -> list[Any]:
        answers: list[Any] = json.loads(self.redis.eval(self.text, 1, self.key, json.dumps(steps)))
        return answers

    def admit(self, amount_nano: int | None, limit_nano: int = 1000, at: datetime = NOON, **want: Any) -> Any:
        asked = {"per": "day", "limit_nano": limit_nano, "hard": True, "amount_nano": amount_nano, **want}
        asked = {name: value for name, value in asked.items() if value is not None}
        return self.run({"at": ms(at), "want": asked, "take": True})[0]

    def settle(self, reserved_nano: int, cost_nano: int | None, at: datetime = NOON, **settled: Any) -> bool:
        told = {"per": "day", "window": DAY, "reserved_nano": reserved_nano, **settled}
        if cost_nano is not None:
            told["cost_nano"] = cost_nano
        return bool(self.run({"at": ms(at), "settled": told})[0])

    def set(self, limit_nano: int | None, at: datetime = NOON, *, hard: bool = True, **wish: Any) -> int:
        told = {"per": "day", "hard": hard, "limit_nano": limit_nano, "by": "ada@host", "reason": "why", **wish}
        told = {name: value for name, value in told.items() if value is not None}
        return int(self.run({"at": ms(at), "set": told})[0])

    def counted(self, window: str = DAY) -> tuple[int, int]:
        """What is spent and what is reserved."""
        spent, reserved = self.redis.hmget(self.key, f"{window}:spent", f"{window}:reserved")
        return int(spent or 0), int(reserved or 0)


@pytest.fixture
def budget(settings: Settings) -> Iterator[Budget]:
    redis = connect(settings)  # the client that workers use: it is meant for crowds of threads
    yield Budget(redis, settings.namespace)
    nodes = [redis] if isinstance(redis, Redis) else [node.redis_connection for node in redis.get_nodes()]
    for node in nodes:
        if node is not None:
            node.connection_pool.disconnect()  # closing a client that was given its pool leaves it open
    redis.close()


def test_hard_budget_allows_up_to_its_limit_exactly(budget: Budget) -> None:
    """The last nano-dollar may be spent, and none beyond it."""
    assert budget.admit(600)["allowed"]
    refused = budget.admit(401)
    assert (refused["allowed"], refused["reason"], refused["left_nano"]) == (False, "budget_reserved", "400")
    assert refused["resets_at"] == ms(datetime(2026, 11, 24, tzinfo=UTC))
    assert budget.admit(400)["allowed"]
    assert budget.admit(1)["left_nano"] == "0"
    assert budget.counted() == (0, 1000)


def test_what_is_spent_is_gone_and_what_is_reserved_may_come_back(budget: Budget) -> None:
    """A job waits for the second, and is told at once of the first."""
    assert budget.admit(600)["allowed"]
    assert budget.admit(401)["reason"] == "budget_reserved"
    budget.settle(600, 600)
    refused = budget.admit(401)
    assert (refused["allowed"], refused["reason"], refused["left_nano"]) == (False, "budget", "400")
    assert budget.admit(1001)["reason"] == "budget_too_small"


def test_settlement_turns_the_reservation_into_what_it_cost(budget: Budget) -> None:
    """What was reserved and not spent can be spent by others."""
    budget.admit(900)
    budget.settle(900, 100)
    assert budget.counted() == (100, 0)
    assert budget.admit(900)["allowed"]


def test_unknown_cost_counts_as_what_was_reserved(budget: Budget) -> None:
    """A call whose connection broke may have been charged in full."""
    budget.admit(900)
    budget.settle(900, None)
    assert budget.counted() == (900, 0)


def test_hard_budget_refuses_a_price_that_is_not_known(budget: Budget) -> None:
    """Unknown is not 0."""
    assert budget.admit(None)["reason"] == "unknown_price"
    assert budget.admit(-5)["reason"] == "unknown_price"
    assert budget.admit(None, hard=False)["allowed"]
    assert budget.counted() == (0, 0)


def test_call_that_no_window_has_room_for_is_told_so(budget: Budget) -> None:
    """Waiting for tomorrow would not help it."""
    assert budget.admit(1001)["reason"] == "budget_too_small"
    assert budget.admit(1, limit_nano=0)["reason"] == "budget_too_small"


def test_what_is_free_passes_a_used_up_budget(budget: Budget) -> None:
    """A local model costs nothing; a budget of 0 allows it and nothing else."""
    assert budget.admit(0, limit_nano=0)["allowed"]
    budget.settle(0, 5000)
    assert budget.admit(0)["allowed"]


def test_soft_budget_never_refuses_and_warns_once_in_a_window(budget: Budget) -> None:
    """The settlement that passes the limit says so; the next ones do not."""
    assert budget.admit(1000, hard=False)["allowed"]
    assert budget.settle(1000, 1000, limit_nano=1000) is False
    late = budget.admit(10, hard=False)
    assert (late["allowed"], late["left_nano"]) == (True, "0")
    assert budget.settle(10, 10, limit_nano=1000) is True
    assert budget.settle(0, 10, limit_nano=1000) is False
    tomorrow = NOON + timedelta(days=1)
    assert budget.settle(0, 1001, tomorrow, window="2026-11-24", limit_nano=1000) is True


def test_soft_limit_of_a_hard_budget_warns_before_it_refuses(budget: Budget) -> None:
    """Warn at 800, stop at 1000: one counter."""
    assert budget.admit(900)["allowed"]
    assert budget.settle(900, 900, limit_nano=800) is True
    assert budget.admit(101)["allowed"] is False


def test_next_window_starts_at_nothing(budget: Budget) -> None:
    """A day's budget is all there again at midnight UTC."""
    before_midnight = datetime(2026, 11, 23, 23, 59, 59, 999_000, UTC)
    budget.admit(1000, at=before_midnight)
    assert not budget.admit(1, at=before_midnight)["allowed"]
    after = budget.admit(1000, at=before_midnight + timedelta(milliseconds=1))
    assert (after["allowed"], after["window"]) == (True, "2026-11-24")


def test_settlement_after_midnight_is_charged_to_the_day_of_its_admission(budget: Budget) -> None:
    """And to no other."""
    tomorrow = NOON + timedelta(days=1)
    budget.admit(700)
    budget.admit(200, at=tomorrow)
    budget.settle(700, 500, tomorrow)
    assert budget.counted() == (500, 0)
    assert budget.counted("2026-11-24") == (0, 200)


def test_only_this_window_and_the_one_before_are_kept(budget: Budget) -> None:
    """A key that is used every day does not grow, and old settlements do not bring old days back."""
    for days in range(5):
        budget.admit(10, at=NOON + timedelta(days=days))
    assert set(budget.redis.hgetall(budget.key)) == {b"2026-11-26:reserved", b"2026-11-27:reserved"}
    assert budget.settle(10, 10, NOON + timedelta(days=4)) is False
    assert budget.counted() == (0, 0)


def test_call_may_take_longer_than_its_window_is_current(budget: Budget) -> None:
    """The day before still is known; what was spent on it stays readable."""
    budget.redis.hset(budget.key, mapping={"2026-11-22:spent": 40, "2026-11-22:reserved": 60, "2026-11-01:spent": 9})
    budget.admit(1)
    assert budget.settle(60, 50, window="2026-11-22") is False
    assert budget.counted("2026-11-22") == (90, 0)
    assert not budget.redis.hexists(budget.key, "2026-11-01:spent")


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.datetimes(datetime(1971, 1, 1), datetime(2400, 1, 1)), per=st.sampled_from(["day", "month"]))  # noqa: DTZ001
def test_windows_are_those_of_the_calendar(budget: Budget, at: datetime, per: Any) -> None:
    """Leap years, ends of months and centuries included; Lua and Python agree."""
    at = at.replace(tzinfo=UTC, microsecond=0)
    [look] = budget.run({"at": ms(at), "want": {"per": per, "limit_nano": 1, "hard": True, "amount_nano": 0}})
    window, resets_at = window_at(at, per)
    assert (look["window"], look["resets_at"]) == (window, ms(resets_at))


@pytest.mark.parametrize(
    ("at", "before"),
    [(datetime(2027, 1, 31, tzinfo=UTC), "2026-12"), (datetime(2028, 3, 1, tzinfo=UTC), "2028-02")],
)
def test_month_before_is_still_settled(budget: Budget, at: datetime, before: str) -> None:
    """Across the end of a year, and after a short month."""
    budget.settle(0, 7, at, per="month", window=before)
    assert budget.counted(before) == (7, 0)


def test_largest_budget_is_kept_exactly(budget: Budget) -> None:
    """A million dollars is 1e15 nano-dollars, which Lua would write as 1e+15."""
    million = 10**15
    assert budget.admit(million - 1, million)["left_nano"] == str(million)
    assert budget.redis.hget(budget.key, f"{DAY}:reserved") == str(million - 1).encode()
    assert budget.admit(2, million)["left_nano"] == "1"
    assert budget.admit(1, million)["allowed"]
    budget.settle(million, million)
    assert budget.counted() == (million, 0)


@pytest.mark.parametrize("value", ["", "abc", "nan", "inf", "-inf", "-5", "1.5", "0x"])
def test_garbled_amounts_count_as_missing(budget: Budget, value: str) -> None:
    """No value in our keys makes a script fail, or gives money away below zero."""
    budget.redis.hset(budget.key, mapping={f"{DAY}:spent": value, f"{DAY}:reserved": value, "x": "y"})
    assert budget.admit(10)["left_nano"] == "1000"
    assert budget.settle(10, 4) is False
    assert budget.counted() == (4, 0)


def test_key_of_another_type_is_replaced(budget: Budget) -> None:
    """Somebody else's string under our name is no reason to stop."""
    budget.redis.set(budget.key, "foreign")
    assert budget.admit(10)["allowed"]
    budget.redis.set(budget.key, "foreign")
    budget.settle(10, 4)
    assert budget.counted() == (4, 0)


def test_key_outlives_a_month_and_the_one_before(budget: Budget) -> None:
    """And then goes by itself; a settlement alone sees to that, too."""
    budget.admit(10)
    assert TTL_SECONDS - 60 < budget.redis.ttl(budget.key) <= TTL_SECONDS
    budget.redis.persist(budget.key)
    budget.settle(10, 10)
    assert TTL_SECONDS - 60 < budget.redis.ttl(budget.key) <= TTL_SECONDS


def test_look_changes_nothing(budget: Budget) -> None:
    """Phase one of ADMIT asks about candidates that it may not take."""
    budget.run({"at": ms(NOON), "want": {"per": "day", "limit_nano": 5, "hard": True, "amount_nano": 1}})
    assert not budget.redis.exists(budget.key)


FOR_GOOD = {"until_ms": 0}


def test_limit_that_was_set_holds_from_the_next_call_on(budget: Budget) -> None:
    """Higher and lower than the configured one of 1000, and back; what was counted stays."""
    assert budget.admit(600)["allowed"]
    budget.set(2000)
    assert budget.admit(1400)["allowed"]
    assert budget.admit(1)["left_nano"] == "0"
    budget.set(None)
    assert budget.admit(1)["left_nano"] == "-1000"
    assert budget.counted() == (0, 2000)
    assert {name for name in budget.redis.hgetall(budget.key) if b"hard" in name} == set()


def test_limit_below_what_is_spent_refuses_at_once_and_loses_no_reservation(budget: Budget) -> None:
    """Calls under way settle as they would; only what is free still goes."""
    budget.admit(600)
    budget.settle(600, 600)
    budget.admit(300)
    budget.set(100, **FOR_GOOD)
    refused = budget.admit(1)
    assert (refused["allowed"], refused["reason"], refused["left_nano"]) == (False, "budget", "-800")
    assert budget.admit(0)["allowed"]
    budget.settle(300, 250)
    assert budget.counted() == (850, 0)


def test_limit_lasts_until_the_window_ends_unless_it_is_to_last_longer(budget: Budget) -> None:
    """The next day has the configured limit again, or the one that was set for good."""
    tomorrow = NOON + timedelta(days=1)
    assert budget.set(50) == ms(datetime(2026, 11, 24, tzinfo=UTC))
    assert not budget.admit(51)["allowed"]
    assert budget.admit(1000, at=tomorrow)["allowed"]
    budget.set(50, **FOR_GOOD)
    assert not budget.admit(51, at=tomorrow + timedelta(days=1))["allowed"]


def test_limit_with_an_end_says_when_there_is_room_again(budget: Budget) -> None:
    """The lower limit's end, not the window's; and that a call fits then, it is not too small."""
    ends = NOON + timedelta(hours=1)
    budget.set(50, until_ms=ms(ends))
    refused = budget.admit(51)
    assert (refused["reason"], refused["resets_at"]) == ("budget", ms(ends))
    assert budget.admit(1001)["reason"] == "budget_too_small"
    assert budget.admit(51, at=ends)["allowed"]
    budget.set(50, **FOR_GOOD)
    assert budget.admit(51)["reason"] == "budget_too_small"


def test_higher_limit_that_ends_promises_nothing_for_the_next_window(budget: Budget) -> None:
    """A call that only fits under it is told that waiting will not help."""
    budget.set(2000)
    budget.admit(1500)
    budget.settle(1500, 1500)
    refused = budget.admit(1200)
    assert (refused["reason"], refused["resets_at"]) == ("budget_too_small", ms(datetime(2026, 11, 24, tzinfo=UTC)))


def test_hard_and_soft_limits_are_set_apart(budget: Budget) -> None:
    """Each kind has its own; a soft one that is set warns anew."""
    budget.set(300, hard=False)
    assert budget.admit(400)["allowed"]
    assert budget.settle(400, 400, limit_nano=800) is True
    assert budget.settle(0, 10, limit_nano=800) is False
    budget.set(500, hard=False)
    assert budget.settle(0, 10, limit_nano=800) is False
    assert budget.settle(0, 100, limit_nano=800) is True
    assert budget.settle(0, 10) is False  # no soft limit is configured, so there is none
    assert budget.admit(10)["left_nano"] == "470"


@pytest.mark.parametrize(
    "value",
    ["", "x", "5", "-5 0", "5 -1", "5.5 0", "1e3 0", "nan 0", "5 nan", "5 0 0", " 5 0", "5 " + "9" * 30, "5 1"],
)
def test_garbled_limit_is_none(budget: Budget, value: str) -> None:
    """The configured one holds, no script fails, and nothing keeps the key for ever."""
    budget.redis.hset(budget.key, mapping={"hard_limit": value, "soft_limit": value})
    assert budget.admit(10)["left_nano"] == "1000"
    assert budget.settle(10, 10, limit_nano=5) is True
    assert 0 < budget.redis.ttl(budget.key) <= TTL_SECONDS


def test_limit_for_good_does_not_lapse_with_its_key(budget: Budget) -> None:
    """Neither by disuse nor by the calls that come after; one with an end goes a day after it, or with the window."""
    budget.set(50, **FOR_GOOD)
    assert budget.redis.ttl(budget.key) == -1
    budget.admit(10)
    budget.settle(10, 10)
    budget.set(70, hard=False)
    assert budget.redis.ttl(budget.key) == -1
    now = datetime.now(UTC)
    budget.set(50, at=now, until_ms=ms(now + timedelta(days=100)))
    assert 100 * 86_400 < budget.redis.ttl(budget.key) <= 101 * 86_400
    budget.set(None, at=now)
    assert TTL_SECONDS - 60 < budget.redis.ttl(budget.key) <= TTL_SECONDS


def test_setting_a_limit_twice_is_setting_it_once(budget: Budget) -> None:
    """The script may be sent again when a connection breaks; a foreign value under the key is replaced."""
    budget.redis.set(budget.key, "foreign")
    budget.set(50)
    once = budget.redis.hgetall(budget.key)
    budget.set(50)
    assert budget.redis.hgetall(budget.key) == once
    assert budget.set(None) == budget.set(None)


def test_limits_that_change_while_fifty_threads_spend_are_never_passed(budget: Budget) -> None:
    """Nobody is let go beyond the limit of that moment, and in the end every nano-dollar is accounted for."""
    highest, lowest = 9_000, 2_000

    def spend(thread: int) -> int:
        charged = 0
        for number in range(8):
            if thread == 0:
                budget.set(lowest if number % 2 else highest, **FOR_GOOD)
                continue
            amount = 37 + thread
            verdict = budget.admit(amount, 5_000)
            if verdict["allowed"]:
                assert int(verdict["left_nano"]) >= amount
                spent, reserved = budget.counted()
                assert spent + reserved <= highest
                budget.settle(amount, amount - number % 3)
                charged += amount - number % 3
        return charged

    with ThreadPoolExecutor(50) as pool:
        total = sum(pool.map(spend, range(50)))
    assert budget.counted() == (total, 0)
    budget.set(total, **FOR_GOOD)
    assert not budget.admit(1)["allowed"]
    budget.set(total + 1, **FOR_GOOD)
    assert budget.admit(1)["allowed"]


CALLS = st.lists(st.tuples(st.integers(0, 400), st.none() | st.integers(0, 400), st.booleans()), max_size=25)
CHANGES = st.lists(st.integers(0, 2000) | st.none(), min_size=25, max_size=25)


@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(0, 2000), calls=CALLS)
def test_counters_equal_a_recount_and_never_pass_the_limit(
    budget: Budget, limit: int, calls: list[tuple[int, int | None, bool]]
) -> None:
    """Whatever the order: spent is the sum of the settled calls, reserved that of the open ones, neither below 0."""
    budget.redis.delete(budget.key)
    spent = reserved = 0
    for amount, cost, settles in calls:
        allowed = budget.admit(amount, limit)["allowed"]
        assert allowed is (amount == 0 or spent + reserved + amount <= limit)
        if allowed:
            reserved += amount
        if allowed and settles:
            charged = amount if cost is None else min(cost, amount)
            budget.settle(amount, None if cost is None else charged)
            spent, reserved = spent + charged, reserved - amount
        assert budget.counted() == (spent, reserved)
        assert spent + reserved <= limit


@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(0, 2000), calls=CALLS, changes=CHANGES)
def test_a_call_is_allowed_by_the_limit_of_its_moment(
    budget: Budget, limit: int, calls: list[tuple[int, int | None, bool]], changes: list[int | None]
) -> None:
    """However the limit moves between calls, counters stay a recount, and nothing goes below 0."""
    budget.redis.delete(budget.key)
    spent = reserved = 0
    for (amount, _, settles), change in zip(calls, changes, strict=False):
        budget.set(change)
        allowed = budget.admit(amount, limit)["allowed"]
        assert allowed is (amount == 0 or spent + reserved + amount <= (limit if change is None else change))
        if allowed and settles:
            budget.settle(amount, amount)
            spent += amount
        elif allowed:
            reserved += amount
        assert budget.counted() == (spent, reserved)


def test_fifty_threads_do_not_overspend_by_a_nano_dollar(budget: Budget) -> None:
    """Each asks, calls and settles at once with the others; the sum of what was charged stays within the limit."""
    limit, calls = 10_000, 8

    def spend(thread: int) -> int:
        charged = 0
        for number in range(calls):
            amount = 37 + thread
            if budget.admit(amount, limit)["allowed"]:
                spent, reserved = budget.counted()
                assert spent + reserved <= limit
                cost = amount - number % 3
                budget.settle(amount, cost)
                charged += cost
        return charged

    with ThreadPoolExecutor(50) as pool:
        total = sum(pool.map(spend, range(50)))
    assert budget.counted() == (total, 0)
    assert limit - 200 < total <= limit


def test_fifty_threads_reserve_no_more_than_the_limit(budget: Budget) -> None:
    """When all ask at once, exactly as many go as there is money for."""
    with ThreadPoolExecutor(50) as pool:
        verdicts = list(pool.map(lambda _: budget.admit(30)["allowed"], range(50)))
    assert sum(verdicts) == 33
    assert budget.counted() == (0, 990)
