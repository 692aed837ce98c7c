"""Does a job that nothing can serve now wait without a thread, and is it sure to go on?"""

import signal
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.jobs import Attempt, Job, JobResult, JobStatus, ModelTier
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.due import DueJobs
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import FleetKeys, JobKeys, new_job_id
from attune_worker.store.records import Claim, Records
from attune_worker.worker.runner import Runner
from attune_worker.worker.sweeper import Sweeper
from tests.conftest import API_KEY

SOON = 60.0
CALL = Attempt(
    model_id="gpt-6-luna",
    provider="openai",
    tier=ModelTier.CHEAP,
    outcome="failed",
    error_type="overloaded",
    latency_ms=1,
    cost_usd=Decimal("0.25"),
)


@pytest.fixture
def environ(make_environ: Any, simulator: Simulator) -> dict[str, str]:
    """No start waits longer than a moment in its worker."""
    environ: dict[str, str] = make_environ(simulator, RETRY__PATIENCE_SECONDS=0.05)
    return environ


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as found:
        yield found


@pytest.fixture
def app(settings: Settings) -> Iterator[Celery]:
    with make_app(settings) as found:
        yield found


def behave(simulator: Simulator, **profile: Any) -> None:
    simulator.profile = Profile.parse({"api_keys": [API_KEY], **profile})


FIRST_ALONE = {"errors": {"rate_limited": 0.5}, "seed": 188}
"""Of the provider's first six calls it refuses the first."""


def put_back(records: Records, wait_seconds: float, **fields: Any) -> str:
    """Have a job wait whose worker is gone; its one call so far failed."""
    job_id = new_job_id()
    job = Job.parse({"task_type": "summarize", "prompt": "a prompt", **fields})
    records.accept([(job_id, job, job.to_json())])
    claim = records.claim(job_id, "worker-1", "lease-1")
    assert isinstance(claim, Claim)
    assert records.put_back(job_id, claim.fence, wait_seconds, "openai is busy", (CALL,))
    return job_id


def messages(app: Celery) -> list[tuple[str, int]]:
    """Take the wake-ups from the queue, each as job id and priority."""
    with app.connection_for_read() as connection, connection.SimpleQueue(app.conf.task_queues[0]) as queue:
        found = []
        while True:
            try:
                message = queue.get_nowait()
            except queue.Empty:
                return found
            message.ack()
            assert message.payload[0] == [message.headers["id"]]
            found.append((message.headers["id"], message.properties["priority"]))


def test_rate_limited_job_waits_and_goes_on(
    simulator: Simulator,
    environ: dict[str, str],
    client: Client,
    start_worker: Callable[..., LocalWorker],
) -> None:
    """The only slot is free for others meanwhile; all its calls are in the result, and the time to the first start."""
    start_worker(environ, concurrency=1, pool="prefork")
    behave(simulator, **FIRST_ALONE, retry_after={"seconds": 1, "form": "retry-after-ms"})
    limited = client.submit("summarize", "limited", model="gpt-6-luna")
    other = client.submit("summarize", "other", model="claude-haiku-4-5")  # stands in line behind it
    assert other.result(SOON).succeeded
    result = limited.result(SOON)
    assert result.succeeded
    requests = [(request["model"], request["status"]) for request in simulator.requests()["requests"]]
    assert requests == [("gpt-6-luna", 429), ("claude-haiku-4-5", 200), ("gpt-6-luna", 200)]
    assert [attempt.error_type for attempt in result.attempts] == ["rate_limited", None]
    record = client.records.read([limited.id])[0]
    assert record.attempts >= 2
    assert result.queue_ms == (record.started_ms or 0) - (record.accepted_ms or 0)


def test_attempts_of_all_starts_share_one_budget(simulator: Simulator, settings: Settings, client: Client) -> None:
    """A job that was put back may not call more often than one that was not; then it fails, and all are billed."""
    behave(simulator, errors={"rate_limited": 1}, retry_after={"seconds": 0.1, "form": "retry-after-ms"})
    job_id = put_back(client.records, 60.0, model="gpt-6-luna")
    runner = Runner(settings)
    starts = 0
    while not (result := runner.run(job_id)).status.ended:
        starts += 1
        assert starts < 50
        threading.Event().wait(client.records.due_in_seconds(job_id))
    assert result.status is JobStatus.FAILED
    assert len(result.attempts) <= settings.retry.max_attempts
    assert result.attempts[0] == CALL
    assert result.cost_usd == Decimal("0.25")


