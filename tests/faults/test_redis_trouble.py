"""What happens to jobs while Redis restarts, stands still, is full or is demoted? And what do callers hear?"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from attune_worker.async_client import AsyncClient
from attune_worker.client import Client
from attune_worker.errors import JobNotFoundError, ResultTimeoutError, ServiceUnavailableError
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, Stopwatch, Until, answer_now
from tests.faults.conftest import assert_each_ran_once, paused, process_id, submit

StartWorker = Callable[..., LocalWorker]

LEASE_SECONDS = 2
TIMEOUT_SECONDS = 0.5
SLACK_SECONDS = 2.0
"""What a busy machine may add."""


@pytest.fixture
def environ(make_environ: Environ, simulator: Simulator, own_server: EmbeddedRedis) -> dict[str, str]:
    return make_environ(simulator, REDIS_URL=own_server.url, REDIS_TIMEOUT_SECONDS=TIMEOUT_SECONDS)


def answers(simulator: Simulator) -> int:
    count: int = simulator.invoice(summary=True)["count"]
    return count


def slow(seconds: float) -> Profile:
    return Profile.parse({"api_keys": [API_KEY], "latency": seconds})


def test_redis_that_crashes_in_the_middle_of_a_hundred_jobs(
    own_server: EmbeddedRedis,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """It comes back with its append-only file; every job ends succeeded, with one call."""
    workers = [start_worker(environ, concurrency=10) for _ in range(2)]
    simulator.profile = slow(0.3)
    handles = submit(client, 100)
    until(lambda: answers(simulator) > 30)
    own_server.stop(signal.SIGKILL)
    until(lambda: not simulator.requests()["in_flight"])
    own_server.start()
    assert_each_ran_once(client, handles, simulator, until)
    assert [worker.process and worker.process.poll() for worker in workers] == [None, None]


def test_redis_that_stands_still_for_longer_than_a_lease(
    own_server: EmbeddedRedis,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """All leases have run out when it goes on, and nobody's jobs are taken: their workers are alive."""
    environ["ATTUNE_RECOVERY__LEASE_SECONDS"] = str(LEASE_SECONDS)
    for _ in range(2):
        start_worker(environ, concurrency=10)
    simulator.profile = slow(0.5)
    handles = submit(client, 60)
    until(lambda: answers(simulator) > 5)
    with paused(process_id(own_server)):
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 3 * LEASE_SECONDS)
    assert_each_ran_once(client, handles, simulator, until)
    assert {client.records.read([handle.id])[0].crashes for handle in handles} == {0}


def test_callers_hear_of_a_redis_that_stands_still_within_its_timeout(
    own_server: EmbeddedRedis, client: Client, stopwatch: Stopwatch
) -> None:
    """Whatever they ask, the error is typed, and nobody hangs."""
    handle = client.submit("summarize", "?")
    with paused(process_id(own_server)):
        for ask in (
            handle.status,
            handle.cancel,
            lambda: handle.result(timeout=1),
            lambda: client.submit("summarize", "?"),
        ):
            began = stopwatch.seconds
            with pytest.raises(ServiceUnavailableError, match="cannot be reached"):
                ask()
            assert stopwatch.seconds - began < 1 + TIMEOUT_SECONDS + SLACK_SECONDS


THREADS = 20

CROWD = 100
"""More than the threads of an ``AsyncClient`` can serve in the time that a test allows, at a timeout for each."""


async def heard_while_paused(server: EmbeddedRedis, waiting: Sequence[asyncio.Task[Any]]) -> list[BaseException]:
    """Return the errors of tasks that wait for a Redis that stands still."""
    with paused(process_id(server)):
        return [error for error in await asyncio.gather(*waiting, return_exceptions=True) if error is not None]


