"""What becomes of a worker's jobs when it is killed, or stands still, in the middle of them?"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from redis import Redis

from attune_worker.client import Client, JobHandle
from attune_worker.jobs import JobStatus
from attune_worker.limits import Limits
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import FleetKeys
from attune_worker.store.record import Record
from tests.conftest import API_KEY, PATIENCE_SECONDS, Stopwatch, answer_now

Until = Callable[[Callable[[], Any]], Any]
StartWorker = Callable[..., LocalWorker]
SOON = 60.0
RECOVERED_SECONDS = 20.0
LEASE_SECONDS = 1.5
STILL_SECONDS = 3 * LEASE_SECONDS


@pytest.fixture
def environ(make_environ: Any, simulator: Simulator) -> dict[str, str]:
    environ: dict[str, str] = make_environ(simulator, RECOVERY__LEASE_SECONDS=LEASE_SECONDS)
    return environ


@pytest.fixture
def redis(redis_server: EmbeddedRedis) -> Iterator[Redis]:
    """Connect to the Redis that all tests share: nothing here breaks it."""
    with Redis.from_url(redis_server.url) as found:
        yield found


def behave(simulator: Simulator, **profile: Any) -> None:
    simulator.profile = Profile.parse({"api_keys": [API_KEY], **profile})


def submit(client: Client, count: int) -> list[JobHandle]:
    return client.submit_many(
        [{"task_type": "summarize", "prompt": f"question {n}", "model": "gpt-6-luna"} for n in range(count)]
    )


def read(client: Client, handles: Sequence[JobHandle]) -> list[Record]:
    return client.records.read([handle.id for handle in handles])


def pid_of(lease: str | None) -> int:
    """Return the process that holds or held a lease; 0: nobody."""
    return int(lease.split(":")[-2]) if lease else 0


def running_on(client: Client, handles: Sequence[JobHandle], pid: int) -> list[JobHandle]:
    """Return the jobs that run in a process."""
    found = read(client, handles)
    return [
        handle
        for handle, record in zip(handles, found, strict=True)
        if record.status is JobStatus.RUNNING and pid_of(record.worker) == pid
    ]


def pid(worker: LocalWorker) -> int:
    assert worker.process is not None
    return worker.process.pid


@pytest.mark.parametrize("who", ["leader", "follower"])
def test_jobs_of_a_killed_worker_run_elsewhere(
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    until: Until,
    start_worker: StartWorker,
    redis: Redis,
    stopwatch: Stopwatch,
    who: str,
) -> None:
    """All succeed; each job that was in a call has one call more on the invoice, and one in its history."""
    behave(simulator, latency=PATIENCE_SECONDS)
    workers = {"leader": start_worker(environ, concurrency=5)}
    until(lambda: redis.exists(FleetKeys(client.settings.namespace).sweeper))
    workers["follower"] = start_worker(environ, concurrency=5)
    handles = submit(client, 10)
    until(lambda: all(running_on(client, handles, pid(worker)) for worker in workers.values()))
    until(lambda: simulator.requests()["in_flight"] == len(handles))
    lost = running_on(client, handles, pid(workers[who]))
    os.kill(pid(workers[who]), signal.SIGKILL)
    killed_at = stopwatch.seconds
    behave(simulator)
    answer_now(simulator)
    results = [handle.result(SOON) for handle in handles]
    assert stopwatch.seconds - killed_at < RECOVERED_SECONDS
    assert {result.status for result in results} == {JobStatus.SUCCEEDED}
    for handle, result, record in zip(handles, results, read(client, handles), strict=True):
        outcomes = [attempt.outcome for attempt in result.attempts]
        if handle in lost:
            assert (record.crashes, record.attempts, outcomes) == (1, 2, ["orphaned", "succeeded"])
            assert result.attempts[0].cost_usd is None
            assert f":{pid(workers[who])}:" in record.lost[0]
        else:
            assert (record.crashes, record.attempts, outcomes) == (0, 1, ["succeeded"])
    assert simulator.invoice()["count"] <= len(handles) + len(lost)
    until(lambda: Limits(client.settings).status()["openai"].in_flight == 0)
    survivor = next(worker for name, worker in workers.items() if name != who)
    assert f"{len(lost)} of its jobs were taken over" in survivor.log.read_text()


def test_job_that_kills_its_workers_is_dead_after_three(
    environ: dict[str, str], client: Client, simulator: Simulator, until: Until, start_worker: StartWorker
) -> None:
    """It does not go through the whole fleet; the error names all three, and other jobs run on."""
    behave(simulator, latency=600.0)
    workers = {pid(worker): worker for worker in (start_worker(environ, concurrency=1) for _ in range(4))}
    [handle] = submit(client, 1)
    killed: list[str] = []
    for _ in range(3):
        [record] = until(lambda: [one for one in read(client, [handle]) if one.status is JobStatus.RUNNING])
        assert record.worker not in killed
        killed.append(record.worker)
        os.kill(pid_of(record.worker), signal.SIGKILL)
        until(lambda: client.status(handle.id) is not JobStatus.RUNNING)
    result = handle.result(SOON)
    assert result.status is JobStatus.DEAD
    assert result.error is not None
    assert result.error.type == "poison"
    [record] = read(client, [handle])
    assert record.crashes == 3
    for lease, line in zip(killed, record.lost, strict=True):
        assert lease in line
        assert lease in result.error.message
    behave(simulator)
    assert submit(client, 1)[0].result(SOON).succeeded
    [survivor] = [worker for process, worker in workers.items() if process not in map(pid_of, killed)]
    assert f"job {handle.id} is dead" in survivor.log.read_text()


def test_redis_that_stands_still_costs_no_live_worker_its_jobs(
    make_environ: Any, simulator: Simulator, own_server: EmbeddedRedis, until: Until, start_worker: StartWorker
) -> None:
    """All leases ran out while nobody could renew them: once it answers again, each is held as before."""
    environ = make_environ(
        simulator, REDIS_URL=own_server.url, REDIS_TIMEOUT_SECONDS=0.5, RECOVERY__LEASE_SECONDS=LEASE_SECONDS
    )
    assert own_server._process is not None
    redis_pid = own_server._process.pid
    assert_nobody_is_taken_over(environ, simulator, until, start_worker, lambda _: redis_pid)


def test_fleet_that_stands_still_loses_no_job(
    environ: dict[str, str], simulator: Simulator, until: Until, start_worker: StartWorker
) -> None:
    """A suspended machine: who sweeps was not watching while the leases ran out, and may be the first to go on."""
    assert_nobody_is_taken_over(environ, simulator, until, start_worker, pid)


def assert_nobody_is_taken_over(
    environ: dict[str, str],
    simulator: Simulator,
    until: Until,
    start_worker: StartWorker,
    what: Callable[[LocalWorker], int],
) -> None:
    """Have ``what`` of the leading worker and another worker stand still, and go on in this order."""
    settings = Settings.load(environ=environ)
    keys = FleetKeys(settings.namespace)
    behave(simulator, latency=PATIENCE_SECONDS)
    with Client(settings) as client, Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        leader = start_worker(environ, concurrency=5)
        until(lambda: redis.exists(keys.sweeper))
        other = start_worker(environ, concurrency=5)
        handles = submit(client, 10)
        until(lambda: simulator.requests()["in_flight"] == 10)
        assert running_on(client, handles, pid(leader))
        assert running_on(client, handles, pid(other))
        held = redis.zrange(keys.workers, 0, -1)
        for still in (pid(other), what(leader)):
            os.kill(still, signal.SIGSTOP)
        threading.Event().wait(STILL_SECONDS)  # how long they stand still is what is tried
        os.kill(what(leader), signal.SIGCONT)
        before = redis.hget(keys.sweep, "last_ms")
        until(lambda: redis.hget(keys.sweep, "last_ms") != before)
        os.kill(pid(other), signal.SIGCONT)
        answer_now(simulator)
        assert all(handle.result(SOON).succeeded for handle in handles)
        assert sorted(redis.zrange(keys.workers, 0, -1)) == sorted(held)
        for record in read(client, handles):
            assert (record.crashes, record.attempts) == (0, 1)
        assert simulator.invoice()["count"] == 10


def test_worker_that_wakes_up_late_disturbs_nothing(
    environ: dict[str, str], client: Client, simulator: Simulator, until: Until, start_worker: StartWorker
) -> None:
    """Its jobs have run elsewhere once; it makes no call under its old lease, and writes no end; then it works on."""
    environ["ATTUNE_BREAKER__FAILURE_THRESHOLD"] = "100"  # it is not the breaker that is to forbid another call
    behave(simulator, latency=PATIENCE_SECONDS, errors={"disconnect": 1.0})
    sleeper = start_worker(environ, concurrency=5)
    handles = submit(client, 5)
    until(lambda: simulator.requests()["in_flight"] == len(handles))
    os.kill(pid(sleeper), signal.SIGSTOP)
    behave(simulator)
    answer_now(simulator)
    other = start_worker(environ, concurrency=5)
    results = [handle.result(SOON) for handle in handles]
    assert {result.status for result in results} == {JobStatus.SUCCEEDED}
    assert {(record.crashes, record.attempts) for record in read(client, handles)} == {(1, 2)}
    os.kill(pid(sleeper), signal.SIGCONT)
    until(lambda: "taken for dead" in sleeper.log.read_text())
    other.stop()
    later = submit(client, 5)
    assert all(handle.result(SOON).succeeded for handle in later)
    assert {pid_of(record.worker) for record in read(client, later)} == {pid(sleeper)}
    assert simulator.invoice()["count"] == 2 * len(handles) + len(later)
    assert [handle.result(SOON) for handle in handles] == results
    assert {(record.crashes, record.attempts) for record in read(client, handles)} == {(1, 2)}


def test_jobs_of_a_killed_process_of_a_pool_run_on(
    environ: dict[str, str], client: Client, simulator: Simulator, until: Until, start_worker: StartWorker
) -> None:
    """Each process of a prefork pool has a lease of its own; the others keep theirs."""
    behave(simulator, latency=PATIENCE_SECONDS)
    parent = start_worker(environ, pool="prefork", concurrency=2)
    handles = submit(client, 2)
    until(lambda: all(record.status is JobStatus.RUNNING for record in read(client, handles)))
    until(lambda: simulator.requests()["in_flight"] == 2)
    victims = [pid_of(record.worker) for record in read(client, handles)]
    assert pid(parent) not in victims
    assert len(set(victims)) == 2
    os.kill(victims[0], signal.SIGKILL)
    behave(simulator)
    answer_now(simulator)
    assert all(handle.result(SOON).succeeded for handle in handles)
    assert [record.crashes for record in read(client, handles)] == [1, 0]
