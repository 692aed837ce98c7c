"""Do jobs run in real worker processes, over a real Redis and real HTTP, and who can see what?"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain
from redis import Redis

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.jobs import Job, JobResult, JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator, prompt_digest
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import JobKeys, new_job_id
from tests.conftest import PATIENCE_SECONDS, answer_now, longer_and_longer

SECRET = "zebra-crossing-4711"
SOON = 60.0


@dataclass
class Fleet:
    """A simulator, a client and a Celery app that share one namespace; workers are started by the tests."""

    environ: dict[str, str]
    simulator: Simulator
    client: Client
    app: Celery
    worker: LocalWorker | None = None

    @property
    def settings(self) -> Settings:
        return self.client.settings

    def billed(self) -> Decimal:
        return Decimal(self.simulator.invoice(summary=True)["total_usd"])

    def behave(self, **profile: Any) -> None:
        self.simulator.profile = Profile.parse(profile)
        self.simulator.reset()


@pytest.fixture(scope="module")
def make_fleet(make_environ: Any) -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def make(**overrides: object) -> Fleet:
        simulator = Simulator()
        environ = make_environ(simulator, **overrides)
        settings = Settings.load(environ=environ)
        fleets.append(Fleet(environ, simulator, Client(settings), make_app(settings)))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.client.close()
        fleet.app.close()
        fleet.simulator.close()


@pytest.fixture(scope="module")
def shared_fleet(make_fleet: Callable[..., Fleet], start_worker: Callable[..., LocalWorker]) -> Fleet:
    """Run one worker for many tests, at the most talkative log level."""
    fleet = make_fleet()
    fleet.worker = start_worker(fleet.environ, loglevel="debug")
    return fleet


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    shared_fleet.behave()
    return shared_fleet


def log_of(fleet: Fleet) -> str:
    assert fleet.worker is not None
    return fleet.worker.log.read_text(errors="replace")


def test_jobs_succeed_with_the_cost_that_was_billed(fleet: Fleet) -> None:
    """Each gets its own answer, and the sum is the provider's invoice to the nano-dollar."""
    prompts = [f"question {number}" for number in range(40)]
    handles = fleet.client.submit_many(
        [{"task_type": "summarize", "prompt": prompt, "metadata": {"n": n}} for n, prompt in enumerate(prompts)]
    )
    results = [handle.result(SOON) for handle in handles]
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert result.status is JobStatus.SUCCEEDED
        assert prompt_digest(prompt) in (result.content or "")
        assert result.metadata == {"n": number}
        assert (result.model_id, result.auth_mode, len(result.attempts)) == ("claude-haiku-5-5", "api", 1)
        assert result.queue_ms is not None
    assert fleet.simulator.invoice()["count"] == 40
    assert sum((result.cost_usd or Decimal(0) for result in results), Decimal(0)) == fleet.billed() > 0


def test_celery_result_is_a_summary(fleet: Fleet, until: Any) -> None:
    """An operator sees model, cost and time under the job's id; the answer is elsewhere."""
    handle = fleet.client.submit("summarize", SECRET)
    result = handle.result(SOON)
    until(lambda: fleet.app.backend.task_result_exists(handle.id))  # it would be read by the record otherwise
    summary = fleet.app.AsyncResult(handle.id).get(timeout=SOON)
    assert summary == {
        "job_id": handle.id,
        "status": "succeeded",
        "model_id": "claude-haiku-5-5",
        "provider": "anthropic",
        "tier": "cheap",
        "cost_usd": format(result.cost_usd or 0, "f"),
        "latency_ms": result.latency_ms,
        "queue_ms": result.queue_ms,
        "attempts": 1,
        "error_type": None,
    }


def submit_by_client(fleet: Fleet) -> str:
    return fleet.client.submit("summarize", SECRET, system=SECRET, metadata={"a": SECRET}).id


def submit_by_task(fleet: Fleet) -> str:
    job = {"task_type": "summarize", "prompt": SECRET, "system": SECRET, "metadata": {"a": SECRET}}
    return str(fleet.app.send_task("attune_worker.submit_job", [job]).id)


