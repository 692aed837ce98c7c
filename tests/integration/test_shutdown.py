"""Does a worker that is told to end hand on what it cannot finish, and is nothing lost or paid for twice?"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from attune_worker.app import RUN_JOB, SUBMIT_JOB, make_app
from attune_worker.client import Client, JobHandle
from attune_worker.errors import StoppedError
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys
from attune_worker.worker.lifecycle import close_runner, runner_of
from attune_worker.worker.runner import SHUT_DOWN, Runner
from attune_worker.worker.shutdown import Shutdown
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, Until, answer_now

SOON = 60.0
LONG = PATIENCE_SECONDS
"""A provider that takes so long, and a grace time that is not awaited."""

MODEL = "gpt-6-luna"

StartWorker = Callable[..., LocalWorker]


@pytest.fixture
def make_fleet(make_environ: Environ, simulator: Simulator) -> Iterator[Callable[..., tuple[dict[str, str], Client]]]:
    """Return a function that makes the environment of a fleet and its client; the grace time is given."""
    clients: list[Client] = []

    def make(grace_seconds: float, **overrides: object) -> tuple[dict[str, str], Client]:
        environ = make_environ(simulator, RECOVERY__SHUTDOWN_GRACE_SECONDS=grace_seconds, **overrides)
        clients.append(Client(Settings.load(environ=environ)))
        return environ, clients[-1]

    yield make
    for client in clients:
        client.close()


def behave(simulator: Simulator, **profile: Any) -> None:
    simulator.profile = Profile.parse({"api_keys": [API_KEY], **profile})


def under_way(simulator: Simulator) -> int:
    return int(simulator.requests()["in_flight"])


def outcomes(simulator: Simulator) -> Counter[str]:
    return Counter(call["outcome"] for call in simulator.invoice()["calls"])


def submit(client: Client, count: int) -> list[JobHandle]:
    return client.submit_many([{"task_type": "summarize", "prompt": str(n), "model": MODEL} for n in range(count)])


def send(worker: LocalWorker, *numbers: signal.Signals) -> None:
    assert worker.process is not None
    for number in numbers:
        worker.process.send_signal(number)


def assert_ended_well(worker: LocalWorker, redis: Redis, client: Client) -> None:
    """Exit code 0, no traceback, and no lease that anybody would have to wait for."""
    assert worker.process is not None
    assert worker.process.wait(SOON) == 0, worker.log.read_text()
    assert "Traceback" not in worker.log.read_text()
    leases = redis.zrange(FleetKeys(client.settings.namespace).workers, 0, -1)
    assert not [lease for lease in leases if f":{worker.process.pid}:".encode() in lease]


def test_what_runs_when_the_grace_time_is_over_goes_on_elsewhere(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until, start_worker: StartWorker
) -> None:
    """At once, not when a lease has run out; each job ends once, with the call that was cut off in its history."""
    environ, client = make_fleet(grace_seconds=0.5)
    first = start_worker(environ, concurrency=20)
    behave(simulator, latency=LONG)
    handles = submit(client, 20)
    until(lambda: under_way(simulator) == 20)
    second = start_worker(environ, concurrency=20)
    behave(simulator)
    send(first, signal.SIGTERM)
    results = [handle.result(SOON) for handle in handles]
    assert_ended_well(first, redis, client)
    assert {result.status for result in results} == {JobStatus.SUCCEEDED}
    assert {tuple(call.error_type for call in result.attempts) for result in results} == {("stopped", None)}
    assert outcomes(simulator) == {"abandoned": 20, "succeeded": 20}
    records = client.records.read([handle.id for handle in handles])
    assert {(record.attempts, record.crashes) for record in records} == {(2, 0)}
    assert "Traceback" not in second.log.read_text()


def test_what_ends_within_the_grace_time_is_not_called_twice(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until, start_worker: StartWorker
) -> None:
    """The calls that were paid for are awaited, and their jobs are the worker's last."""
    environ, client = make_fleet(grace_seconds=LONG)
    worker = start_worker(environ, concurrency=5)
    behave(simulator, latency=LONG)
    running = submit(client, 5)
    until(lambda: under_way(simulator) == 5)
    waiting = submit(client, 3)
    send(worker, signal.SIGTERM)
    until(lambda: "Warm shutdown" in worker.log.read_text())
    behave(simulator)
    answer_now(simulator)
    assert_ended_well(worker, redis, client)
    assert [handle.status() for handle in running] == [JobStatus.SUCCEEDED] * 5
    assert [handle.status() for handle in waiting] == [JobStatus.QUEUED] * 3
    assert outcomes(simulator) == {"succeeded": 5}
    start_worker(environ, concurrency=5)
    assert all(handle.result(SOON).succeeded for handle in waiting)  # their wake-ups are still there


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT,)], ids=["terminated twice", "quit"]
)
def test_impatient_end_hands_everything_back_at_once(
    make_fleet: Any,
    simulator: Simulator,
    redis: Redis,
    until: Until,
    start_worker: StartWorker,
    signals: tuple[signal.Signals, ...],
) -> None:
    """Whatever the grace time is; the jobs wait, due now, and say why."""
    environ, client = make_fleet(grace_seconds=LONG)
    worker = start_worker(environ, concurrency=5)
    behave(simulator, latency=LONG)
    handles = submit(client, 5)
    until(lambda: under_way(simulator) == 5)
    for number in signals:
        send(worker, number)
        until(lambda: worker.log.read_text().count("Warm shutdown") >= 1)
    assert_ended_well(worker, redis, client)
    for record in client.records.read([handle.id for handle in handles]):
        assert (record.status, record.reason) == (JobStatus.WAITING, SHUT_DOWN)
        assert [call.error_type for call in record.progress] == ["stopped"]
    until(lambda: outcomes(simulator) == {"abandoned": 5})


