"""Several workers, sweepers and callers at one job, in any order: each life of it has one end, and only one."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis import Redis

from attune_worker.jobs import JobStatus
from attune_worker.settings import Settings
from attune_worker.store.due import WAKE
from attune_worker.store.keys import JobKeys
from attune_worker.store.records import Claim, Finish, Records
from tests.store.job_lab import RETENTION_SECONDS, accepted, claimed, end, indexes_of, new_job

JOBS = 2
MAX_CRASHES = 2
LOOKS = 500
"""How often is looked for what was told, before it counts as missing: a cluster's nodes tell each other first."""

INDEXES = {
    JobStatus.QUEUED: {"queued", "due"},
    JobStatus.RUNNING: {"running"},
    JobStatus.WAITING: {"due"},
    JobStatus.DEAD: {"dead", "ended"},
}
RETRIED = {JobStatus.DEAD, JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED}

jobs = st.integers(0, JOBS - 1)
owners = st.sampled_from(["owner-1", "owner-2", "owner-3"])
leases = st.sampled_from(["lease-1", "lease-2"])
fences = st.sampled_from([0, 0, 0, -1, 1])
"""How far from the current one."""


@dataclass
class Life:
    """What a job's record should say; each method does what a script does, and returns its answer."""

    fence: int
    status: JobStatus = JobStatus.QUEUED
    starts: int = 0
    crashes: int = 0
    owner: str = ""
    worker: str = ""
    cancelled: bool = False
    late: bool = False
    overdue: bool = False
    ahead: bool = False
    announced: bool = False
    result: tuple[JobStatus, str] | None = None
    ends: int = 0

    def claim(self, owner: str, worker: str) -> JobStatus | int:
        """Return the fence, or the state that forbids it."""
        if self.status is JobStatus.RUNNING and self.owner == owner:
            self.worker = worker
            return self.fence
        if self.owner == owner:
            return self.status
        if self.status not in {JobStatus.QUEUED, JobStatus.WAITING}:
            return self.status
        if self.late:
            return self.end(JobStatus.EXPIRED)
        self.status, self.owner, self.worker = JobStatus.RUNNING, owner, worker
        self.fence, self.starts, self.ahead = self.fence + 1, self.starts + 1, False
        return self.fence

    def finish(self, fence: int, status: JobStatus, content: str) -> Finish:
        if fence != self.fence:
            return Finish.STALE
        if self.status not in {JobStatus.RUNNING, JobStatus.WAITING}:
            return Finish.WRITTEN if self.result == (status, content) else Finish.STALE
        if self.cancelled and status is not JobStatus.CANCELLED:
            return Finish.CANCELLED
        self.result = (status, content)
        self.end(status)
        return Finish.WRITTEN

    def put_back(self, fence: int, *, at_once: bool) -> bool:
        if fence != self.fence or self.status is not JobStatus.RUNNING:
            return fence == self.fence and self.status is JobStatus.WAITING
        if self.cancelled:
            self.announced = True
            self.end(JobStatus.CANCELLED)
            return False
        self.status, self.overdue, self.ahead = JobStatus.WAITING, at_once or self.late, at_once
        return True

    def take_over(self, worker: str) -> JobStatus | None:
        if self.status is not JobStatus.RUNNING or self.worker != worker:
            return None
        self.crashes += 1
        if self.cancelled or self.crashes >= MAX_CRASHES:
            self.announced = True
            return self.end(JobStatus.CANCELLED if self.cancelled else JobStatus.DEAD)
        self.status, self.overdue, self.ahead = JobStatus.WAITING, True, True
        return self.status

    def cancel(self) -> JobStatus:
        if self.status in {JobStatus.QUEUED, JobStatus.WAITING}:
            self.announced = self.status is JobStatus.WAITING
            return self.end(JobStatus.CANCELLED)
        if self.status is JobStatus.RUNNING:
            self.cancelled = True
            return JobStatus.CANCELLED
        return self.status

    def wake(self) -> int:
        if self.status in {JobStatus.QUEUED, JobStatus.WAITING} and self.late:
            self.end(JobStatus.EXPIRED)
        self.announced = False
        if self.status in {JobStatus.QUEUED, JobStatus.RUNNING}:
            return -1
        return 0 if self.ahead else 5

    def retry(self) -> JobStatus | None:
        if self.status not in RETRIED:
            return None
        before, self.status, self.result, self.cancelled = self.status, JobStatus.QUEUED, None, False
        self.starts = self.crashes = 0
        self.owner = ""
        self.ahead = self.announced = False
        return before

    def end(self, status: JobStatus) -> JobStatus:
        assert not self.status.ended
        self.status, self.ends = status, self.ends + 1
        return status


