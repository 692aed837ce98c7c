"""Which jobs are taken from whom? The sweeper's part in it, over a real Redis and without worker processes."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from celery import Celery
from redis import Redis

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import Attempt, Decision, Job, JobResult, JobStatus
from attune_worker.ledger import Ledger
from attune_worker.models.admission import ADMIT
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys, JobKeys, new_job_id
from attune_worker.store.leases import Leases
from attune_worker.store.records import Claim, Finish, Records
from attune_worker.store.scripts import Script
from attune_worker.worker.liveness import Lease
from attune_worker.worker.recovery import TAKE_OVER_BATCH, Recovery, history
from attune_worker.worker.runner import Runner
from attune_worker.worker.sweeper import Sweeper
from tests.conftest import API_KEY, PATIENCE_SECONDS, answer_now

Until = Callable[[Callable[[], Any]], Any]
LONG = PATIENCE_SECONDS
SOON = 60.0


@pytest.fixture
def environ(make_environ: Any, simulator: Simulator) -> dict[str, str]:
    environ: dict[str, str] = make_environ(simulator, RECOVERY__LEASE_SECONDS=1)
    return environ


@pytest.fixture
def leases(settings: Settings) -> Iterator[Leases]:
    with closing(Leases(settings)) as found:
        yield found


@pytest.fixture
def recovery(settings: Settings) -> Iterator[Recovery]:
    with closing(Recovery(settings, audit_seconds=0.1)) as found:
        yield found


def claimed(records: Records, lease: str, **fields: Any) -> tuple[str, int]:
    """Return a job that runs under ``lease``, and its fence."""
    job_id = new_job_id()
    job = Job.parse({"task_type": "summarize", "prompt": "a prompt", "model": "gpt-6-luna", **fields})
    records.accept([(job_id, job, job.to_json())])
    claim = records.claim(job_id, new_job_id(), lease)
    assert isinstance(claim, Claim)
    return job_id, claim.fence


def state(records: Records, job_id: str) -> JobStatus:
    return records.read([job_id])[0].status


def test_jobs_of_a_dead_worker_wait_and_those_of_a_live_one_run_on(
    records: Records, leases: Leases, recovery: Recovery, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    """They are due at once, count one crash and say why; the log has a line for the worker."""
    caplog.set_level(logging.INFO)
    leases.beat("dead", 0.001, again=False)
    leases.beat("alive", LONG, again=False)
    lost = [claimed(records, "dead")[0] for _ in range(5)]
    kept = [claimed(records, "alive")[0] for _ in range(5)]
    until(lambda: recovery.step() and "worker dead was lost" in caplog.text)
    for record in records.read(lost):
        assert (record.status, record.crashes, record.reason) == (JobStatus.WAITING, 1, "its worker was lost")
        assert "worker dead was lost; no call was open" in record.lost[0]
        assert records.due_in_seconds(record.job_id) == 0
    assert {record.status for record in records.read(kept)} == {JobStatus.RUNNING}
    assert "worker dead was lost; 5 of its jobs were taken over" in caplog.text
    assert "alive" not in caplog.text


def test_job_under_a_lease_that_is_gone_is_found_without_a_death(
    records: Records, leases: Leases, recovery: Recovery, until: Until
) -> None:
    """The sweeper that saw the worker die may have died next, before it took a single job."""
    leases.beat("gone", LONG, again=False)
    job_id, _ = claimed(records, "gone")
    leases.drop("gone")
    until(lambda: recovery.step() and state(records, job_id) is JobStatus.WAITING)


def test_record_that_is_somebody_elses_holds_up_no_other(
    records: Records,
    recovery: Recovery,
    redis: Redis,
    settings: Settings,
    until: Until,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Jobs are taken over many at a time, and the one that cannot be is named."""
    job_ids = [claimed(records, "dead")[0] for _ in range(5)]
    redis.set(JobKeys.of(settings.namespace, job_ids[2]).record, "not a hash")
    others = [job_id for job_id in job_ids if job_id != job_ids[2]]
    until(lambda: recovery.step() is not None and all(state(records, one) is JobStatus.WAITING for one in others))
    assert f"job {job_ids[2]} of lost worker dead cannot be taken over" in caplog.text


def test_nobody_is_taken_over_before_leases_were_watched(
    records: Records, leases: Leases, make_environ: Any, simulator: Simulator, settings: Settings
) -> None:
    """A fleet's first sweep finds leases that ran out while nobody looked: their workers may be alive."""
    leases.beat("late", 0.001, again=False)
    job_id, _ = claimed(records, "late")
    environ = make_environ(simulator, NAMESPACE=settings.namespace, RECOVERY__LEASE_SECONDS=600)
    with closing(Recovery(Settings.load(environ=environ), audit_seconds=0)) as recovery:
        for _ in range(20):
            recovery.step()
    assert state(records, job_id) is JobStatus.RUNNING
    assert leases.beat("late", LONG, again=True)


