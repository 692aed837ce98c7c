"""What do people read of the ledger? Records, and the sums of days, whatever else stands in their keys."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import OverloadedError, ServiceUnavailableError
from attune_worker.ledger import Ledger
from attune_worker.ledger_record import LedgerRecord
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys, part
from tests.conftest import API_KEY

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
RECORD = {
    "call": "call-1",
    "job": "job-1",
    "workflow": "review",
    "stage": "summarize",
    "provider": "anthropic",
    "model": "claude-haiku-5-5",
    "tier": "cheap",
    "mode": "api",
    "outcome": "succeeded",
    "admitted_ms": round(NOON.timestamp() * 1000),
    "cost_nano": 250_000_000,
    "estimate_nano": 1_000_000_000,
    "input": 60,
    "output": 40,
    "latency_ms": 120,
}


@pytest.fixture
def ledger(settings: Settings, redis: Redis) -> Ledger:
    return Ledger(settings, redis)


@pytest.fixture
def executor(settings: Settings) -> Iterator[EmpathyLLMExecutor]:
    with EmpathyLLMExecutor(settings) as found:
        yield found


@pytest.fixture
def write(settings: Settings, redis: Redis) -> Callable[..., None]:
    """Return a function that puts an entry into the ledger, at a time of its own."""
    key = FleetKeys(settings.namespace).ledger

    def entry(at: datetime | None = None, fields: dict[str, Any] | None = None, **changes: Any) -> None:
        told = {name: value for name, value in {**RECORD, **changes}.items() if value is not None}
        entry_id = "*" if at is None else f"{round(at.timestamp() * 1000)}-0"
        redis.xadd(key, {"record": json.dumps(told)} if fields is None else fields, id=entry_id)
        redis.expire(key, 600)

    return entry


@pytest.fixture
def count(settings: Settings, redis: Redis) -> Callable[..., None]:
    """Return a function that sets the sums of a group, so many days ago."""
    keys = FleetKeys(settings.namespace)

    def sums(days_ago: int, names: tuple[str | None, ...], **counters: int) -> None:
        key = keys.costs(f"{datetime.now(UTC) - timedelta(days=days_ago):%Y%m%d}")
        group = ":".join(map(part, names))
        redis.hset(key, mapping={f"{group}|{name}": value for name, value in counters.items()})
        redis.expire(key, 600)

    return sums


def names(tenant: str | None = "acme", workflow: str = "review", model: str = "haiku") -> tuple[str | None, ...]:
    return tenant, workflow, "anthropic", model, "cheap", "api"


def test_bill_of_a_real_day_is_the_providers(
    executor: EmpathyLLMExecutor, ledger: Ledger, simulator: Simulator
) -> None:
    """Two models, one of which refuses every call: records and sums come to the invoice, to the nano-dollar."""
    simulator.profile = Profile.parse(
        {"api_keys": [API_KEY], "models": {"claude-haiku-5-5": {"errors": {"overloaded": 1}}}}
    )
    for number in range(5):
        executor.run("summarize", "word " * number + "?", model="gpt-6-luna", tenant="acme")
    with pytest.raises(OverloadedError):
        executor.run("summarize", "?", model="claude-haiku-5-5")
    bill = Decimal(simulator.invoice(summary=True)["total_usd"])
    records = list(ledger.records())
    assert sum(record.cost_usd for record in records) == bill > 0
    assert {record.error for record in records if record.model_id == "claude-haiku-5-5"} == {"overloaded"}
    luna, haiku = ledger.report(1, ["tenant", "model"])[::-1]
    assert (luna.keys, luna.calls, luna.cost_usd) == ({"tenant": "acme", "model": "gpt-6-luna"}, 5, bill)
    assert (haiku.keys, haiku.cost_usd, haiku.unknown_calls) == ({"tenant": None, "model": "claude-haiku-5-5"}, 0, 0)
    assert luna.input_tokens == sum(record.input_tokens for record in records if record.tenant == "acme")


def test_nothing_that_was_said_is_in_the_ledger(
    executor: EmpathyLLMExecutor, settings: Settings, redis: Redis, simulator: Simulator
) -> None:
    """No prompt, no system prompt, no answer, no user, no session, no key, nor in what is kept of the call."""
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": 0})
    answer = executor.run("summarize", "a secret prompt", system="a secret rule", user_id="alice", session_id="tea")
    keys = FleetKeys(settings.namespace)
    [call] = redis.scan_iter(match=f"{keys.tag}:call:*")
    written = repr(redis.xrange(keys.ledger)) + repr(redis.hgetall(call))
    assert answer.attempts[0].call_id in written
    for secret in ("secret", "alice", "tea", API_KEY, answer.content):
        assert secret not in written


def test_records_of_a_time(ledger: Ledger, write: Callable[..., None]) -> None:
    """From the first moment on, up to the last, which is left out; fractions of a millisecond included."""
    for minute in range(4):
        write(NOON + timedelta(minutes=minute), call=f"call-{minute}")

    def between(since: datetime | None, until: datetime | None) -> list[str]:
        return [record.call_id for record in ledger.records(since, until)]

    one, three = NOON + timedelta(minutes=1), NOON + timedelta(minutes=3)
    assert between(None, None) == ["call-0", "call-1", "call-2", "call-3"]
    assert between(one, three) == ["call-1", "call-2"]
    assert between(one + timedelta(microseconds=1), three + timedelta(microseconds=1)) == ["call-2", "call-3"]
    assert between(None, NOON) == between(three + timedelta(minutes=1), None) == []
    assert between(datetime(1969, 1, 1, tzinfo=UTC), one) == ["call-0"]


def test_long_ledgers_are_read_in_pages(ledger: Ledger, redis: Redis, settings: Settings) -> None:
    """Each record once, in order, also where many were written in one millisecond."""
    key = FleetKeys(settings.namespace).ledger
    with redis.pipeline() as pipeline:
        for number in range(2500):
            pipeline.xadd(
                key, {"record": json.dumps({**RECORD, "call": str(number)})}, id=f"{1000 + number // 700}-{number}"
            )
        pipeline.expire(key, 600)
        pipeline.execute()
    assert [record.call_id for record in ledger.records()] == [str(number) for number in range(2500)]


@pytest.mark.parametrize(
    "garbage",
    [
        {"x": "y"},
        {"record": ""},
        {"record": "[]"},
        {"record": "[" * 100_000},
        {"record": "{"},
        {"record": b"\xff"},
        *(
            {"record": json.dumps({**RECORD, **wrong})}
            for wrong in (
                {"call": 1},
                {"outcome": "lost"},
                {"cost_nano": "1"},
                {"cost_nano": 0.5},
                {"cost_nano": -1},
                {"input": True},
                {"admitted_ms": None},
                {"admitted_ms": 10**30},
                {"tenant": None},
                {"error": 5},
            )
        ),
    ],
)
def test_what_is_no_record_is_passed_over(
    ledger: Ledger, write: Callable[..., None], caplog: pytest.LogCaptureFixture, garbage: dict[str, Any]
) -> None:
    """Counted and said once; the records around it are all there."""
    write()
    write(fields=garbage)
    write()
    with caplog.at_level(logging.WARNING):
        assert len(list(ledger.records())) == 2
    assert (ledger.skipped, [one.message for one in caplog.records]) == (1, ["1 entries of the ledger are no records"])


def test_foreign_keys_count_as_empty(ledger: Ledger, settings: Settings, redis: Redis) -> None:
    """Somebody else's values under our names are no reason to fail; they are counted."""
    keys = FleetKeys(settings.namespace)
    redis.set(keys.ledger, "foreign", ex=600)
    redis.set(keys.costs(f"{datetime.now(UTC):%Y%m%d}"), "foreign", ex=600)
    assert list(ledger.records()) == []
    assert ledger.report(1)[0].calls == 0
    assert ledger.skipped == 2