def test_a_crowd_that_awaits_results_hears_in_time_of_a_redis_that_stands_still(
    own_server: EmbeddedRedis,
    redis: Redis,
    settings: Settings,
    stopwatch: Stopwatch,
    until: Until,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each within its timeout and one of Redis, however many wait with it; nothing is left of them."""
    timeout = 2.0

    async def use() -> None:
        async with AsyncClient(settings) as client:
            handles = await client.submit_many([{"task_type": "summarize", "prompt": "?"}] * CROWD)
            began = stopwatch.seconds
            waiting = [asyncio.create_task(handle.result(timeout)) for handle in handles]
            await asyncio.to_thread(until, lambda: len(list(redis.scan_iter("*:waiters:*", count=10_000))) >= CROWD)
            heard = await heard_while_paused(own_server, waiting)
            assert stopwatch.seconds - began < timeout + TIMEOUT_SECONDS + SLACK_SECONDS
            assert {type(error) for error in heard} <= {ServiceUnavailableError, ResultTimeoutError}
            assert len(heard) == CROWD
            assert await handles[0].cancel() is True
            assert (await handles[0].result(PATIENCE_SECONDS)).status is JobStatus.CANCELLED
            assert not client._asking._overdue

    asyncio.run(use())
    assert not [one for one in caplog.records if one.name == "asyncio"]


@pytest.mark.parametrize("what", ["submit", "status", "cancel"])
def test_a_crowd_that_asks_hears_in_time_of_a_redis_that_stands_still(
    own_server: EmbeddedRedis, settings: Settings, stopwatch: Stopwatch, what: str
) -> None:
    """Nobody stands in line for longer than one timeout; and what was given up there is not sent afterwards."""

    async def use() -> None:
        async with AsyncClient(settings) as client:
            known = await client.submit("summarize", "?")
            asks: dict[str, Callable[[], Awaitable[Any]]] = {
                "submit": lambda: client.submit("summarize", "?"),
                "status": known.status,
                "cancel": known.cancel,
            }
            began = stopwatch.seconds
            waiting = [asyncio.ensure_future(asks[what]()) for _ in range(CROWD)]
            heard = await heard_while_paused(own_server, waiting)
            assert stopwatch.seconds - began < 2 * TIMEOUT_SECONDS + SLACK_SECONDS
            given_up = [error for error in heard if "nothing of it was sent" in str(error)]
            assert {type(error) for error in heard} == {ServiceUnavailableError}
            assert len(given_up) > CROWD / 2
            await client.submit("summarize", "?")  # behind all that may still be in line
            sent = len(heard) - len(given_up) if what == "submit" else 0
            assert sum(client._client.records.counts().values()) <= 2 + sent

    asyncio.run(use())


def test_threads_that_are_the_first_to_wait_hear_of_a_redis_that_stands_still_together(
    own_server: EmbeddedRedis, settings: Settings, stopwatch: Stopwatch
) -> None:
    """One of them finds it out; the others do not pay for the timeout again, one after another. Then all goes on."""
    with closing(Client(settings)) as client, ThreadPoolExecutor(THREADS) as pool:
        with paused(process_id(own_server)):
            began = stopwatch.seconds
            waiting = [pool.submit(client.result, "nobody", 1) for _ in range(THREADS)]
            errors = [one.exception() for one in waiting]
            assert stopwatch.seconds - began < 1 + TIMEOUT_SECONDS + SLACK_SECONDS
        assert {type(error) for error in errors} == {ServiceUnavailableError}
        assert len({id(error) for error in errors}) == THREADS
        with pytest.raises(JobNotFoundError):
            client.result("nobody", 1)


@pytest.fixture
def client_of_two(
    own_server: EmbeddedRedis, redis_server: EmbeddedRedis, make_environ: Environ, simulator: Simulator
) -> Iterator[Client]:
    """Return a client whose broker is the Redis that a test may break, and whose job records are in another."""
    environ = make_environ(
        simulator, REDIS_URL=redis_server.url, BROKER_URL=own_server.url, REDIS_TIMEOUT_SECONDS=TIMEOUT_SECONDS
    )
    with closing(Client(Settings.load(environ=environ))) as client:
        yield client


def test_callers_hear_of_a_broker_that_stands_still_within_its_timeout(
    own_server: EmbeddedRedis, client_of_two: Client, stopwatch: Stopwatch
) -> None:
    """The job is accepted, which the error says with its id; it is woken later."""
    client_of_two.submit("summarize", "?")
    with paused(process_id(own_server)):
        began = stopwatch.seconds
        with pytest.raises(ServiceUnavailableError, match="cannot be reached") as caught:
            client_of_two.submit("summarize", "?")
        assert stopwatch.seconds - began < 3 * TIMEOUT_SECONDS + SLACK_SECONDS
    [job_id] = caught.value.job_ids
    assert client_of_two.status(job_id) is JobStatus.QUEUED


def test_callers_hear_of_a_full_broker(redis: Redis, client_of_two: Client) -> None:
    """The error is typed, and says that the job is accepted."""
    redis.config_set("maxmemory", "1")
    with pytest.raises(ServiceUnavailableError, match=r"refused a command: .*maxmemory") as caught:
        client_of_two.submit("summarize", "?")
    [job_id] = caught.value.job_ids
    assert client_of_two.status(job_id) is JobStatus.QUEUED


def test_full_redis_refuses_new_jobs_and_loses_no_answer(
    redis: Redis,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """What runs ends, and its ends and costs are written when there is room again."""
    worker = start_worker(environ, concurrency=10)
    simulator.profile = slow(PATIENCE_SECONDS)
    handles = submit(client, 20)
    until(lambda: simulator.requests()["in_flight"] == 10)
    redis.config_set("maxmemory", "1")
    with pytest.raises(ServiceUnavailableError, match="its memory is full; raise maxmemory"):
        client.submit("summarize", "?")
    simulator.profile = slow(0)
    answer_now(simulator)
    until(lambda: not simulator.requests()["in_flight"])
    redis.config_set("maxmemory", "0")
    assert_each_ran_once(client, handles, simulator, until)
    assert worker.process is not None
    assert worker.process.poll() is None


@pytest.fixture
def replica(own_server: EmbeddedRedis, redis: Redis, tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """Run a replica of the Redis that a test may break, which has caught up."""
    link = f"replicaof 127.0.0.1 {own_server.port}\nmasterauth {own_server._password}\n"
    with EmbeddedRedis(tmp_path / "replica", password=own_server._password, configuration=link) as server:
        redis.config_set("masterauth", own_server._password)
        yield server


def test_workers_go_on_after_their_redis_was_a_replica_for_a_while(
    redis: Redis,
    replica: EmbeddedRedis,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """A failover demotes it under their open connections, and it refuses all but reads; then it leads again."""
    busy, idle = start_worker(environ, concurrency=5), start_worker(environ, concurrency=10)
    simulator.profile = slow(PATIENCE_SECONDS)
    handles = submit(client, 10)
    until(lambda: simulator.requests()["in_flight"] == 10)
    with Redis.from_url(replica.url) as other:
        until(lambda: other.info("replication")["master_link_status"] == "up")
        redis.execute_command("FAILOVER", "TO", "127.0.0.1", replica.port)
        until(lambda: redis.info("replication")["role"] == "slave")
        with pytest.raises(ServiceUnavailableError, match="it is a replica; redis_url should name the primary"):
            client.submit("summarize", "?")
        simulator.profile = slow(0)
        answer_now(simulator)
        until(lambda: not simulator.requests()["in_flight"])
        until(lambda: "Connection to broker lost" in idle.log.read_text())
        until(lambda: redis.info("replication")["master_link_status"] == "up")
        redis.replicaof("NO", "ONE")
    handles += submit(client, 10)
    assert_each_ran_once(client, handles, simulator, until)
    assert [worker.process and worker.process.poll() for worker in (busy, idle)] == [None, None]
