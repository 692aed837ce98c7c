"""What becomes of calls whose worker died? Real executors, one of them killed, and the provider's own invoice."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis

from attune_worker.budget import Budgets
from attune_worker.errors import StoppedError
from attune_worker.interruption import Interruption
from attune_worker.invoices import lines_of
from attune_worker.jobs import Attempt, Job
from attune_worker.ledger import Ledger
from attune_worker.limits import Limits
from attune_worker.models.admission import Admission
from attune_worker.models.calls import Outcome, Permit, Quote, Refusal, Request
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.models.orphans import Orphans
from attune_worker.models.registry import Registry
from attune_worker.reconcile import reconcile
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys
from tests.conftest import API_KEY, process_environ

Until = Callable[[Callable[[], Any]], Any]
LEASE = "host:1:0badcafe"
LUNA = Job.parse({"task_type": "summarize", "prompt": "a prompt", "model": "gpt-6-luna", "max_tokens": 50})
FOR_EVER_MS = 2**45


@pytest.fixture
def keys(settings: Settings) -> FleetKeys:
    return FleetKeys(settings.namespace)


@pytest.fixture(autouse=True)
def _living(redis: Redis, keys: FleetKeys) -> None:
    """The worker of ``LEASE`` lives."""
    redis.zadd(keys.workers, {LEASE: FOR_EVER_MS})


@pytest.fixture
def orphans(settings: Settings) -> Iterator[Orphans]:
    found = Orphans(settings)
    yield found
    found.close()


@pytest.fixture
def executor(settings: Settings) -> Iterator[EmpathyLLMExecutor]:
    with EmpathyLLMExecutor(settings) as found:
        yield found


@pytest.fixture
def admission(settings: Settings) -> Iterator[Admission]:
    found = Admission(settings)
    yield found
    found.close()


@pytest.fixture
def ask(settings: Settings) -> Callable[..., Request]:
    """Return a function that makes a request for one call."""
    [model, *_] = Registry.from_settings(settings).find("openai/gpt-6-luna")

    def make(lease: str = LEASE, job_id: str = "job-1") -> Request:
        return Request(uuid4().hex, job_id, LUNA, (Quote(model, 100, Decimal("0.01")),), lease)

    return make


def permit(admission: Admission, request: Request) -> Permit:
    verdict = admission.admit(request)
    assert isinstance(verdict, Permit), verdict
    return verdict


def behave(simulator: Simulator, **profile: Any) -> None:
    simulator.profile = Profile.parse({"api_keys": [API_KEY], **profile})


def undecided(attempts: tuple[Attempt, ...]) -> list[Attempt]:
    """Return attempts without how their models were chosen, which Redis does not know."""
    return [attempt.model_copy(update={"decision": None}) for attempt in attempts]


@pytest.mark.parametrize("ends_ms", [None, 1])
def test_no_call_begins_under_a_lost_lease(
    admission: Admission, ask: Callable[..., Request], redis: Redis, keys: FleetKeys, ends_ms: int | None
) -> None:
    """Gone or past: the worker is told to ask again shortly, and nothing is written."""
    redis.delete(keys.workers)
    redis.zadd(keys.workers, {LEASE: ends_ms} if ends_ms else {"another": FOR_EVER_MS})
    refused = admission.admit(ask())
    assert isinstance(refused, Refusal)
    assert "the lease of its worker is lost" in refused.reason
    assert (refused.retry_after_seconds, refused.for_budget) == (0.5, False)
    assert not redis.exists(keys.calls, keys.job_calls("job-1"), keys.slots("openai"))
    assert isinstance(admission.admit(ask(lease="")), Permit)  # no worker's call


def test_no_call_of_a_job_begins_while_redis_is_away(settings: Settings, ask: Callable[..., Request]) -> None:
    """Nobody would know of it if its worker died; a program's own call goes by what its process knows."""
    nowhere = Settings.model_validate({**settings.model_dump(), "redis_url": "redis://127.0.0.1:1"})
    admission = Admission(nowhere)
    refused = admission.admit(ask())
    assert isinstance(refused, Refusal)
    assert "no call of a job is begun" in refused.reason
    assert isinstance(admission.admit(ask(lease="")), Permit)
    admission.close()


def test_calls_of_a_job_are_listed_in_order(
    admission: Admission, ask: Callable[..., Request], redis: Redis, keys: FleetKeys
) -> None:
    """Each once; calls without a job are in no list."""
    requests = [ask(), ask(), ask(job_id="")]
    for request in (*requests, requests[0]):
        permit(admission, request)
    ids = [member.decode() for member in redis.lrange(keys.job_calls("job-1"), 0, -1)]
    assert ids == [request.call_id for request in requests[:2]]
    assert not redis.exists(keys.job_calls(""))