def test_record_without_what_is_not_known(write: Callable[..., None], ledger: Ledger) -> None:
    """Unknown stays unknown: it is neither nothing nor nought."""
    write(cost_nano=None, input=None, output=None, latency_ms=None, outcome="orphaned")
    [record] = ledger.records()
    assert isinstance(record, LedgerRecord)
    assert (record.cost_usd, record.input_tokens, record.latency_ms, record.tenant) == (None, None, None, None)
    assert (record.uncertain, record.estimate_usd, record.time) == (True, Decimal(1), NOON)


def test_report_adds_up_what_it_is_asked_for(ledger: Ledger, count: Callable[..., None]) -> None:
    """By any of the names, over the days that are asked for and no others."""
    count(0, names(), calls=3, cost_nano=1_500_000_001, unknown=1, unknown_nano=7, input=30, output=9)
    count(1, names(), calls=2, cost_nano=1, orphaned=1, orphaned_nano=5, unpriced=1)
    count(1, names(tenant=None, model="luna"), calls=1, cost_nano=2)
    count(2, names(), calls=100)
    [total] = ledger.report(2)
    assert (total.keys, total.calls, total.cost_usd) == ({}, 6, Decimal("1.500000004"))
    assert (total.unknown_calls, total.unknown_usd) == (1, Decimal("0.000000007"))
    assert (total.orphaned_calls, total.orphaned_usd, total.unpriced_calls) == (1, Decimal("0.000000005"), 1)
    assert (total.input_tokens, total.output_tokens) == (30, 9)
    by_tenant = [(row.keys["tenant"], row.calls) for row in ledger.report(2, ["tenant"])]
    assert by_tenant == [(None, 1), ("acme", 5)]
    by_day = [(row.keys, row.calls) for row in ledger.report(2, ["day", "model"])]
    today = datetime.now(UTC)
    assert by_day == [
        ({"day": f"{today - timedelta(days=1):%Y-%m-%d}", "model": "haiku"}, 2),
        ({"day": f"{today - timedelta(days=1):%Y-%m-%d}", "model": "luna"}, 1),
        ({"day": f"{today:%Y-%m-%d}", "model": "haiku"}, 3),
    ]
    assert ledger.report(3)[0].calls == 106