class Fleet(RuleBasedStateMachine):
    """Each rule does one thing to one job, and to the model of it; both must give the same answer."""

    records: Records
    redis: Redis
    namespace: str
    heard: Callable[[], list[bytes]]

    def __init__(self) -> None:
        super().__init__()
        self.jobs = [new_job(deadline_seconds=1000) for _ in range(JOBS)]
        self.ids = [job_id for job_id, _, _ in self.jobs]
        self.records.accept(self.jobs)
        self.lives = [Life(int(self.redis.hget(self._keys(job).record, "fence"))) for job in range(JOBS)]
        self.heard()

    @rule(job=jobs, owner=owners, lease=leases)
    def claim(self, job: int, owner: str, lease: str) -> None:
        answer = self.records.claim(self.ids[job], owner, lease)
        assert (answer.fence if isinstance(answer, Claim) else answer) == self.lives[job].claim(owner, lease)

    @rule(
        job=jobs,
        off=fences,
        status=st.sampled_from([JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED]),
        content=st.sampled_from("ab"),
    )
    def finish(self, job: int, off: int, status: JobStatus, content: str) -> None:
        fence = self.lives[job].fence + off
        answer = self.records.finish(fence, end(self.ids[job], status, content=content))
        assert answer is self.lives[job].finish(fence, status, content)

    @rule(job=jobs, off=fences, at_once=st.booleans())
    def put_back(self, job: int, off: int, at_once: bool) -> None:
        fence = self.lives[job].fence + off
        answer = self.records.put_back(self.ids[job], fence, 0.0 if at_once else 1000.0, "busy", ())
        assert answer is self.lives[job].put_back(fence, at_once=at_once)

    @rule(job=jobs, lease=leases)
    def take_over(self, job: int, lease: str) -> None:
        assert self.records.take_over(self.ids[job], lease, (), "lost") is self.lives[job].take_over(lease)

    @rule(job=jobs)
    def cancel(self, job: int) -> None:
        assert self.records.cancel(self.ids[job]) is self.lives[job].cancel()

    @rule(job=jobs)
    def retry(self, job: int) -> None:
        assert self.records.retry(self.ids[job]) is self.lives[job].retry()

    @rule(job=jobs)
    def submit_again(self, job: int) -> None:
        life = self.lives[job]
        due = life.status is JobStatus.QUEUED or (life.status is JobStatus.WAITING and life.overdue)
        assert self.records.accept([self.jobs[job]])[0].wake is due

    @rule(job=jobs)
    def wake(self, job: int) -> None:
        answer = WAKE(self.redis, self._keys(job).all, (self.ids[job], 1000, 1000, RETENTION_SECONDS))
        assert answer == self.lives[job].wake()

    @rule(job=jobs, late=st.sampled_from([False, False, True]))
    def deadline_passes(self, job: int, late: bool) -> None:
        if late and not self.lives[job].late:
            self.redis.hset(self._keys(job).record, "deadline_ms", 1)
            self.lives[job].late = True

    @invariant()
    def record_and_indexes_say_what_the_model_says(self) -> None:
        for job, (record, life) in enumerate(
            zip(self.records.watch(self.ids, self.namespace), self.lives, strict=True)
        ):
            assert (record.status, record.crashes, record.attempts) == (life.status, life.crashes, life.starts)
            indexes = INDEXES.get(life.status, {"ended"}) | ({"due"} if life.announced else set())
            assert indexes_of(self.redis, self._keys(job), record.job_id) == indexes
            worker = life.worker.encode() if life.status is JobStatus.RUNNING else None
            assert self.redis.hget(self._keys(job).running, record.job_id) == worker
            assert (self.redis.ttl(self._keys(job).record) > 0) is life.status.ended
            if life.result is not None:
                result = record.to_result()
                assert (result.status, result.content) == life.result

    def teardown(self) -> None:
        """Whoever waited was told of each end, once."""
        expected = Counter({job_id.encode(): life.ends for job_id, life in zip(self.ids, self.lives, strict=True)})
        told: Counter[bytes] = Counter()
        for _ in range(LOOKS):
            told.update(self.heard())
            if told.total() >= expected.total():
                break
        told.update(self.heard())
        assert +told == +expected

    def _keys(self, job: int) -> JobKeys:
        return JobKeys.of(self.namespace, self.ids[job])


