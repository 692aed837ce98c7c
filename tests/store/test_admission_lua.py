"""Do ADMIT and SETTLE take all or nothing, and count each call once? On one server and on a cluster."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from attune_worker.budget import Budgets
from attune_worker.jobs import Job
from attune_worker.limits import Limits
from attune_worker.models.admission import Admission
from attune_worker.models.calls import Outcome, Permit, Quote, Refusal, Request
from attune_worker.models.registry import Registry
from attune_worker.providers.rate_headers import Allowance, Observed
from attune_worker.settings import Settings
from attune_worker.store.circuits import Circuits
from attune_worker.store.keys import FleetKeys

Ask = Callable[..., Request]
HAIKU, LUNA, OPUS = "anthropic/claude-haiku-5-5", "openai/gpt-6-luna", "anthropic/claude-opus-5-5"
JOB = Job.parse({"task_type": "summarize", "prompt": "?", "tenant": "acme", "workflow": "review"})
DONE = Outcome("succeeded", "success", 120, Decimal("0.25"), 60, 40)
BROKEN = Outcome("failed", "failure", 30, Decimal(0), 0, error="overloaded")
GIVEN_UP = Outcome("failed", "ignored", 30, Decimal(0), 0, error="cancelled")
UNKNOWN_COST = Outcome("failed", "failure", 30, None, error="timeout")


@pytest.fixture
def limited(settings: Settings) -> Settings:
    """Every rule there is: slots, two rates, a hard and a soft budget."""
    providers = {
        name: one.model_copy(update={"requests_per_minute": 600, "tokens_per_minute": 60_000, "concurrency": 5})
        for name, one in settings.providers.items()
    }
    budgets = [
        {"per": "day", "limit_usd": "10"},
        {"per": "month", "limit_usd": "0.4", "tenant": "*", "hard": False},
        {"per": "day", "limit_usd": "5", "provider": "anthropic"},
    ]
    changed = settings.model_copy(update={"providers": providers})
    return Settings.model_validate({**changed.model_dump(), "budgets": budgets})


@pytest.fixture
def admission(limited: Settings) -> Iterator[Admission]:
    found = Admission(limited)
    yield found
    found.close()


@pytest.fixture
def ask(settings: Settings) -> Ask:
    """Return a function that makes a request for one call to any of the models named."""
    registry = Registry.from_settings(settings)

    def make(*refs: str, worst_usd: str | None = "1", tokens: int = 100, job: Job = JOB) -> Request:
        models = [registry.find(ref)[0] for ref in refs or (HAIKU,)]
        worst = None if worst_usd is None else Decimal(worst_usd)
        return Request(uuid4().hex, "job-1", job, tuple(Quote(model, tokens, worst) for model in models))

    return make


def state(redis: Any, settings: Settings) -> dict[bytes, bytes]:
    """Return every key of the fleet, with what is in it."""
    return {key: redis.dump(key) for key in redis.scan_iter(match=f"{FleetKeys(settings.namespace).tag}*")}


def permit(admission: Admission, request: Request) -> Permit:
    verdict = admission.admit(request)
    assert isinstance(verdict, Permit), verdict
    return verdict


def refusal(admission: Admission, request: Request) -> Refusal:
    verdict = admission.admit(request)
    assert isinstance(verdict, Refusal), verdict
    return verdict


def spent(settings: Settings) -> list[tuple[Decimal, Decimal]]:
    """Return what is spent and reserved of the budgets that have been used."""
    rows = Budgets(settings).status()
    return sorted({(row.spent_usd, row.reserved_usd) for row in rows})


def stats(redis: Any, settings: Settings) -> dict[str, int]:
    """Return the counters of all models together."""
    found: dict[str, int] = {}
    for key in redis.scan_iter(match=f"{FleetKeys(settings.namespace).tag}:stats:*"):
        for name, value in redis.hgetall(key).items():
            short = name.decode().partition("|")[2]
            found[short] = found.get(short, 0) + int(value)
    return found


def in_flight(settings: Settings, provider: str = "anthropic") -> int:
    return Limits(settings).status()[provider].in_flight


def failures(redis: Any, settings: Settings, provider: str = "anthropic") -> bytes | None:
    found: bytes | None = redis.hget(FleetKeys(settings.namespace).circuit(provider, "cheap"), "failures")
    return found


def open_circuit(admission: Admission, ask: Ask, *, worst_usd: str = "0.01") -> None:
    for _ in range(5):
        admission.settle(permit(admission, ask(worst_usd=worst_usd)), BROKEN)


def test_first_candidate_that_everything_allows_is_taken(admission: Admission, ask: Ask, limited: Settings) -> None:
    """In the order asked; one whose circuit is open is passed over, and only the chosen one's provider is charged."""
    assert permit(admission, ask(HAIKU, LUNA)).model.ref == HAIKU
    open_circuit(admission, ask)
    assert permit(admission, ask(HAIKU, LUNA)).model.ref == LUNA
    assert (in_flight(limited, "anthropic"), in_flight(limited, "openai")) == (1, 1)