def submit_by_stranger(fleet: Fleet) -> str:
    """As a Celery client in another language may: its headers show the arguments."""
    job = {"task_type": "summarize", "prompt": SECRET}
    sent = fleet.app.send_task("attune_worker.submit_job", kwargs={"job": job}, argsrepr="()", kwargsrepr=repr(job))
    return str(sent.id)


@pytest.mark.parametrize("submit", [submit_by_client, submit_by_task, submit_by_stranger])
def test_prompt_and_answer_are_seen_by_nobody_who_watches_celery(
    fleet: Fleet, redis: Redis, until: Any, submit: Callable[[Fleet], str]
) -> None:
    """Not in the result backend, the log at debug level, ``inspect``, or events, however the job was submitted."""
    fleet.behave(latency=PATIENCE_SECONDS)
    fleet.app.control.broadcast("enable_events", reply=True, timeout=1)
    events: list[dict[str, Any]] = []
    ended = threading.Event()
    job_id = ""

    def listen() -> None:
        with fleet.app.connection_for_read() as connection:

            def hear(event: dict[str, Any]) -> None:
                events.append(event)
                if event["type"] == "task-succeeded" and event["uuid"] == job_id:
                    receiver.should_stop = True
                    ended.set()

            receiver = fleet.app.events.Receiver(connection, handlers={"*": hear})
            receiver.capture(limit=None, timeout=SOON, wakeup=False)

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: events or fleet.app.control.heartbeat())  # the receiver hears only what follows its subscription
    job_id = submit(fleet)
    until(lambda: fleet.simulator.requests()["in_flight"])
    active = until(lambda: fleet.app.control.inspect(timeout=0.5).active(safe=False))  # who answers in time is asked
    assert job_id in repr(active)
    answer_now(fleet.simulator)
    result = fleet.client.result(job_id, SOON)
    assert SECRET in (result.content or "")
    assert ended.wait(SOON)
    thread.join()
    fleet.app.control.broadcast("disable_events", reply=True, timeout=1)
    fleet.app.AsyncResult(job_id).get(timeout=SOON)

    backend = [redis.get(key) for key in redis.scan_iter(f"{fleet.settings.namespace}:celery:celery-task-meta-*")]
    seen = {"inspect": repr(active), "events": repr(events), "backend": repr(backend), "log": log_of(fleet)}
    assert {"task-received", "task-started", "task-succeeded"} <= {
        event["type"] for event in events if event.get("uuid") == job_id
    }
    assert job_id in seen["log"]
    for where, text in seen.items():
        assert SECRET not in text, where
        assert prompt_digest(SECRET, SECRET) not in text, where
        assert fleet.settings.providers["anthropic"].key() not in text, where


def test_failed_job_reads_failed(fleet: Fleet) -> None:
    """The Celery task succeeded in running it; the job's own end says that it failed, and why."""
    fleet.behave(errors={"bad_request": 1})
    handle = fleet.client.submit("summarize", "?", metadata={"ticket": 7})
    result = handle.result(SOON)
    assert (result.status, result.content, result.metadata) == (JobStatus.FAILED, None, {"ticket": 7})
    assert result.error is not None
    assert result.error.type == "bad_request"
    assert [attempt.outcome for attempt in result.attempts] == ["failed"]
    assert result.cost_usd == 0
    assert fleet.app.AsyncResult(handle.id).get(timeout=SOON)["error_type"] == "bad_request"


def test_job_whose_time_is_up_reads_expired(fleet: Fleet) -> None:
    """A provider that hangs does not hold the worker longer than the job's deadline."""
    fleet.behave(errors={"hang": 1})
    for seconds in longer_and_longer(0.5):  # a job that was late already is not called for
        result = fleet.client.submit("summarize", "?", deadline_seconds=seconds).result(SOON)
        if fleet.simulator.requests()["requests"]:
            break
    assert result.error is not None
    assert (result.status, result.error.type) == (JobStatus.EXPIRED, "deadline_exceeded")
    assert result.cost_usd is None


def test_retry_after_reaches_the_caller(fleet: Fleet) -> None:
    """Who submitted the job knows when to come again."""
    fleet.behave(errors={"rate_limited": 1}, retry_after={"seconds": 90})
    result = fleet.client.submit("summarize", "?", model="gpt-6-luna", deadline_seconds=60).result(SOON)
    assert result.error is not None
    assert (result.error.type, result.error.retry_after) == ("rate_limited", 90)


