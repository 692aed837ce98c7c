"""Does a running fleet obey what an operator types?"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from click.testing import CliRunner
from redis import Redis

from attune_worker.cli import attune
from attune_worker.client import Client, JobHandle
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings, get_settings
from attune_worker.simulator import FixedLatency, Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from tests.conftest import Stopwatch, Until

SOON = 60.0
HAIKU = "claude-haiku-5-5"
OBEYED_SECONDS = 1.0
BUDGETS = json.dumps(
    [
        {"per": "day", "tenant": "*", "limit_usd": "10"},
        {"per": "day", "tenant": "poor", "limit_usd": "0.000001"},
    ]
)


@dataclass
class Fleet:
    """Two worker processes, and an operator's shell."""

    simulator: Simulator
    client: Client
    environ: dict[str, str]

    def submit(self, **fields: Any) -> JobHandle:
        return self.client.submit("summarize", f"a prompt of {time.monotonic_ns()}", model=HAIKU, **fields)

    def type(self, *arguments: str) -> Any:
        get_settings.cache_clear()
        ran = CliRunner(env=self.environ).invoke(attune, [*arguments, "--json"])
        get_settings.cache_clear()
        assert ran.exit_code == 0, ran.output + repr(ran.exception)
        return json.loads(ran.stdout)

    def workers_of(self, handles: list[JobHandle]) -> set[str]:
        return {record.worker for record in self.client.records.read([one.id for one in handles]) if record.worker}


@pytest.fixture(scope="module")
def running(make_environ: Any, start_worker: Callable[..., LocalWorker]) -> Iterator[Fleet]:
    with Simulator(Profile(latency=FixedLatency(seconds=0.02))) as simulator:
        environ = make_environ(simulator, RETRY__PATIENCE_SECONDS=0.05, BUDGETS=BUDGETS)
        with Client(Settings.load(environ=environ)) as client:
            for _ in range(2):
                start_worker(environ, concurrency=4)
            yield Fleet(simulator, client, environ)


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.simulator.reset()
    running.type("breaker", "reset")
    return running


def test_a_trip_is_obeyed_by_the_fleet_within_a_second(fleet: Fleet, until: Until, stopwatch: Stopwatch) -> None:
    """Both workers are calling; a second after the command nobody is, though jobs keep coming, until a reset."""
    handles: list[JobHandle] = []

    def both_are_calling() -> bool:
        handles.append(fleet.submit())
        return len(fleet.workers_of(handles)) == 2 and fleet.simulator.invoice(summary=True)["count"] > 10

    until(both_are_calling)
    fleet.type("breaker", "trip", "anthropic", "--seconds", "600", "--reason", "maintenance")
    tripped, obeyed_at = stopwatch.seconds, 0.0
    while stopwatch.seconds < tripped + 2 * OBEYED_SECONDS:
        handles.append(fleet.submit())
        if not obeyed_at and stopwatch.seconds >= tripped + OBEYED_SECONDS:
            obeyed_at = time.time()  # the provider's clock, as it was when the second was over
    until(lambda: {one.status() for one in handles} <= {JobStatus.WAITING, JobStatus.SUCCEEDED})
    waiting = [one for one in handles if one.status() is JobStatus.WAITING]
    assert waiting
    assert max(one["time"] for one in fleet.simulator.requests()["requests"]) <= obeyed_at
    assert fleet.simulator.invoice()["count"] == len(handles) - len(waiting)
    reasons = {record.reason for record in fleet.client.records.read([one.id for one in waiting])}
    assert any("its circuit is open" in (reason or "") for reason in reasons)

    for one in waiting:
        one.cancel()
    fleet.type("breaker", "reset", "anthropic", "--reason", "mended")
    assert fleet.submit().result(SOON).succeeded


def test_a_circuit_that_is_disabled_lets_calls_through(fleet: Fleet) -> None:
    """Whatever the state below it says."""
    fleet.type("breaker", "trip", "anthropic", "--seconds", "600")
    fleet.type("breaker", "override", "disabled", "anthropic")
    assert fleet.submit().result(SOON).succeeded


def test_a_limit_is_obeyed_by_the_next_call(fleet: Fleet) -> None:
    """Lower and higher, for one tenant alone; what was spent is exact."""
    first = fleet.submit(tenant="acme").result(SOON)
    assert first.succeeded
    row = fleet.type("budget", "set", "0.000000001", "--per", "day", "--tenant", "acme", "--reason", "a loop")
    assert Decimal(row["spent_usd"]) == first.cost_usd == Decimal(fleet.simulator.invoice()["total_usd"])
    refused = fleet.submit(tenant="acme").result(SOON)
    assert refused.error is not None
    assert refused.error.type == "budget_exceeded"
    assert fleet.submit(tenant="other").result(SOON).succeeded
    fleet.type("budget", "set", "--default", "--per", "day", "--tenant", "acme")
    assert fleet.submit(tenant="acme").result(SOON).succeeded

    assert fleet.submit(tenant="poor").result(SOON).error is not None
    fleet.type("budget", "set", "1", "--per", "day", "--tenant", "poor")
    assert fleet.submit(tenant="poor").result(SOON).succeeded


def test_status_and_trip_work_while_redis_is_under_load(fleet: Fleet, redis_server: EmbeddedRedis) -> None:
    """Within their timeouts, though eight clients keep Redis as busy as they can."""
    done = threading.Event()

    def load() -> None:
        with Redis.from_url(redis_server.url) as redis:
            while not done.is_set():
                with redis.pipeline(transaction=False) as pipeline:
                    for number in range(500):
                        pipeline.hset("load", str(number), "x" * 500)
                    pipeline.execute()

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        fleet.type("breaker", "trip", "openai", "cheap", "--seconds", "600")
        for _ in range(10):
            assert [one["provider"] for one in fleet.type("breaker", "status", "openai") if one["is_open"]] == [
                "openai"
            ]
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_reset_lets_go_on_what_waits_for_the_circuit(fleet: Fleet, until: Until) -> None:
    """A job that was told to come back in a quarter of an hour does not wait for that."""
    fleet.type("breaker", "trip", "anthropic", "cheap", "--seconds", "900")
    waiting = fleet.submit()
    until(lambda: waiting.status() is JobStatus.WAITING)
    [record] = fleet.client.records.read([waiting.id])
    assert record.due_ms is not None
    assert record.due_ms / 1000 > time.time() + 600
    fleet.type("breaker", "reset", "anthropic", "cheap")
    assert waiting.result(SOON).status is JobStatus.SUCCEEDED