def test_jobs_that_only_wait_are_put_back_at_once(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until, start_worker: StartWorker
) -> None:
    """They hold nothing that would be worth the grace time; their calls so far are kept. Ctrl-C does it as well."""
    environ, client = make_fleet(grace_seconds=LONG, RETRY__PATIENCE_SECONDS=LONG)
    worker = start_worker(environ, concurrency=5)
    behave(simulator, errors={"rate_limited": 1}, retry_after={"seconds": LONG / 2})
    [handle] = submit(client, 1)
    until(lambda: redis.exists(FleetKeys(client.settings.namespace).job_calls(handle.id)))
    until(lambda: simulator.requests()["requests"])
    send(worker, signal.SIGINT)
    assert_ended_well(worker, redis, client)
    [record] = client.records.read([handle.id])
    assert (record.status, record.reason) == (JobStatus.WAITING, SHUT_DOWN)
    assert [call.error_type for call in record.progress] == ["rate_limited"]


def test_canvas_goes_on_after_its_worker_was_shut_down(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until, start_worker: StartWorker
) -> None:
    """The task goes to another worker together with what is to follow it, and the job with its calls so far."""
    environ, client = make_fleet(grace_seconds=0.2)
    first = start_worker(environ, concurrency=2)
    behave(simulator, latency=LONG)
    job = {"task_type": "summarize", "prompt": "?", "model": MODEL}
    with make_app(client.settings) as app:
        follower = app.signature(SUBMIT_JOB, args=[{**job, "prompt": "after it"}], immutable=True)
        sent = app.signature(SUBMIT_JOB, args=[job]).apply_async(link=follower)
        until(lambda: under_way(simulator))
        send(first, signal.SIGTERM)
        assert_ended_well(first, redis, client)
        behave(simulator)
        start_worker(environ, concurrency=2)
        summary = sent.get(timeout=SOON)
        assert (summary["status"], summary["attempts"]) == ("succeeded", 2)
        until(lambda: outcomes(simulator) == {"abandoned": 1, "succeeded": 2})


def test_processes_of_a_pool_hand_back_too(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until, start_worker: StartWorker
) -> None:
    """Only their parent hears of the signals, and tells them: of the second as well, though it comes at once."""
    environ, client = make_fleet(grace_seconds=LONG)
    worker = start_worker(environ, concurrency=2, pool="prefork")
    behave(simulator, latency=LONG)
    handles = submit(client, 2)
    until(lambda: under_way(simulator) == 2)
    for _ in range(2):
        send(worker, signal.SIGTERM)
        until(lambda: "Warm shutdown" in worker.log.read_text())
    assert_ended_well(worker, redis, client)
    assert redis.zcard(FleetKeys(client.settings.namespace).workers) == 0  # each process had its own
    for record in client.records.read([handle.id for handle in handles]):
        assert (record.status, record.reason) == (JobStatus.WAITING, SHUT_DOWN)
    until(lambda: outcomes(simulator) == {"abandoned": 2})