def test_history_of_a_job_is_what_its_worker_knew(
    executor: EmpathyLLMExecutor, orphans: Orphans, simulator: Simulator
) -> None:
    """Failures, costs and the provider's ids, as in the answer that the worker had in hand."""
    behave(simulator, errors={"overloaded": 0.5}, seed=3)
    response = executor.execute(LUNA, job_id="job-1", lease=LEASE)
    assert len(response.attempts) > 1, "the seed should make the first call fail"
    assert list(orphans.of_job("job-1", LEASE)) == undecided(response.attempts)
    assert orphans.of_job("job-2", LEASE) == ()


def test_calls_that_were_broken_off_are_in_the_history(
    executor: EmpathyLLMExecutor, orphans: Orphans, simulator: Simulator, until: Until
) -> None:
    """With the same words as the attempt that the worker itself keeps."""
    behave(simulator, errors={"hang": 1})
    interruption = Interruption()
    stopper = threading.Thread(
        target=lambda: (until(lambda: simulator.requests()["in_flight"]), interruption.stop("cancelled"))
    )
    stopper.start()
    with pytest.raises(StoppedError) as caught:
        executor.execute(LUNA, job_id="job-1", lease=LEASE, interruption=interruption)
    stopper.join()
    [kept] = caught.value.attempts
    [attempt] = orphans.of_job("job-1", LEASE)
    assert (attempt.outcome, attempt.error_type, attempt.cost_usd) == (kept.outcome, kept.error_type, kept.cost_usd)


def test_only_calls_under_that_lease_are_settled(
    admission: Admission, orphans: Orphans, ask: Callable[..., Request], redis: Redis, keys: FleetKeys
) -> None:
    """A call of the job that a living worker has not settled yet is left to it, and shown as not known."""
    redis.zadd(keys.workers, {"living": FOR_EVER_MS})
    dead, alive = permit(admission, ask()), permit(admission, ask(lease="living"))
    attempts = orphans.of_job("job-1", LEASE)
    assert [attempt.outcome for attempt in attempts] == ["orphaned", "orphaned"]
    states = [redis.hget(keys.call(one.call_id), "state") for one in (dead, alive)]
    assert states == [b"orphaned", b"open"]
    assert redis.zrange(keys.calls, 0, -1) == [alive.call_id.encode()]
    assert orphans.of_job("job-1", LEASE) == attempts
    assert len(list(Ledger(orphans._settings, redis).records())) == 1


def test_overdue_calls_are_settled_and_others_are_not(
    admission: Admission, orphans: Orphans, ask: Callable[..., Request], redis: Redis, keys: FleetKeys
) -> None:
    """A few at a time; what cannot be settled any more leaves the index, too."""
    late = [permit(admission, ask(lease="")) for _ in range(3)]
    fresh = permit(admission, ask(lease=""))
    redis.zadd(keys.calls, {**{one.call_id: 1 for one in late}, "gone": 2})
    assert [orphans.overdue(2), orphans.overdue(2), orphans.overdue(2)] == [2, 1, 0]
    assert redis.zrange(keys.calls, 0, -1) == [fresh.call_id.encode()]
    assert {record.call_id for record in Ledger(orphans._settings, redis).records()} == {one.call_id for one in late}


@pytest.mark.parametrize("gone", ["call", "state"])
def test_call_that_nobody_can_settle_is_given_up_aloud(
    admission: Admission,
    orphans: Orphans,
    ask: Callable[..., Request],
    redis: Redis,
    keys: FleetKeys,
    caplog: pytest.LogCaptureFixture,
    gone: str,
) -> None:
    """Its reservation can be given back by nobody, so that is said once, and nothing of it stays for good."""
    lost, settled = permit(admission, ask(lease="")), permit(admission, ask(lease=""))
    admission.settle(settled, Outcome.released())
    if gone == "call":
        redis.delete(keys.call(lost.call_id))
    else:
        redis.hset(keys.call(lost.call_id), "state", "garbage")
    redis.zadd(keys.calls, {lost.call_id: 1, settled.call_id: 1})
    assert [orphans.overdue(), orphans.overdue()] == [0, 0]
    [said] = [record.getMessage() for record in caplog.records if "is given up" in record.getMessage()]
    assert lost.call_id in said
    assert redis.ttl(keys.call(lost.call_id)) > 0 or gone == "call"


def pass_time(redis: Redis, settings: Settings, seconds: int) -> None:
    """Have every key lose so much of its life, as it would if so much time passed."""
    for key in redis.scan_iter(match=f"*{settings.namespace}*"):
        left = redis.ttl(key)
        if left >= 0:
            redis.expire(key, left - seconds)  # a key without any left is deleted