def test_two_wake_ups_run_a_job_once(fleet: Fleet, until: Any) -> None:
    """A doubled message does no harm, whether it comes while the job runs or after it."""
    fleet.behave(latency=PATIENCE_SECONDS)
    job = Job(task_type="summarize", prompt="twice")
    accepted = (new_job_id(), job, job.to_json())
    job_id = accepted[0]
    fleet.client.records.accept([accepted])
    fleet.client.wake([accepted[0]] * 3)
    until(lambda: fleet.simulator.requests()["in_flight"] and log_of(fleet).count(f"[{job_id}] ignored") == 2)
    answer_now(fleet.simulator)
    assert fleet.client.result(job_id, SOON).succeeded
    fleet.client.wake([accepted[0]])
    until(lambda: (log_of(fleet).count(f"[{job_id}] succeeded"), log_of(fleet).count(f"[{job_id}] ignored")) == (2, 2))
    assert fleet.app.AsyncResult(job_id).get(timeout=SOON)["status"] == "succeeded"  # not what a second one saw
    assert fleet.simulator.invoice()["count"] == 1
    assert fleet.client.records.read([job_id])[0].attempts == 1


def test_wake_up_without_a_record_harms_nobody(fleet: Fleet) -> None:
    """Its task fails with a typed error, under the right words, and the worker goes on."""
    with pytest.raises(Exception, match=r"^no job 'gone': it was never accepted here") as caught:
        fleet.app.send_task("attune_worker.run_job", ["gone"]).get(timeout=SOON)
    assert type(caught.value).__name__ == "JobNotFoundError"
    assert fleet.client.submit("summarize", "?").result(SOON).succeeded


def test_invalid_job_sent_as_a_task_is_refused(fleet: Fleet) -> None:
    """With the same words as in Python, without the prompt, and nothing was recorded."""
    job = {"task_type": "summarize", "prompt": SECRET, "maxtokens": 1}
    sent = fleet.app.send_task("attune_worker.submit_job", [job])
    with pytest.raises(Exception, match="unknown field; allowed: task_type") as caught:
        sent.get(timeout=SOON)
    assert SECRET not in str(caught.value)
    assert fleet.client.status(sent.id) is JobStatus.UNKNOWN
    assert SECRET not in log_of(fleet)


@pytest.mark.parametrize("garbage", ["{garbage", '{"v":99}', "", None])
def test_job_with_a_garbled_record_ends_failed(fleet: Fleet, redis: Redis, garbage: str | None) -> None:
    """It gets an end that says so, and the worker takes the next job."""
    job_id, job = new_job_id(), Job(task_type="summarize", prompt="?")
    fleet.client.records.accept([(job_id, job, garbage or "")])
    if garbage is None:
        redis.hdel(JobKeys.of(fleet.settings.namespace, job_id).record, "job")
    fleet.client.wake([job_id])
    result = fleet.client.result(job_id, SOON)
    assert result.error is not None
    assert (result.status, result.error.type) == (JobStatus.FAILED, "invalid_job")
    assert fleet.client.submit("summarize", "?").result(SOON).succeeded


PIPELINE = """
from attune_worker import result
from attune_worker.celery import app

@app.task
def measure(summary):
    return [summary["status"], result(summary["job_id"]).content]
"""