def test_rolling_restart_under_load_loses_nothing_and_pays_for_nothing_twice(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until, start_worker: StartWorker
) -> None:
    """Both workers are replaced while 300 jobs run; the provider has billed as many calls as there are jobs."""
    environ, client = make_fleet(grace_seconds=LONG)
    behave(simulator, latency=0.5)
    workers = [start_worker(environ, concurrency=15) for _ in range(2)]
    handles = submit(client, 300)
    for worker in workers:
        until(lambda: under_way(simulator) >= 15)
        send(worker, signal.SIGTERM)
        start_worker(environ, concurrency=15)
    results = [handle.result(SOON) for handle in handles]
    for worker in workers:
        assert_ended_well(worker, redis, client)
    assert all(result.succeeded for result in results)
    assert outcomes(simulator) == {"succeeded": 300}


def test_worker_that_is_shut_down_by_remote_control_ends_well(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until, start_worker: StartWorker
) -> None:
    """As by the button in Flower: there is no signal, and the same happens."""
    environ, client = make_fleet(grace_seconds=0.5)
    worker = start_worker(environ, concurrency=2)
    behave(simulator, latency=LONG)
    [handle] = submit(client, 1)
    until(lambda: under_way(simulator))
    with make_app(client.settings) as app:
        app.control.shutdown()
    assert_ended_well(worker, redis, client)
    assert handle.status() is JobStatus.WAITING


def test_job_whose_lease_was_lost_begins_nothing_more(
    make_fleet: Any, simulator: Simulator, redis: Redis, until: Until
) -> None:
    """Others have it, or will: it does not ask for leave again and again until its time is up."""
    _, client = make_fleet(grace_seconds=LONG, RETRY__PATIENCE_SECONDS=LONG, RECOVERY__LEASE_SECONDS=4)
    behave(simulator, errors={"rate_limited": 1}, retry_after={"seconds": LONG / 2})
    [handle] = submit(client, 1)
    runner = Runner(client.settings)
    thread = threading.Thread(target=runner.run, args=[handle.id])
    thread.start()
    until(lambda: simulator.requests()["requests"])
    redis.delete(FleetKeys(client.settings.namespace).workers)
    thread.join(SOON)
    assert not thread.is_alive()
    [record] = client.records.read([handle.id])
    assert (record.status, record.reason) == (JobStatus.WAITING, "its worker's lease was lost")
    assert [call.error_type for call in record.progress] == ["rate_limited"]
    runner.close()


@pytest.fixture
def ending(settings: Settings) -> Iterator[Celery]:
    """Return the app of a process whose jobs are winding down."""
    with make_app(settings) as app:
        app.loader.import_default_modules()
        runner_of(app).wind_down()
        yield app
        close_runner()


def test_wake_up_that_comes_too_late_is_sent_again(ending: Celery, settings: Settings, redis: Redis) -> None:
    """The job stays queued, as it was, and its message keeps its id and priority."""
    with Client(settings) as client:
        handle = client.submit("summarize", "?", priority=3)
        queue = f"{settings.namespace}:celery:{settings.queue}"
        before = redis.lpop(f"{queue}\x06\x163") or b""
        assert ending.tasks[RUN_JOB].apply([handle.id], task_id=handle.id, priority=3).state == "IGNORED"
        after = redis.lpop(f"{queue}\x06\x163") or b""
        assert f'"id": "{handle.id}"'.encode() in before
        assert f'"id": "{handle.id}"'.encode() in after
        assert handle.status() is JobStatus.QUEUED


def test_no_job_is_claimed_by_a_process_that_ends(settings: Settings) -> None:
    """It would only have to be handed back."""
    runner = Runner(settings)
    runner.wind_down()
    with Client(settings) as client:
        handle = client.submit("summarize", "?")
        with pytest.raises(StoppedError):
            runner.run(handle.id)
        assert client.records.read([handle.id])[0].attempts == 0
    runner.close()


@pytest.mark.parametrize(("requests", "grace_seconds"), [(1, 0.01), (2, LONG), (2, None)])
def test_shutdown_winds_down_first_and_then_hands_back(requests: int, grace_seconds: float | None) -> None:
    """Each once, in this order: when the time is up, or at the second request."""
    steps: list[str] = []
    done = threading.Event()

    def hand_back() -> None:
        steps.append("hand back")
        done.set()

    shutdown = Shutdown(grace_seconds, lambda: steps.append("wind down"), hand_back)
    shutdown.start()
    for _ in range(requests):
        shutdown.request()
    assert done.wait(SOON)
    assert steps == ["wind down", "hand back"]