def test_names_come_back_as_they_were(ledger: Ledger, count: Callable[..., None]) -> None:
    """Colons, bars, stars and umlauts too; a very long one stays the hash that stands for it."""
    odd = ["a:b", "a|b", "*", "%2A", "ä", "~other", "a b"]
    for name in odd:
        count(0, names(tenant=name), calls=1)
    count(0, names(tenant="x" * 200), calls=1)
    found = {row.keys["tenant"] for row in ledger.report(1, ["tenant"])}
    assert found == {*odd, part("x" * 200)}


def test_groups_beyond_the_limit_have_a_row_of_their_own(
    ledger: Ledger, count: Callable[..., None], redis: Redis, settings: Settings
) -> None:
    """And what is no group at all is in none."""
    count(0, names(), calls=1)
    key = FleetKeys(settings.namespace).costs(f"{datetime.now(UTC):%Y%m%d}")
    redis.hset(key, mapping={"~other|calls": 5, "groups": 1, "a:b|calls": 9, "x": "y", b"\xff|calls": 1})
    redis.hset(key, ":".join(["a"] * 6) + "|calls", "garbage")
    rows = {row.keys["tenant"]: row.calls for row in ledger.report(1, ["tenant"])}
    assert rows == {"acme": 1, "~other": 5, "a": 0}


@pytest.mark.parametrize(("days", "by"), [(0, []), (-1, []), (1, ["tenent"]), (1, ["stage"])])
def test_report_says_what_it_can_group_by(ledger: Ledger, days: int, by: list[str]) -> None:
    """Instead of an empty answer."""
    with pytest.raises(ValueError, match="grouped by day, tenant, workflow, provider, model, tier, mode, over 1 day"):
        ledger.report(days, by)


def test_redis_away_is_said(settings: Settings) -> None:
    """As everywhere: with the address, and without a password."""
    ledger = Ledger(Settings.model_validate({**settings.model_dump(), "redis_url": "redis://127.0.0.1:1"}))
    with pytest.raises(ServiceUnavailableError):
        ledger.report(1)
    with pytest.raises(ServiceUnavailableError):
        next(ledger.records())