def test_refusal_writes_nothing(admission: Admission, ask: Ask, redis: Any, limited: Settings) -> None:
    """Not for the candidate that failed at the last rule, nor for those before it."""
    open_circuit(admission, ask)
    before = state(redis, limited)
    by_circuit = refusal(admission, ask(HAIKU))
    assert "circuit is open" in by_circuit.reason
    assert 0 < by_circuit.retry_after_seconds <= 60
    by_budget = refusal(admission, ask(LUNA, OPUS, worst_usd="11"))
    assert by_budget.for_budget
    assert state(redis, limited) == before


def test_passed_over_candidate_is_left_untouched(admission: Admission, ask: Ask, redis: Any, limited: Settings) -> None:
    """Its circuit, limits, slots and budgets are byte for byte what they were."""
    open_circuit(admission, ask)
    keys = FleetKeys(limited.namespace)
    theirs = [keys.circuit("anthropic", "cheap"), keys.limits("anthropic"), keys.slots("anthropic")]
    before = [redis.dump(key) for key in [*theirs, keys.budget(None, None, "anthropic", "day")]]
    assert permit(admission, ask(HAIKU, LUNA)).model.ref == LUNA
    assert [redis.dump(key) for key in [*theirs, keys.budget(None, None, "anthropic", "day")]] == before


def test_admit_twice_takes_once(admission: Admission, ask: Ask, redis: Any, limited: Settings) -> None:
    """A request that is sent again after a broken connection gets the same answer, and changes nothing."""
    request = ask(HAIKU, LUNA)
    first = permit(admission, request)
    before = state(redis, limited)
    again = permit(admission, request)
    assert again.quote == first.quote
    assert state(redis, limited) == before


