"""Does a job that is cancelled while it runs end at once, and is what it held and cost accounted for?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from redis import Redis

from attune_worker.app import make_app
from attune_worker.budget import Budgets
from attune_worker.client import Client
from attune_worker.jobs import JobResult, JobStatus
from attune_worker.limits import Limits
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys, JobKeys
from attune_worker.worker.runner import Runner
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, Stopwatch, Until, answer_now

SOON = 60.0
LONG = PATIENCE_SECONDS
"""A provider that takes so long is not what ended the job."""

CUT_OFF_SECONDS = 1.0
"""Within which a cancelled job's call is broken off, its end written, and its caller told."""

MODEL = "gpt-6-luna"
BUDGET = '[{"per": "day", "limit_usd": 100, "hard": true}]'

StartWorker = Callable[..., LocalWorker]


@dataclass
class Fleet:
    """A simulator and a client that share one namespace, in which there is a budget and a job may wait for long."""

    environ: dict[str, str]
    simulator: Simulator
    client: Client

    @property
    def settings(self) -> Settings:
        return self.client.settings

    @property
    def under_way(self) -> int:
        return int(self.simulator.requests()["in_flight"])

    @property
    def outcomes(self) -> list[str]:
        return [call["outcome"] for call in self.simulator.invoice()["calls"]]

    def behave(self, **profile: Any) -> None:
        self.simulator.profile = Profile.parse(profile)
        self.simulator.reset()


@pytest.fixture(scope="module")
def make_fleet(make_environ: Environ) -> Iterator[Callable[[], Fleet]]:
    fleets: list[Fleet] = []

    def make() -> Fleet:
        simulator = Simulator()
        environ = make_environ(simulator, BUDGETS=BUDGET, RETRY__PATIENCE_SECONDS=LONG)
        fleets.append(Fleet(environ, simulator, Client(Settings.load(environ=environ))))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.client.close()
        fleet.simulator.close()


@pytest.fixture(scope="module")
def shared_fleet(make_fleet: Callable[[], Fleet], start_worker: StartWorker) -> Fleet:
    """Run one worker for many tests."""
    fleet = make_fleet()
    start_worker(fleet.environ, concurrency=10)
    return fleet


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    shared_fleet.behave()
    return shared_fleet


def spent(fleet: Fleet) -> Decimal:
    [budget] = Budgets(fleet.settings).status()
    assert budget.reserved_usd == 0
    return budget.spent_usd


def cancel_call(fleet: Fleet, until: Until, stopwatch: Stopwatch) -> JobResult:
    """Cancel a job in the middle of its only call, which would take long, and return its result."""
    fleet.behave(latency=LONG)
    handle = fleet.client.submit("summarize", "a prompt", model=MODEL, metadata={"ticket": 7})
    until(lambda: fleet.under_way)
    asked = stopwatch.seconds
    assert handle.cancel()
    result = handle.result(SOON)
    until(lambda: not fleet.under_way)
    assert stopwatch.seconds - asked < CUT_OFF_SECONDS
    assert fleet.outcomes == ["abandoned"]
    assert handle.cancel() is True or handle.status() is JobStatus.CANCELLED
    return result


def test_running_call_is_cut_off(fleet: Fleet, until: Until, stopwatch: Stopwatch) -> None:
    """The connection is closed, the slot is free, the result tells of the call, and its estimate counts as spent."""
    before = spent(fleet)
    result = cancel_call(fleet, until, stopwatch)
    assert (result.status, result.content, result.model_id) == (JobStatus.CANCELLED, None, MODEL)
    assert result.metadata == {"ticket": 7}
    assert result.error is not None
    assert (result.error.type, result.error.message) == ("cancelled", "cancelled while it ran")
    assert [(call.outcome, call.error_type, call.cost_usd) for call in result.attempts] == [("failed", "stopped", None)]
    assert result.cost_usd is None
    until(lambda: Limits(fleet.settings).status()["openai"].in_flight == 0)
    assert spent(fleet) > before
    with make_app(fleet.settings) as app:
        until(lambda: app.backend.task_result_exists(result.job_id))  # it would be read by the record otherwise
        assert app.AsyncResult(result.job_id).get(timeout=SOON)["status"] == "cancelled"


def test_running_call_of_a_process_is_cut_off(
    make_fleet: Callable[[], Fleet], until: Until, stopwatch: Stopwatch, start_worker: StartWorker
) -> None:
    """Each process of a pool listens for itself, and goes on with the next job."""
    fleet = make_fleet()
    worker = start_worker(fleet.environ, concurrency=1, pool="prefork")
    assert cancel_call(fleet, until, stopwatch).status is JobStatus.CANCELLED
    fleet.behave()
    assert fleet.client.submit("summarize", "the next", model=MODEL).result(SOON).succeeded
    assert "Traceback" not in worker.log.read_text()