def test_job_that_three_workers_died_with_is_dead(
    records: Records, recovery: Recovery, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end names all three, and so does the log's last word on it."""
    job_id, _ = claimed(records, "first")
    for lease, after in [("first", JobStatus.WAITING), ("second", JobStatus.WAITING), ("third", JobStatus.DEAD)]:
        until(lambda after=after: recovery.step() is not None and state(records, job_id) is after)
        if after is JobStatus.WAITING:
            following = {"first": "second", "second": "third"}[lease]
            assert isinstance(records.claim(job_id, new_job_id(), following), Claim)
    record = records.read([job_id])[0]
    error = record.to_result().error
    assert error is not None
    assert (error.type, record.crashes) == ("poison", 3)
    for lease, line in zip(["first", "second", "third"], record.lost, strict=True):
        assert f"worker {lease} was lost" in line
        assert line in error.message
    assert f"job {job_id} is dead" in caplog.text


def test_cancelled_job_of_a_dead_worker_is_not_run_again(records: Records, recovery: Recovery, until: Until) -> None:
    """Its worker was to stop it, and can no longer."""
    job_id, _ = claimed(records, "dead")
    assert records.cancel(job_id) is JobStatus.CANCELLED
    until(lambda: recovery.step() is not None and state(records, job_id) is JobStatus.CANCELLED)


def test_worker_that_is_lost_after_the_answer_and_before_the_end_costs_its_job_a_call_and_no_more(
    records: Records, leases: Leases, recovery: Recovery, settings: Settings, until: Until
) -> None:
    """Its only model has not failed: it is asked again, and both calls are in the result, each with its cost."""
    leases.beat("dead", LONG, again=False)
    job_id, _ = claimed(records, "dead")
    job = records.read_job(job_id)
    assert job is not None
    with EmpathyLLMExecutor(settings) as executor:
        answered = executor.execute(job, job_id=job_id, lease="dead")
    leases.drop("dead")
    until(lambda: recovery.step() is not None and state(records, job_id) is JobStatus.WAITING)
    with closing(Runner(settings)) as runner:
        result = runner.run(job_id)
    assert (result.status, result.content) == (JobStatus.SUCCEEDED, answered.content)
    assert [attempt.outcome for attempt in result.attempts] == ["succeeded", "succeeded"]
    assert result.attempts[0].call_id == answered.attempts[0].call_id
    assert result.cost_usd == sum(record.cost_usd or 0 for record in Ledger(settings).records())


@pytest.mark.parametrize(("again", "end"), [(False, Finish.WRITTEN), (True, Finish.STALE)])
def test_answer_that_comes_after_the_take_over_counts_until_the_job_runs_again(
    records: Records, recovery: Recovery, until: Until, again: bool, end: Finish
) -> None:
    """It was paid for; once another worker has the job, its answer is the one."""
    job_id, fence = claimed(records, "dead")
    until(lambda: recovery.step() is not None and state(records, job_id) is JobStatus.WAITING)
    if again:
        assert isinstance(records.claim(job_id, new_job_id(), "another"), Claim)
    answer = JobResult(job_id=job_id, status=JobStatus.SUCCEEDED, content="late")
    assert records.finish(fence, answer) is end
    assert records.read([job_id])[0].to_result().content == (None if again else "late")


def test_call_under_way_is_in_the_job_s_history(
    settings: Settings, simulator: Simulator, records: Records, leases: Leases, recovery: Recovery, until: Until
) -> None:
    """Orphaned, with the model that was called, also in the evidence; the call's own end is not waited for."""
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": LONG})
    leases.beat("dead", LONG, again=False)
    job_id, _ = claimed(records, "dead")
    executor = EmpathyLLMExecutor(settings)
    job = Job.parse({"task_type": "summarize", "prompt": "?", "model": "gpt-6-luna"})
    caller = threading.Thread(target=lambda: executor.execute(job, job_id=job_id, lease="dead"))
    caller.start()
    until(lambda: simulator.requests()["in_flight"])
    leases.drop("dead")
    until(lambda: recovery.step() and state(records, job_id) is JobStatus.WAITING)
    record = records.read([job_id])[0]
    assert [(call.outcome, call.model_id, call.cost_usd) for call in record.progress] == [
        ("orphaned", "gpt-6-luna", None)
    ]
    assert "openai/gpt-6-luna" in record.lost[0]
    answer_now(simulator)
    caller.join()
    executor.close()


class LateAnswer:
    """Passes connections on to Redis; the first answer to one script is kept from its asker until it is let go."""

    def __init__(self, port: int, script: Script) -> None:
        self._target = port
        self._sha = script.sha.encode()
        self.held, self.let_go = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open = [self._listener]
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def close(self) -> None:
        self.let_go.set()
        for one in self._open:
            with suppress(OSError):  # its other end is gone
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(SOON)
        for one in self._open:
            one.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += near, far
                asked = threading.Event()
                for ends in ((near, far, asked, self._ask), (far, near, asked, self._answer)):
                    self._threads.append(threading.Thread(target=self._pass_on, args=ends))
                    self._threads[-1].start()

    def _pass_on(
        self,
        source: socket.socket,
        sink: socket.socket,
        asked: threading.Event,
        look: Callable[[bytes, threading.Event], None],
    ) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                look(data, asked)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _ask(self, data: bytes, asked: threading.Event) -> None:
        if self._sha in data and not self.held.is_set():
            asked.set()

    def _answer(self, _: bytes, asked: threading.Event) -> None:
        if asked.is_set() and not self.let_go.is_set():
            self.held.set()
            self.let_go.wait(LONG)


def test_no_call_begins_under_a_lease_that_was_lost_after_leave_was_given(
    make_environ: Any, simulator: Simulator, settings: Settings, redis: Redis, leases: Leases, until: Until
) -> None:
    """As in a process that stood still with the leave in hand: the job is put back, and called for once, elsewhere."""
    redis.script_load(ADMIT.text)
    url = settings.redis_url.get_secret_value()
    port = urlsplit(url).port
    assert port is not None
    with closing(LateAnswer(port, ADMIT)) as late, closing(Records(settings)) as records:
        environ = make_environ(
            simulator,
            NAMESPACE=settings.namespace,
            RECOVERY__LEASE_SECONDS=8,  # an eighth of it Redis may take to answer
            REDIS_URL=url.replace(f":{port}", f":{late.port}"),
            REDIS_TIMEOUT_SECONDS=30,
        )
        job_id = new_job_id()
        job = Job.parse({"task_type": "summarize", "prompt": "a prompt", "model": "gpt-6-luna"})
        records.accept([(job_id, job, job.to_json())])
        with closing(Runner(Settings.load(environ=environ))) as slow:
            ends: list[JobResult] = []
            thread = threading.Thread(target=lambda: ends.append(slow.run(job_id)))
            thread.start()
            assert late.held.wait(SOON)
            [lease] = leases.live()
            leases.drop(lease)
            until(lambda: set(leases.live()) - {lease})
            late.let_go.set()
            thread.join(SOON)
        assert [(end.status, end.attempts) for end in ends] == [(JobStatus.WAITING, ())]
        assert simulator.invoice()["calls"] == []
        with closing(Runner(settings)) as another:
            assert another.run(job_id).succeeded
        assert len(simulator.invoice()["calls"]) == 1
        with closing(Ledger(settings)) as ledger:
            assert [record.outcome for record in ledger.records()] == ["succeeded"]
    assert redis.zcard(FleetKeys(settings.namespace).calls) == 0


def test_great_many_jobs_are_taken_over_bit_by_bit(records: Records, recovery: Recovery, until: Until) -> None:
    """No step takes so long that the sweeper would lose its lead, and all are taken."""
    count = 3 * TAKE_OVER_BATCH
    jobs = [claimed(records, f"dead-{number % 3}")[0] for number in range(count)]
    left = [count]

    def step() -> bool:
        recovery.step()
        now = records.counts()[JobStatus.RUNNING]
        assert left[-1] - now <= TAKE_OVER_BATCH
        left.append(now)
        return now == 0

    until(step)
    assert all(record.crashes == 1 for record in records.read(jobs))


def test_live_workers_that_come_and_go_lose_no_job(settings: Settings) -> None:
    """However the sweeper's looks fall between lease, claim and end: who lives is never taken for dead."""
    patient = settings.recovery.model_copy(update={"lease_seconds": 16})  # an eighth of it Redis may take to answer
    settings = settings.model_copy(update={"recovery": patient})
    stopping = threading.Event()
    jobs: list[str] = []
    ends: list[Finish] = []

    def work() -> None:
        records = Records(settings)
        while not stopping.is_set():
            lease = Lease(settings)
            try:
                job_id, fence = claimed(records, lease.id)
            except ServiceUnavailableError:  # the machine stood still, so that there is no lease, and no job yet
                continue
            jobs.append(job_id)
            ends.append(records.finish(fence, JobResult(job_id=job_id, status=JobStatus.SUCCEEDED, content="done")))
            lease.stop()
        records.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    busy = Recovery(settings, audit_seconds=0)
    for _ in range(200):
        busy.step()
    stopping.set()
    for thread in threads:
        thread.join()
    busy.close()
    with closing(Records(settings)) as records:
        found = records.read(jobs)
    assert len(found) > 20
    assert {(record.status, record.crashes, record.attempts) for record in found} == {(JobStatus.SUCCEEDED, 0, 1)}
    assert set(ends) == {Finish.WRITTEN}


def test_sweeper_wakes_what_it_took_over(settings: Settings, records: Records, until: Until) -> None:
    """In the same thread, within moments, and once."""
    job_id, _ = claimed(records, "dead")
    with make_app(settings) as app:
        sweeper = Sweeper(app)
        sweeper.start()
        assert until(lambda: wake_ups(app)) == [job_id]
        sweeper.stop()
        assert wake_ups(app) == []


def test_one_duty_that_fails_does_not_stop_the_others(
    make_environ: Any, simulator: Simulator, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a broker no job can be woken; the dead are found all the same, and the log says what is missing."""
    settings = Settings.load(
        environ=make_environ(simulator, RECOVERY__LEASE_SECONDS=1, BROKER_URL="redis://:hunter2@127.0.0.1:1/0")
    )
    with closing(Records(settings)) as records, make_app(settings) as app:
        waiting, _ = claimed(records, "dead")
        sweeper = Sweeper(app)
        sweeper.start()
        until(lambda: state(records, waiting) is JobStatus.WAITING and "are not woken" in caplog.text)
        later, _ = claimed(records, "dead too")
        until(lambda: state(records, later) is JobStatus.WAITING)
        sweeper.stop()
    assert "hunter2" not in caplog.text
    assert caplog.text.count("whose time has come are not woken") == 1


def test_calls_of_a_program_that_died_are_settled(
    settings: Settings, redis: Redis, until: Until, simulator: Simulator
) -> None:
    """They belong to no worker's lease, only to their own, which is long over."""
    calls = FleetKeys(settings.namespace).calls
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": LONG})
    executor = EmpathyLLMExecutor(settings)
    job = Job.parse({"task_type": "summarize", "prompt": "?", "model": "gpt-6-luna"})
    caller = threading.Thread(target=lambda: executor.execute(job))
    caller.start()
    until(lambda: simulator.requests()["in_flight"])
    [call] = redis.zrange(calls, 0, -1)
    redis.zadd(calls, {call: 1})
    with make_app(settings) as app:
        sweeper = Sweeper(app)
        sweeper.start()
        until(lambda: redis.zcard(calls) == 0)
        sweeper.stop()
    assert redis.hget(FleetKeys(settings.namespace).call(call.decode()), "state") == b"orphaned"
    answer_now(simulator)
    caller.join()
    executor.close()


def test_job_is_submitted_while_a_dead_worker_s_is_taken_over(
    settings: Settings, records: Records, until: Until
) -> None:
    """Both have one wake-up each."""
    lost, _ = claimed(records, "dead")
    with Client(settings) as client, make_app(settings) as app:
        fresh = client.submit("summarize", "?").id
        sweeper = Sweeper(app)
        sweeper.start()
        found: list[str] = []
        until(lambda: found.extend(wake_ups(app)) or len(found) > 1)
        sweeper.stop()
        assert sorted(found + wake_ups(app)) == sorted([lost, fresh])


def wake_ups(app: Celery) -> list[str]:
    """Take the wake-ups from the queue, and return their jobs."""
    found = []
    with app.connection_for_read() as connection, connection.SimpleQueue(app.conf.task_default_queue) as queue:
        while True:
            try:
                message = queue.get_nowait()
            except queue.Empty:
                return found
            found.append(message.headers["id"])
            message.ack()


def attempt_of(call_id: str | None, outcome: str, decision: Decision | None = None) -> Attempt:
    return Attempt.model_validate(
        {"model_id": "m", "provider": "p", "tier": "cheap", "outcome": outcome, "latency_ms": 1, "call_id": call_id}
    ).model_copy(update={"decision": decision})


def test_history_has_each_call_once_with_what_either_side_knows() -> None:
    """The record knows how the model was chosen, the calls know how they went; a call without Redis is kept."""
    decision = Decision(rule="static", workflow="w", stage="s", floor=0.8)
    known = [attempt_of("unlisted", "failed"), attempt_of("a", "orphaned", decision)]
    calls = [attempt_of("a", "succeeded"), attempt_of("b", "orphaned")]
    merged = history(known, calls)
    assert [(one.call_id, one.outcome, one.decision) for one in merged] == [
        ("unlisted", "failed", None),
        ("a", "succeeded", decision),
        ("b", "orphaned", None),
    ]