def test_admit_after_its_settlement_takes_nothing(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """A request that was stuck in the network arrives after everything is over."""
    request = ask()
    admission.settle(permit(admission, request), DONE)
    before = state(redis, limited)
    admission.admit(request)
    assert state(redis, limited) == before


@pytest.mark.parametrize("outcome", [DONE, BROKEN, UNKNOWN_COST, Outcome.released()])
def test_settling_twice_counts_once(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, outcome: Outcome
) -> None:
    """Not a byte of breaker, limits, budgets and telemetry differs after the second."""
    taken = permit(admission, ask())
    admission.settle(taken, outcome)
    before = state(redis, limited)
    admission.settle(taken, outcome)
    admission.settle(taken, DONE)
    assert state(redis, limited) == before


def test_success_is_counted_everywhere(admission: Admission, ask: Ask, redis: Any, limited: Settings) -> None:
    """Each part of SETTLE has done its work."""
    taken = permit(admission, ask())
    assert (spent(limited), in_flight(limited)) == ([(Decimal(0), Decimal(1))], 1)
    admission.settle(taken, DONE)
    assert (spent(limited), in_flight(limited)) == ([(Decimal("0.25"), Decimal(0))], 0)
    counted = stats(redis, limited)
    assert (counted["calls"], counted["succeeded"], counted["cost_nano"]) == (1, 1, 250_000_000)
    assert redis.zcard(FleetKeys(limited.namespace).calls) == 0


def test_unknown_cost_keeps_the_reservation_as_spent(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """The provider may charge for it, so a hard budget counts the worst case."""
    admission.settle(permit(admission, ask()), UNKNOWN_COST)
    assert spent(limited) == [(Decimal(1), Decimal(0))]
    assert stats(redis, limited)["unpriced"] == 1


def test_released_gives_everything_back(admission: Admission, ask: Ask, redis: Any, limited: Settings) -> None:
    """A call that was never made leaves no trace in budgets, limits, breaker and telemetry."""
    admission.settle(permit(admission, ask()), Outcome.released())
    assert spent(limited) == [(Decimal(0), Decimal(0))]
    status = Limits(limited).status()["anthropic"]
    assert status.requests is not None
    assert status.tokens is not None
    full = Limits(limited).status()["openai"]
    assert (status.in_flight, status.requests, status.tokens) == (0, full.requests, full.tokens)
    assert stats(redis, limited) == {}
    assert failures(redis, limited) is None


def test_released_without_an_intent_gives_nothing_back(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """What was not taken cannot come back; and an ADMIT that arrives only then takes nothing."""
    for _ in range(3):
        permit(admission, ask())
    request = ask()
    limits = FleetKeys(limited.namespace).limits("anthropic")
    before = redis.hgetall(limits)
    admission.settle(Permit(request.call_id, JOB, request.quotes[0], (), 0), Outcome.released())
    admission.admit(request)
    assert redis.hgetall(limits) == before
    assert in_flight(limited) == 3


def test_release_names_the_model_that_was_taken(admission: Admission, ask: Ask, limited: Settings) -> None:
    """Where leave was given for another candidate, nothing is done, so that whoever does not know can ask for each."""
    request = ask(LUNA, HAIKU)
    taken = permit(admission, request)
    assert taken.model.ref == LUNA
    admission.settle(replace(taken, quote=request.quotes[1]), Outcome.released())
    assert in_flight(limited, "openai") == 1
    admission.settle(taken, Outcome.released())
    assert in_flight(limited, "openai") == 0


def test_settlement_after_its_intent_is_gone_is_charged_in_full(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """A key may be evicted, or Redis was away at ADMIT: cost and telemetry count all the same, and once."""
    taken = permit(admission, ask())
    keys = FleetKeys(limited.namespace)
    redis.delete(keys.call(taken.call_id), keys.slots("anthropic"), keys.calls)
    for _ in range(2):
        admission.settle(taken, DONE)
    assert [total for total, _ in spent(limited)] == [Decimal("0.25")]
    assert stats(redis, limited)["calls"] == 1
    never_asked = replace(taken, call_id=uuid4().hex)
    admission.settle(never_asked, UNKNOWN_COST)
    assert [total for total, _ in spent(limited)] == [Decimal("1.25")]
    assert failures(redis, limited) == b"1"


def settle_late(admission: Admission, taken: Permit, outcome: Outcome, seconds: float) -> None:
    """Write a settlement of a call that ended so long ago, as the backlog does after an outage."""
    keys, (text, record) = admission._settle_wire.settle(taken, outcome, round(time.time() * 1000))
    told = json.loads(text)
    admission._write((keys, (json.dumps({**told, "ended_ms": told["ended_ms"] - round(seconds * 1000)}), record)))


def never_asked(request: Request) -> Permit:
    """Return leave that a process gave itself while Redis was away."""
    return Permit(request.call_id, request.job, request.quotes[0], (), 0)


@pytest.mark.parametrize(("seconds", "state_after"), [(0.5, b"open"), (3.0, b"open"), (7.0, None)])
def test_failures_of_an_outage_that_is_over_open_no_circuit(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, seconds: float, state_after: bytes | None
) -> None:
    """Of calls made without Redis, what is older than five seconds says nothing of now; it is counted all the same."""
    for _ in range(5):
        settle_late(admission, never_asked(ask()), BROKEN, seconds)
    keys = FleetKeys(limited.namespace)
    assert redis.hget(keys.circuit("anthropic", "cheap"), "state") == state_after
    assert redis.scard(keys.circuits) == (0 if state_after is None else 1)
    assert stats(redis, limited)["calls"] == 5


def test_old_success_clears_no_new_failures(admission: Admission, ask: Ask, redis: Any, limited: Settings) -> None:
    """The provider was well then; that it is in trouble now is known better."""
    for _ in range(4):
        admission.settle(permit(admission, ask()), BROKEN)
    settle_late(admission, never_asked(ask()), DONE, 60)
    assert failures(redis, limited) == b"4"


def test_late_result_of_a_probe_still_frees_its_circuit(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """It was asked for, and nobody else may try before it is there."""
    Circuits(limited, limited.breaker).open(("anthropic", "cheap"), 600_000)
    circuit = FleetKeys(limited.namespace).circuit("anthropic", "cheap")
    redis.hset(circuit, "retry_ms", 1)  # that much later
    settle_late(admission, permit(admission, ask()), DONE, 60)
    assert redis.hget(circuit, "state") == b"closed"


@pytest.mark.parametrize(("late_seconds", "left_seconds"), [(0, 30), (4, 26), (20, 10), (31, 0)])
def test_wait_that_the_provider_asked_for_runs_from_the_end_of_the_call(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, late_seconds: float, left_seconds: float
) -> None:
    """Not from when it was written: the outage was part of the wait."""
    outcome = Outcome("failed", "ignored", 30, Decimal(0), 0, error="rate_limited", retry_after=30, rate_limited=True)
    taken, before = permit(admission, ask()), time.time()
    settle_late(admission, taken, outcome, late_seconds)
    after = time.time()
    keys = FleetKeys(limited.namespace)
    until_ms = redis.hget(keys.limits("anthropic", "claude-haiku-5-5"), "cooldown_ms")
    assert (until_ms is None) == (left_seconds == 0)
    if until_ms is not None:  # clocks are read to the millisecond
        assert before + left_seconds - 0.05 < int(until_ms) / 1000 < after + left_seconds + 0.05


@pytest.mark.parametrize(("seconds", "open_seconds"), [(3.0, 597), (400.0, None)])
def test_open_time_that_the_provider_asked_for_runs_from_then_as_well(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, seconds: float, open_seconds: float | None
) -> None:
    """A circuit that opens by a late failure is not held for longer than the provider wanted."""
    taken = [permit(admission, ask(worst_usd="0.01")) for _ in range(5)]
    for one in taken:
        settle_late(admission, one, replace(BROKEN, retry_after=seconds + (open_seconds or -100)), seconds)
    found = redis.hmget(FleetKeys(limited.namespace).circuit("anthropic", "cheap"), "opened_ms", "retry_ms")
    opened_ms, retry_ms = (int(text) for text in found)
    expected = open_seconds or limited.breaker.recovery_timeout_seconds
    assert expected - 30 < (retry_ms - opened_ms) / 1000 <= expected + 0.05  # clocks are read to the millisecond


@pytest.mark.parametrize(("seconds", "learned"), [(0, b"50"), (7, None)])
def test_old_headers_teach_nothing(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, seconds: float, learned: bytes | None
) -> None:
    """What was left then, others may have used since, and the reset is over."""
    observed = Observed(requests=Allowance(limit=50, remaining=0, reset_ms=20_000))
    settle_late(admission, permit(admission, ask()), replace(DONE, observed=observed), seconds)
    found = redis.hmget(
        FleetKeys(limited.namespace).limits("anthropic", "claude-haiku-5-5"), "requests_limit", "paused_ms"
    )
    assert (found[0], found[1] is None) == (learned, learned is None)


def test_settlement_after_its_lease_has_run_out_still_counts(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """Its slot has gone to another call, which keeps it; the money was spent."""
    slow = permit(admission, ask())
    slots = FleetKeys(limited.namespace).slots("anthropic")
    redis.zadd(slots, {slow.call_id: 1})  # its lease ended long ago
    permit(admission, ask())
    assert in_flight(limited) == 1
    admission.settle(slow, DONE)
    assert in_flight(limited) == 1
    assert stats(redis, limited)["calls"] == 1
    assert spent(limited)[-1] == (Decimal("0.25"), Decimal(1))


def test_budget_of_the_candidate_that_bills_is_the_one_charged(
    admission: Admission, ask: Ask, limited: Settings
) -> None:
    """Anthropic's own budget has room for five dollars, so the sixth goes to OpenAI, and is charged there alone."""
    for _ in range(5):
        assert permit(admission, ask(HAIKU, LUNA)).model.ref == HAIKU
    assert permit(admission, ask(HAIKU, LUNA)).model.ref == LUNA
    by_provider = {row.provider: row.reserved_usd for row in Budgets(limited).status() if row.hard}
    assert by_provider == {"anthropic": Decimal(5), None: Decimal(6)}


def test_exhausted_budgets_say_what_is_left_and_until_when(admission: Admission, ask: Ask) -> None:
    """The one that a person has to raise is named, in dollars and UTC."""
    admission.settle(permit(admission, ask(LUNA, worst_usd="9.5")), replace(DONE, cost_usd=Decimal("9.5")))
    refused = refusal(admission, ask(LUNA, HAIKU))
    assert refused.for_budget
    assert "per day has $0.500000000 left and this job needs up to $1 on openai/gpt-6-luna" in refused.reason
    assert "UTC" in refused.reason
    assert 0 < refused.retry_after_seconds <= 86_400


def test_unknown_price_is_refused_by_a_hard_budget(admission: Admission, ask: Ask) -> None:
    """Nobody could say that it stays within it."""
    refused = refusal(admission, ask(worst_usd=None))
    assert refused.for_budget
    assert "is unknown, and the hard budget per day allows no such call" in refused.reason
    assert refused.retry_after_seconds == 0


def test_soft_budget_warns_once_in_its_window(admission: Admission, ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    """However many calls go over it."""
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            admission.settle(permit(admission, ask()), DONE)
    [warning] = [record.message for record in caplog.records]
    assert warning.startswith("soft budget ")
    assert "acme" in warning


def test_crowd_never_reserves_more_than_there_is(admission: Admission, ask: Ask, limited: Settings) -> None:
    """Fifty threads for a budget of ten dollars: ten get leave for one each, whatever the order."""
    with ThreadPoolExecutor(50) as threads:
        unlimited = [ask(LUNA, tokens=1) for _ in range(50)]
        verdicts = list(threads.map(admission.admit, unlimited))
    assert sum(isinstance(verdict, Permit) for verdict in verdicts) == 5  # its slots
    for verdict in verdicts:
        if isinstance(verdict, Permit):
            admission.settle(verdict, replace(DONE, cost_usd=Decimal(1)))
    with ThreadPoolExecutor(50) as threads:
        unsettled = threads.map(admission.admit, [ask(LUNA, HAIKU, tokens=1) for _ in range(50)])
    assert sum(isinstance(verdict, Permit) for verdict in unsettled) == 5
    [(total, reserved)] = {(row.spent_usd, row.reserved_usd) for row in Budgets(limited).status() if not row.provider}
    assert total + reserved == 10


@pytest.mark.parametrize("garbage", ["string", "hash", "list"])
def test_foreign_values_under_every_key_count_as_missing(
    admission: Admission,
    ask: Ask,
    redis: Any,
    limited: Settings,
    caplog: pytest.LogCaptureFixture,
    garbage: str,
) -> None:
    """Whoever wrote there: calls go on, settlements count, and the next ones find everything in order."""
    taken = permit(admission, ask())
    admission.settle(permit(admission, ask()), DONE)

    def spoil() -> None:
        for key in state(redis, limited):
            fields = [*redis.hkeys(key), b"other"] if redis.type(key) == b"hash" else [b"state", b"n"]
            redis.delete(key)
            if garbage == "hash":
                redis.hset(key, mapping=dict.fromkeys(fields, b"\xff{garbage"))
            elif garbage == "list":
                redis.rpush(key, b"x")
            else:
                redis.set(key, b"garbage")

    spoil()
    admission.settle(taken, DONE)
    assert stats_of_calls(redis, limited) == 1
    spoil()
    again = permit(admission, ask())
    admission.settle(again, DONE)
    admission.settle(permit(admission, ask()), DONE)
    assert stats_of_calls(redis, limited) == 2
    assert in_flight(limited) == 0
    assert spent(limited)[-1] == (Decimal("0.5"), Decimal(0))
    assert "could not be settled" not in caplog.text


def stats_of_calls(redis: Any, settings: Settings) -> int:
    """Return how many calls are counted, where other fields may hold anything."""
    [key] = redis.scan_iter(match=f"{FleetKeys(settings.namespace).tag}:stats:*")
    return int(redis.hget(key, f"{HAIKU}|calls"))


@pytest.mark.parametrize("windows", [b"5", b"null", b'[1,{},"x"]', b"[", b'{"1":"2026"}'])
def test_garbled_intent_is_no_excuse_not_to_charge(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, windows: bytes
) -> None:
    """A window that is none is the current one."""
    taken = permit(admission, ask())
    redis.hset(FleetKeys(limited.namespace).call(taken.call_id), "windows", windows)
    admission.settle(taken, DONE)
    assert {total for total, _ in spent(limited)} == {Decimal("0.25")}


@pytest.mark.parametrize("place", ["99", "-1", "x", "nan"])
def test_garbled_place_leads_to_no_other_candidate(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, place: str
) -> None:
    """A call that was asked for again is answered with one of those that were offered."""
    request = ask(HAIKU, LUNA)
    taken = permit(admission, request)
    redis.hset(FleetKeys(limited.namespace).call(taken.call_id), "place", place)
    assert permit(admission, request).quote == request.quotes[0]


@pytest.mark.parametrize(("outcome", "state_after"), [(DONE, b"closed"), (BROKEN, b"open"), (GIVEN_UP, b"half_open")])
def test_call_that_probes_the_providers_own_circuit_settles_it(
    admission: Admission, ask: Ask, redis: Any, limited: Settings, outcome: Outcome, state_after: bytes
) -> None:
    """After an operator's trip one call for all tiers finds out; a probe that says nothing makes way for the next."""
    Circuits(limited, limited.breaker).open(("anthropic", None), 600_000)
    assert isinstance(admission.admit(ask()), Refusal)
    whole = FleetKeys(limited.namespace).circuit("anthropic", None)
    redis.hset(whole, "retry_ms", 1)  # that much later
    probe = permit(admission, ask(worst_usd="0.01"))
    assert "probes it" in refusal(admission, ask(OPUS, worst_usd="0.01")).reason
    admission.settle(probe, outcome)
    assert redis.hget(whole, "state") == state_after
    assert isinstance(admission.admit(ask(OPUS, worst_usd="0.01")), Permit) is (state_after != b"open")


def test_names_cannot_collide(admission: Admission, ask: Ask, limited: Settings, redis: Any) -> None:
    """Colons, braces, stars, spaces and 200 characters: each tenant, workflow and stage is its own."""
    names = ["a", "a:b", "a:*", "*", "{a}", "a b", "%2A", "~", "b" * 199, "b" * 200, "ä", "a\n"]
    for name in names:
        job = Job.parse({"task_type": "x", "prompt": "?", "tenant": name, "workflow": name, "stage": name})
        admission.settle(permit(admission, ask(worst_usd="0.01", job=job)), replace(DONE, cost_usd=Decimal("0.01")))
    tenants = [row for row in Budgets(limited).status() if row.tenant is not None]
    assert [row.spent_usd for row in tenants] == [Decimal("0.01")] * len(names)
    tag = FleetKeys(limited.namespace).tag
    assert len(list(redis.scan_iter(match=f"{tag}:stats:*"))) == len(names)


def test_every_key_but_the_index_of_open_calls_ends_by_itself(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """Redis does not fill up with what nobody asks for any more; only what a call has reserved waits for its end."""
    open_circuit(admission, ask)
    taken, keys = permit(admission, ask(LUNA)), FleetKeys(limited.namespace)
    endless = {keys.calls.encode(), keys.call(taken.call_id).encode()}
    assert {key for key in state(redis, limited) if redis.ttl(key) < 0} == endless
    admission.settle(taken, DONE)
    assert {key for key in state(redis, limited) if redis.ttl(key) < 0} <= endless - {keys.call(taken.call_id).encode()}


@pytest.mark.parametrize(("retention_seconds", "kept_seconds"), [(1, 600), (100_000, 100_000)])
def test_settled_call_is_known_for_ten_minutes_at_least(
    settings: Settings, ask: Ask, redis: Any, retention_seconds: int, kept_seconds: int
) -> None:
    """However short results are kept: a settlement that arrives again after an outage counts once."""
    admission = Admission(settings.model_copy(update={"retention_seconds": retention_seconds}))
    taken, keys = permit(admission, ask()), FleetKeys(settings.namespace)
    assert redis.ttl(keys.job_calls("job-1")) >= 63 * 86_400 - 60
    admission.settle(taken, DONE)
    for key in (keys.call(taken.call_id), keys.job_calls("job-1")):
        assert kept_seconds - 60 < redis.ttl(key) <= kept_seconds
    admission.close()


@pytest.mark.parametrize(("ago_seconds", "counted"), [(500, 1), (700, 0)])
def test_settlement_of_a_call_that_is_forgotten_counts_once(
    settings: Settings, ask: Ask, redis: Any, ago_seconds: int, counted: int
) -> None:
    """What was settled and has gone since is known by its age; younger, its intent was lost and it still counts."""
    admission, keys = Admission(settings.model_copy(update={"retention_seconds": 1})), FleetKeys(settings.namespace)
    taken = permit(admission, ask())
    taken = replace(taken, admitted_ms=taken.admitted_ms - ago_seconds * 1000)
    redis.delete(keys.call(taken.call_id))
    admission.settle(taken, DONE)
    assert redis.xlen(keys.ledger) == counted
    admission.close()


def test_list_of_a_jobs_calls_outlives_the_one_that_is_open(
    admission: Admission, ask: Ask, redis: Any, limited: Settings
) -> None:
    """A call of an earlier start that is settled late does not shorten it for the one under way."""
    first, last = permit(admission, ask()), permit(admission, ask())
    job_calls = FleetKeys(limited.namespace).job_calls("job-1")
    admission.settle(first, DONE)
    assert redis.ttl(job_calls) > 10 * limited.retention_seconds
    admission.settle(last, DONE)
    assert redis.ttl(job_calls) <= limited.retention_seconds
    assert [one.decode() for one in redis.lrange(job_calls, 0, -1)] == [first.call_id, last.call_id]


def test_scripts_that_redis_forgot_are_sent_again(settings: Settings, ask: Ask, redis: Any) -> None:
    """SCRIPT FLUSH in the middle of traffic costs nothing."""
    admission = Admission(settings)
    stop = threading.Event()

    def flush() -> None:
        while not stop.wait(0.005):
            redis.script_flush()

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        for _ in range(30):
            admission.settle(permit(admission, ask()), DONE)
    finally:
        stop.set()
        thread.join()
        admission.close()
    assert stats(redis, settings)["calls"] == 30