def test_any_order_of_events_gives_each_life_one_end(settings: Settings, redis: Redis, heard: Any) -> None:
    """Late ends, dead workers, cancellations and retries: the record does what a plain model in Python does."""
    recovery = settings.recovery.model_copy(update={"max_crashes": MAX_CRASHES})
    records = Records(settings.model_copy(update={"recovery": recovery}))
    tools = {"records": records, "redis": redis, "namespace": settings.namespace, "heard": staticmethod(heard)}
    run_state_machine_as_test(
        type("Machine", (Fleet,), tools),
        settings=hypothesis_settings(
            max_examples=10,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
            database=None,
        ),
    )
    records.close()


class Crowd:
    """Threads that claim, end, put back, take over and cancel jobs as they come, and note what they were told."""

    def __init__(self, records: Records, ids: list[str], size: int = 8) -> None:
        self.fences: list[tuple[str, int]] = []
        self.written: list[tuple[str, str]] = []
        self._records = records
        self._ids = ids
        self._start = threading.Barrier(size)
        threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        self._start.wait()
        for step in range(40):
            job_id, owner = chance.choice(self._ids), f"{seed}-{step}"
            claim = self._records.claim(job_id, owner, f"lease-{seed % 3}")
            if isinstance(claim, Claim):
                self._run(job_id, claim, owner, chance.random())
            elif chance.random() < 0.3:
                self._records.take_over(job_id, f"lease-{chance.randrange(3)}", (), "lost")
            elif chance.random() < 0.05:
                self._records.cancel(job_id)

    def _run(self, job_id: str, claim: Claim, content: str, chance: float) -> None:
        self.fences.append((job_id, claim.fence))
        if chance < 0.5:
            self._records.put_back(job_id, claim.fence, 0, "busy", ())
        elif self._records.finish(claim.fence, end(job_id, content=content)) is Finish.WRITTEN:
            self.written.append((job_id, content))


def test_any_number_at_once_give_a_job_one_end(records: Records, settings: Settings, heard: Any, until: Any) -> None:
    """Whatever eight threads do at once: no fence is given out twice, and of all ends one stands and is told."""
    ids = [accepted(records) for _ in range(12)]
    records.watch(ids, settings.namespace)
    crowd = Crowd(records, ids)
    for job_id, lease in list(records.running()):
        records.take_over(job_id, lease, (), "lost")
    for job_id in ids:
        records.cancel(job_id)
    assert len(crowd.fences) == len(set(crowd.fences))
    contents = dict(crowd.written)
    assert len(contents) == len(crowd.written) > 0
    for record in records.read(ids):
        assert record.status.ended
        assert (record.status is JobStatus.SUCCEEDED) == (record.job_id in contents)
        assert record.to_result().content == contents.get(record.job_id)
    told: list[bytes] = []
    until(lambda: told.extend(heard()) or len(told) >= len(ids))
    assert sorted(told + heard()) == sorted(job_id.encode() for job_id in ids)


def test_many_who_retry_a_job_put_it_in_line_once(records: Records) -> None:
    """One of them is told so; the others find it queued."""
    job_id = accepted(records)
    records.finish(claimed(records, job_id).fence, end(job_id, JobStatus.FAILED))
    start = threading.Barrier(8)
    answers: list[JobStatus | None] = []

    def ask() -> None:
        start.wait()
        answers.append(records.retry(job_id))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers, key=str) == [None] * 7 + [JobStatus.FAILED]
