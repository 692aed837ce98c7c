"""Do workers put back jobs that the fleet does not allow now, and end those that it never will?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from attune_worker.client import Client
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.models.breaker import CircuitBreaker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from tests.conftest import longer_and_longer

SOON = 60.0
LUNA, HAIKU = "gpt-6-luna", "claude-haiku-5-5"
BUDGETS = '[{"per": "day", "limit_usd": "0.000001", "tenant": "poor"}]'


@dataclass
class Fleet:
    """One worker with one thread."""

    simulator: Simulator
    client: Client
    breaker: CircuitBreaker

    def submit(self, model: str, **fields: Any) -> Any:
        return self.client.submit("summarize", "a prompt", model=model, **fields)

    def behave(self, **profile: Any) -> None:
        self.simulator.profile = Profile.parse(profile)
        self.simulator.reset()


@pytest.fixture(scope="module")
def running(make_environ: Any, start_worker: Callable[..., LocalWorker]) -> Iterator[Fleet]:
    with Simulator() as simulator:
        environ = make_environ(
            simulator,
            RETRY__PATIENCE_SECONDS=0.05,
            PROVIDERS__OPENAI__REQUESTS_PER_MINUTE=40,
            BUDGETS=BUDGETS,
        )
        settings = Settings.load(environ=environ)
        with Client(settings) as client:
            start_worker(environ, concurrency=1)
            yield Fleet(simulator, client, CircuitBreaker(settings=settings))


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.behave()
    running.breaker.reset()
    return running


def test_job_beyond_the_rate_limit_waits_without_a_thread(fleet: Fleet) -> None:
    """The provider sees no more than it allows; the only thread serves another provider's job meanwhile."""
    limited = [fleet.submit(LUNA) for _ in range(3)]
    other = fleet.submit(HAIKU)  # stands in line behind them
    assert other.result(SOON).succeeded
    results = [handle.result(SOON) for handle in limited]
    assert fleet.simulator.requests()["requests"][-1]["model"] == LUNA
    assert max(record.attempts for record in fleet.client.records.read([handle.id for handle in limited])) > 1
    assert [result.status for result in results] == [JobStatus.SUCCEEDED] * 3
    assert [len(result.attempts) for result in results] == [1] * 3  # to wait is no attempt
    assert [request["status"] for request in fleet.simulator.requests()["requests"]] == [200] * 4


def test_job_whose_circuit_is_open_waits_and_then_probes(fleet: Fleet, until: Any) -> None:
    """Nobody calls before its time; then the job itself is the probe, and closes the circuit."""
    for seconds in longer_and_longer(2):
        fleet.breaker.reset()
        fleet.breaker.trip("openai", "cheap", seconds, "maintenance")
        waiting = fleet.submit(LUNA)
        seen = until(lambda job=waiting: {job.status()} & {JobStatus.WAITING, JobStatus.SUCCEEDED})
        if seen == {JobStatus.WAITING}:  # not when the time was over before the job's turn
            break
    assert seen == {JobStatus.WAITING}
    assert fleet.submit(HAIKU).result(SOON).succeeded
    result = waiting.result(SOON)
    assert result.succeeded
    assert len(result.attempts) == 1
    assert not fleet.breaker.get_status()["openai:cheap"]["is_open"]


def test_job_that_cannot_be_served_in_its_time_expires_with_the_reason(fleet: Fleet, until: Any) -> None:
    """And with the call that was made for it, and what that cost."""
    for seconds in longer_and_longer(1):
        fleet.breaker.reset()
        fleet.behave(errors={"rate_limited": 1}, retry_after={"seconds": seconds, "form": "retry-after-ms"})
        handle = fleet.submit(HAIKU, deadline_seconds=4 * seconds)
        until(lambda job=handle: job.status() is JobStatus.WAITING or job.status().ended)
        fleet.breaker.trip("anthropic", "cheap", 600, "maintenance")
        result = handle.result(4 * seconds + SOON)
        if len(fleet.simulator.requests()["requests"]) == 1:  # not when the circuit was opened too late
            break
    assert result.error is not None
    assert (result.status, result.error.type, result.cost_usd) == (JobStatus.EXPIRED, "deadline_exceeded", Decimal(0))
    assert "its circuit is open" in result.error.message
    assert [attempt.error_type for attempt in result.attempts] == ["rate_limited"]
    assert len(fleet.simulator.requests()["requests"]) == 1


def test_job_without_budget_fails_at_once(fleet: Fleet) -> None:
    """It is not put back for the rest of the day; other tenants are not concerned."""
    result = fleet.submit(HAIKU, tenant="poor").result(SOON)
    assert result.error is not None
    assert (result.status, result.error.type, result.attempts) == (JobStatus.FAILED, "budget_exceeded", ())
    assert "of tenant 'poor' has $0.000001000 left" in result.error.message
    assert result.error.retry_after is not None
    assert fleet.submit(HAIKU, tenant="rich").result(SOON).succeeded
    assert len(fleet.simulator.requests()["requests"]) == 1