def test_job_of_a_canvas_goes_on_in_its_own_thread(simulator: Simulator, settings: Settings, client: Client) -> None:
    """Without a sweeper and without another thread: jobs that wait cannot lock each other out."""
    behave(simulator, **FIRST_ALONE, retry_after={"seconds": 0.3, "form": "retry-after-ms"})
    job_id = new_job_id()
    ends: list[JobResult] = []
    fields = {"task_type": "summarize", "prompt": "?", "model": "gpt-6-luna"}
    thread = threading.Thread(target=lambda: ends.append(Runner(settings).submit(fields, job_id)))
    thread.start()
    thread.join(SOON)
    assert [end.status for end in ends] == [JobStatus.SUCCEEDED]
    assert client.records.read([job_id])[0].attempts > 1  # it was put back in between


def test_job_of_a_canvas_that_is_cancelled_while_it_waits_ends_at_once(
    simulator: Simulator, settings: Settings, client: Client, until: Any
) -> None:
    """Its thread is told, and does not sleep until the job would have been due."""
    behave(simulator, errors={"rate_limited": 1}, retry_after={"seconds": 600})
    job_id = new_job_id()
    ends: list[JobResult] = []
    fields = {"task_type": "summarize", "prompt": "?", "model": "gpt-6-luna"}
    thread = threading.Thread(target=lambda: ends.append(Runner(settings).submit(fields, job_id)))
    thread.start()
    until(lambda: client.status(job_id) is JobStatus.WAITING)
    assert client.cancel(job_id)
    thread.join(SOON)
    assert [end.status for end in ends] == [JobStatus.CANCELLED]
    assert len(ends[0].attempts) == 1


def test_wake_up_is_the_one_that_submission_sends(client: Client, app: Celery, until: Any) -> None:
    """With the job's id as task id, and its priority; one that is lost is sent again, until the job is claimed."""
    job_id = put_back(client.records, 0.001, priority=3)
    sweeper = Sweeper(app, resend_seconds=0.5)
    for _ in range(2):
        sent: list[tuple[str, int]] = until(lambda: sweeper.sweep() and messages(app))
        assert sent == [(job_id, 3)]
    client.cancel(job_id)
    sweeper.sweep()
    assert messages(app) == []


def test_two_workers_that_sweep_wake_a_job_once(client: Client, app: Celery, until: Any) -> None:
    """Whoever sweeps: within the resend time there is one message, also when the lease changes hands."""
    job_id = put_back(client.records, 0.001)
    first, second = Sweeper(app, lease_seconds=0.01), Sweeper(app, lease_seconds=0.01)
    first.start()
    second.start()
    found: list[tuple[str, int]] = []
    until(lambda: found.extend(messages(app)) or found)
    later = put_back(client.records, 0.001)
    until(lambda: found.extend(messages(app)) or len(found) > 1)
    first.stop()
    second.stop()
    assert sorted(found + messages(app)) == sorted([(job_id, 5), (later, 5)])


def test_killed_worker_is_followed_by_another(
    environ: dict[str, str],
    settings: Settings,
    client: Client,
    redis: Redis,
    until: Any,
    start_worker: Callable[..., LocalWorker],
) -> None:
    """Workers that have had no job yet sweep too; the lease of a dead one runs out within seconds."""
    lease = FleetKeys(settings.namespace).sweeper
    first = start_worker(environ, concurrency=1)
    leader = until(lambda: redis.get(lease))
    start_worker(environ, concurrency=1)
    assert first.process is not None
    first.process.send_signal(signal.SIGKILL)
    job_id = put_back(client.records, 0.5, model="gpt-6-luna")
    assert client.result(job_id, SOON).succeeded
    assert redis.get(lease) not in (leader, None)
    assert redis.zcard(JobKeys.of(settings.namespace, job_id).due) == 0


def test_stopped_worker_leaves_the_lease(settings: Settings, app: Celery, until: Any, redis: Redis) -> None:
    """A rolling restart costs waiting jobs no time."""
    sweeper = Sweeper(app)
    sweeper.start()
    until(lambda: redis.exists(FleetKeys(settings.namespace).sweeper))
    sweeper.stop()
    assert DueJobs(settings).lead("another", 1.0)


def test_sweeper_lives_through_an_outage_and_complains_once(
    make_environ: Any, simulator: Simulator, tmp_path: Any, until: Any, caplog: Any
) -> None:
    """Redis comes back, and so do the wake-ups; the log has one line, without the password."""
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    settings = Settings.load(environ=make_environ(simulator, REDIS_URL=server.url, REDIS_TIMEOUT_SECONDS=1))
    records = Records(settings)
    job_id = put_back(records, 0.001)
    server.stop()
    with make_app(settings) as app:
        sweeper = Sweeper(app)
        sweeper.start()
        complaints = "jobs that are due are not woken"
        until(lambda: complaints in caplog.text)
        server.start()
        assert until(lambda: messages(app)) == [(job_id, 5)]
        sweeper.stop()
    records.close()
    server.stop()
    assert caplog.text.count(complaints) == 1
    assert server._password not in caplog.text