def test_job_that_waits_in_its_thread_is_cancelled_with_what_it_cost(fleet: Fleet, redis: Redis, until: Until) -> None:
    """Between two calls there is no connection to close, and still nobody waits for the time to pass."""
    fleet.behave(errors={"rate_limited": 1}, retry_after={"seconds": LONG / 2})
    handle = fleet.client.submit("summarize", "?", model="gpt-6.1-terra")
    calls = FleetKeys(fleet.settings.namespace).calls
    until(lambda: fleet.simulator.requests()["requests"] and not redis.zcard(calls))  # the call was settled
    assert handle.cancel()
    result = handle.result(SOON)
    assert result.status is JobStatus.CANCELLED
    assert [call.error_type for call in result.attempts] == ["rate_limited"]
    assert result.cost_usd == 0


def test_job_of_a_canvas_is_cancelled_while_it_runs(fleet: Fleet, until: Until) -> None:
    """The task that runs it returns what became of it."""
    fleet.behave(latency=LONG)
    with make_app(fleet.settings) as app:
        sent = app.send_task("attune_worker.submit_job", [{"task_type": "summarize", "prompt": "?", "model": MODEL}])
        until(lambda: fleet.under_way)
        assert fleet.client.cancel(sent.id)
        assert sent.get(timeout=SOON)["status"] == "cancelled"
    until(lambda: fleet.outcomes == ["abandoned"])


def test_cancellation_during_a_cut_is_heard_after_it(fleet: Fleet, redis: Redis, until: Until) -> None:
    """The message is lost with the connection; whoever listens again looks at what runs."""
    fleet.behave(latency=LONG)
    jobs = [{"task_type": "summarize", "prompt": str(n), "model": MODEL} for n in range(10)]
    handles = fleet.client.submit_many(jobs)
    until(lambda: fleet.under_way == 10)
    records = [JobKeys.of(fleet.settings.namespace, handle.id).record for handle in handles]
    assert len({redis.hget(record, "channel") for record in records}) == 1
    for record in records[:9]:  # as if the news had not arrived
        redis.hset(record, "cancelled_ms", 1)
    redis.client_kill_filter(_type="pubsub")
    assert [result.status for result in fleet.client.as_completed(handles[:9], SOON)] == [JobStatus.CANCELLED] * 9
    assert fleet.under_way == 1
    assert handles[9].cancel()
    assert handles[9].result(SOON).status is JobStatus.CANCELLED


def test_answer_that_comes_after_the_cancellation_is_dropped_and_its_cost_kept(
    simulator: Simulator, settings: Settings, redis: Redis, until: Until
) -> None:
    """Who cancelled a job is not handed its answer; what it cost is in the result, exactly as billed."""
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": LONG})
    with Client(settings) as client, closing(Runner(settings)) as runner:
        handle = client.submit("summarize", "?", model=MODEL)
        ends: list[JobResult] = []
        thread = threading.Thread(target=lambda: ends.append(runner.run(handle.id)))
        thread.start()
        until(lambda: simulator.requests()["in_flight"])
        redis.hset(JobKeys.of(settings.namespace, handle.id).record, "cancelled_ms", 1)  # and nobody was told
        answer_now(simulator)
        thread.join(SOON)
        result = handle.result(SOON)
    assert ends == [result]
    assert (result.status, result.content) == (JobStatus.CANCELLED, None)
    assert [call.outcome for call in result.attempts] == ["succeeded"]
    assert result.cost_usd == Decimal(simulator.invoice(summary=True)["total_usd"]) > 0


def test_job_that_was_put_back_while_it_was_cancelled_ends_cancelled(
    make_environ: Environ, simulator: Simulator, redis: Redis, until: Until
) -> None:
    """It does not go back in line."""
    settings = Settings.load(environ=make_environ(simulator, RETRY__PATIENCE_SECONDS=0))
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": LONG, "errors": {"disconnect": 1}})
    with Client(settings) as client, closing(Runner(settings)) as runner:
        handle = client.submit("summarize", "?", model=MODEL)
        thread = threading.Thread(target=runner.run, args=[handle.id])
        thread.start()
        until(lambda: simulator.requests()["in_flight"])
        redis.hset(JobKeys.of(settings.namespace, handle.id).record, "cancelled_ms", 1)
        answer_now(simulator)
        thread.join(SOON)
        assert handle.result(SOON).status is JobStatus.CANCELLED