@pytest.fixture
def start_celery(tmp_path: Path, until: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that starts ``celery -A … worker`` and waits until it takes jobs."""
    started: list[subprocess.Popen[bytes]] = []

    def start(app: str, environ: dict[str, str]) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / "celery.log"
        path = os.pathsep.join([str(tmp_path), *sys.path])
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", app, "worker", "--concurrency=4", "--loglevel=info"],
                env={**os.environ, "PYTHONPATH": path, **environ},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        until(lambda: " ready." in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process, log

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(SOON)


def test_next_task_of_a_chain_reads_the_answer(
    make_fleet: Callable[..., Fleet], start_celery: Any, tmp_path: Path
) -> None:
    """A job is a task like others on a canvas: the summary is passed on, and the content fetched by its id."""
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    fleet = make_fleet()
    start_celery("pipeline", fleet.environ)
    job = {"task_type": "summarize", "prompt": "chained"}
    run = chain(
        fleet.app.signature("attune_worker.submit_job", args=[job]), fleet.app.signature("pipeline.measure")
    ).apply_async()
    status, content = run.get(timeout=SOON)
    assert status == "succeeded"
    assert prompt_digest("chained") in content
    assert run.parent.get(timeout=SOON)["model_id"] == "claude-haiku-5-5"


def test_plain_celery_command_runs_a_worker_that_ends_well(make_fleet: Callable[..., Fleet], start_celery: Any) -> None:
    """``celery -A attune_worker worker`` is enough: the app brings its pool and transport; SIGTERM ends it with 0."""
    fleet = make_fleet()
    process, log = start_celery("attune_worker", fleet.environ)
    assert fleet.client.submit("summarize", "?").result(SOON).succeeded
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 0
    assert "Traceback" not in log.read_text()


def test_urgent_jobs_come_first_and_cancelled_ones_never(
    make_fleet: Callable[..., Fleet], start_worker: Callable[..., LocalWorker]
) -> None:
    """With one thread the order is seen: by priority, within one by time; what was cancelled costs nothing."""
    fleet = make_fleet()
    priorities = [5, 9, 0, 5, 1, 9, 0]
    handles = fleet.client.submit_many(
        [{"task_type": "summarize", "prompt": str(n), "priority": p} for n, p in enumerate(priorities)]
    )
    cancelled = fleet.client.submit("summarize", "never", priority=0)
    assert cancelled.cancel()
    start_worker(fleet.environ, concurrency=1)
    assert all(result.succeeded for result in fleet.client.as_completed(handles, SOON))
    records = fleet.client.records.read([handle.id for handle in handles])
    ended = {result.job_id: result.attempts[0].request_id for result in (handle.result() for handle in handles)}
    billed = [call["request_id"] for call in fleet.simulator.invoice()["calls"]]
    order = sorted(range(len(handles)), key=lambda n: billed.index(ended[records[n].job_id] or ""))
    assert order == sorted(range(len(handles)), key=lambda n: (priorities[n], n))
    assert len(billed) == len(handles)
    assert cancelled.status() is JobStatus.CANCELLED
    assert fleet.client.records.read([cancelled.id])[0].attempts == 0


def test_prefork_pool_runs_jobs_too(make_fleet: Callable[..., Fleet], start_worker: Callable[..., LocalWorker]) -> None:
    """Processes instead of threads, each with connections of its own."""
    fleet = make_fleet()
    worker = start_worker(fleet.environ, pool="prefork", concurrency=2, loglevel="debug")
    handles = fleet.client.submit_many([{"task_type": "summarize", "prompt": SECRET + str(n)} for n in range(10)])
    results: list[JobResult] = [handle.result(SOON) for handle in handles]
    assert all(result.succeeded for result in results)
    assert sum((result.cost_usd or Decimal(0) for result in results), Decimal(0)) == fleet.billed()
    assert fleet.app.AsyncResult(handles[0].id).get(timeout=SOON)["status"] == "succeeded"
    assert SECRET not in worker.log.read_text()
    worker.terminate()
    assert worker.process is not None
    assert worker.process.wait(SOON) == 0


def test_wrong_configuration_stops_the_worker_with_one_line(make_environ: Any, fleet: Fleet) -> None:
    """Exit code 2 and the name of the variable, under either command."""
    environ = {**os.environ, **make_environ(fleet.simulator, CONCURRENCY="many")}
    for command in (["attune_worker", "worker"], ["celery", "-A", "attune_worker", "worker"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "ATTUNE_CONCURRENCY" in done.stderr
        assert "Traceback" not in done.stderr


def test_redis_behind_a_password_is_used_by_all_parts(fleet: Fleet, redis_server: EmbeddedRedis) -> None:
    """The URL has it; the log does not."""
    assert redis_server._password in redis_server.url
    assert redis_server._password not in log_of(fleet)
    assert json.dumps(fleet.app.control.ping(timeout=1))