@pytest.mark.parametrize("by", ["take-over", "overdue"])
def test_open_call_waits_for_a_fleet_that_was_down_for_days(
    admission: Admission,
    orphans: Orphans,
    ask: Callable[..., Request],
    redis: Redis,
    settings: Settings,
    keys: FleetKeys,
    by: str,
) -> None:
    """Longer than results are kept: the call is still found and charged once, and then it has an end of its own."""
    taken = permit(admission, ask())
    pass_time(redis, settings, 10 * settings.retention_seconds)
    if by == "take-over":
        [attempt] = orphans.of_job("job-1", LEASE)
        assert (attempt.outcome, attempt.call_id) == ("orphaned", taken.call_id)
    else:
        redis.zadd(keys.calls, {taken.call_id: 1})
        assert orphans.overdue() == 1
    [record] = Ledger(settings, redis).records()
    assert (record.call_id, record.outcome) == (taken.call_id, "orphaned")
    assert redis.zcard(keys.calls) == 0
    for key in (keys.call(taken.call_id), keys.job_calls("job-1")):
        assert settings.retention_seconds - 60 < redis.ttl(key) <= settings.retention_seconds


@pytest.mark.parametrize(
    "garbage", [{"model": None}, {"stage": None}, {"budgets": "x"}, {"budgets": "dt"}, {"admitted_ms": "soon"}]
)
def test_garbled_intent_stops_nobody(
    admission: Admission,
    orphans: Orphans,
    ask: Callable[..., Request],
    redis: Redis,
    keys: FleetKeys,
    garbage: dict[str, str | None],
) -> None:
    """That call cannot be settled for its worker, which is said; all others can."""
    garbled, sound = permit(admission, ask()), permit(admission, ask())
    for name, value in garbage.items():
        redis.hdel(keys.call(garbled.call_id), name)
        if value is not None:
            redis.hset(keys.call(garbled.call_id), name, value)
    assert sound.call_id in {attempt.call_id for attempt in orphans.of_job("job-1", LEASE)}
    assert redis.hget(keys.call(sound.call_id), "state") == b"orphaned"
    redis.zadd(keys.calls, {garbled.call_id: 1})
    assert orphans.overdue() == 0
    assert redis.zcard(keys.calls) == 0
    assert redis.ttl(keys.call(garbled.call_id)) > 0


def test_record_of_a_call_stays_small(
    admission: Admission, ask: Callable[..., Request], redis: Redis, keys: FleetKeys
) -> None:
    """Every call has one for as long as results are kept: Redis stores it in the compact way, before and after."""
    taken = permit(admission, ask(lease=LEASE))
    compact = {b"ziplist", b"listpack"}
    assert redis.object("encoding", keys.call(taken.call_id)) in compact
    admission.settle(taken, Outcome("succeeded", "success", 120, Decimal("0.01"), 60, 40, request_id="req_" + "0" * 32))
    assert redis.object("encoding", keys.call(taken.call_id)) in compact


CHILD = """
import sys
from attune_worker.jobs import Job
from attune_worker.models.executor import EmpathyLLMExecutor
job = Job.from_json(sys.argv[1])
EmpathyLLMExecutor().execute(job, job_id="job-1", lease=sys.argv[2])
"""


def test_call_of_a_killed_worker_is_paid_for_and_found(
    environ: dict[str, str],
    settings: Settings,
    simulator: Simulator,
    redis: Redis,
    until: Until,
) -> None:
    """Another process, with other settings, settles it: the money is spent, the slot is free, the bill explains it."""
    behave(simulator, errors={"hang": 1})
    limits = {"ATTUNE_BUDGETS": '[{"per":"day","limit_usd":1}]', "ATTUNE_PROVIDERS__OPENAI__CONCURRENCY": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, LUNA.to_json(), LEASE], env=process_environ({**environ, **limits})
    )
    until(lambda: simulator.requests()["in_flight"])
    child.send_signal(signal.SIGKILL)
    child.wait()
    strange = Settings.model_validate({**settings.model_dump(), "providers": {}, "budgets": []})
    orphans = Orphans(strange, redis)
    [attempt] = orphans.of_job("job-1", LEASE)
    assert (attempt.outcome, attempt.cost_usd, attempt.model_id) == ("orphaned", None, "gpt-6-luna")

    budgeted = Settings.model_validate({**settings.model_dump(), "budgets": [{"per": "day", "limit_usd": 1}]})
    [budget] = Budgets(budgeted, redis).status()
    result = reconcile(Ledger(settings, redis).records(), lines_of(simulator.invoice()))
    [uncertain] = result.uncertain
    assert (budget.reserved_usd, budget.spent_usd) == (0, uncertain.record.estimate_usd)
    assert Limits(settings, redis).status()["openai"].in_flight == 0
    assert uncertain.record.call_id == attempt.call_id
    assert uncertain.billed_usd is not None
    assert 0 < uncertain.billed_usd <= budget.spent_usd
    assert (result.differences, result.agrees) == ((), True)


def test_leave_after_the_orphan_was_settled_is_no_leave(
    admission: Admission, orphans: Orphans, ask: Callable[..., Request]
) -> None:
    """An ADMIT that is sent again after a broken connection comes too late for a worker that was found dead."""
    request = ask()
    permit(admission, request)
    orphans.of_job("job-1", LEASE)
    assert isinstance(admission.admit(replace(request, lease="")), Refusal)
