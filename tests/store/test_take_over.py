import threading
from contextlib import closing
from decimal import Decimal
from typing import Any

import pytest
from redis import Redis

from attune_worker.jobs import JobError, JobStatus
from attune_worker.settings import Settings
from attune_worker.store.due import DueJobs
from attune_worker.store.records import LOST, Finish, Records
from tests.store.job_lab import (
    LEASE,
    OTHER_LEASE,
    RETENTION_SECONDS,
    accepted,
    call,
    claimed,
    end,
    indexes_of,
    redis_now_ms,
    status_of,
)

ORPHAN = call(None, outcome="orphaned", error_type="worker_lost")


def lost(records: Records, job_id: str, lease: str = LEASE, evidence: str = "it was not heard of") -> JobStatus | None:
    return records.take_over(job_id, lease, (ORPHAN,), evidence)


def test_job_of_a_dead_worker_waits_and_is_due_at_once(
    records: Records, settings: Settings, redis: Redis, keys: Any
) -> None:
    """The next sweep wakes it before jobs that have not begun, and whoever claims it knows what its calls were."""
    job_id = accepted(records)
    first = claimed(records, job_id)
    assert lost(records, job_id, evidence="worker\n  a  was lost") is JobStatus.WAITING
    record = records.read([job_id])[0]
    assert (record.status, record.reason, record.worker) == (JobStatus.WAITING, LOST, LEASE)
    assert (record.crashes, record.lost, record.progress) == (1, ("worker a was lost",), (ORPHAN,))
    assert indexes_of(redis, keys(job_id), job_id) == {"due"}
    assert redis.ttl(keys(job_id).record) == -1
    due_jobs = DueJobs(settings)
    assert due_jobs.take().jobs == [(job_id, 0)]
    due_jobs.close()
    second = claimed(records, job_id, "worker-2", OTHER_LEASE)
    assert (second.attempts, second.crashes) == ((ORPHAN,), 1)
    assert second.fence > first.fence
    assert list(records.running()) == [(job_id, OTHER_LEASE)]


def test_only_the_worker_that_runs_it_can_lose_a_job(records: Records, redis: Redis, keys: Any) -> None:
    """A sweeper that is slow, or does it again, changes nothing."""
    job_id = accepted(records)
    assert lost(records, job_id) is None
    claimed(records, job_id)
    assert lost(records, job_id, OTHER_LEASE) is None
    assert lost(records, job_id) is JobStatus.WAITING
    assert lost(records, job_id) is None
    claim = claimed(records, job_id, "worker-2", OTHER_LEASE)
    assert lost(records, job_id) is None
    assert records.read([job_id])[0].crashes == 1
    assert indexes_of(redis, keys(job_id), job_id) == {"running"}
    records.finish(claim.fence, end(job_id))
    assert lost(records, job_id, OTHER_LEASE) is None
    assert lost(records, "nobody") is None
    assert status_of(records, job_id) is JobStatus.SUCCEEDED


def test_late_end_counts_until_somebody_else_starts_the_job(records: Records, redis: Redis, keys: Any) -> None:
    """An answer that was paid for is not thrown away, and never overwrites another one."""
    job_id = accepted(records)
    slow = claimed(records, job_id)
    lost(records, job_id)
    assert records.finish(slow.fence, end(job_id, content="late")) is Finish.WRITTEN
    assert records.read([job_id])[0].to_result().content == "late"
    assert indexes_of(redis, keys(job_id), job_id) == {"ended"}

    job_id = accepted(records)
    slow = claimed(records, job_id)
    lost(records, job_id)
    other = claimed(records, job_id, "worker-2", OTHER_LEASE)
    assert records.finish(slow.fence, end(job_id, content="late")) is Finish.STALE
    assert records.finish(other.fence, end(job_id, content="in time")) is Finish.WRITTEN
    assert records.finish(slow.fence, end(job_id, content="late")) is Finish.STALE
    assert records.read([job_id])[0].to_result().content == "in time"


def test_job_that_costs_three_workers_is_dead(records: Records, settings: Settings, redis: Redis, keys: Any) -> None:
    """No fourth one is risked, and its result says how each was lost."""
    job_id = accepted(records, metadata={"a": 1})
    records.watch([job_id], "channel")
    for number, expected in enumerate([JobStatus.WAITING, JobStatus.WAITING, JobStatus.DEAD]):
        claim = claimed(records, job_id, f"worker-{number}", f"lease-{number}")
        assert lost(records, job_id, f"lease-{number}", f"worker-{number} was not heard of") is expected
    result = records.read([job_id])[0].to_result()
    assert result.error == JobError(
        type="poison",
        message="3 workers were lost while they ran it: worker-0 was not heard of; worker-1 was not heard of; "
        "worker-2 was not heard of",
    )
    assert (result.status, result.attempts, result.cost_usd) == (JobStatus.DEAD, (ORPHAN,), None)
    assert result.metadata == {"a": 1}
    assert indexes_of(redis, keys(job_id), job_id) == {"ended", "dead", "due"}
    with closing(DueJobs(settings)) as due_jobs:
        assert due_jobs.take().jobs == [(job_id, 5)]  # a last wake-up: Celery has to hear of it
    assert indexes_of(redis, keys(job_id), job_id) == {"ended", "dead"}
    assert 0 < redis.ttl(keys(job_id).record) <= RETENTION_SECONDS
    assert redis.exists(keys(job_id).waiters) == 0
    assert records.claim(job_id, "worker-4", LEASE) is JobStatus.DEAD
    assert records.finish(claim.fence, end(job_id)) is Finish.STALE
    assert records.read_job(job_id) is not None


def test_dead_jobs_leave_the_index_after_their_records(records: Records, redis: Redis, keys: Any) -> None:
    """It lists what can be looked at, and does not grow for ever."""
    job_id = accepted(records)
    now_ms = redis_now_ms(redis)
    redis.zadd(keys(job_id).dead, {"gone": now_ms - RETENTION_SECONDS * 1000 - 1, "recent": now_ms})
    assert records.counts()[JobStatus.DEAD] == 1
    for _ in range(3):
        claimed(records, job_id)
        lost(records, job_id)
    assert set(redis.zrange(keys(job_id).dead, 0, -1)) == {b"recent", job_id.encode()}


def test_cancelled_job_of_a_dead_worker_ends_so(records: Records, settings: Settings, heard: Any) -> None:
    """Nobody starts it again only to stop it, and what it has cost is known."""
    job_id = accepted(records)
    claim = claimed(records, job_id, channel=settings.namespace)
    assert records.cancel(job_id) is JobStatus.CANCELLED
    records.watch([job_id], settings.namespace)
    assert records.take_over(job_id, LEASE, (call("0.5"), ORPHAN), "it was killed") is JobStatus.CANCELLED
    assert heard() == [job_id.encode()] * 2
    result = records.read([job_id])[0].to_result()
    assert result.error == JobError(type="cancelled", message="cancelled while it ran")
    assert (result.status, result.cost_usd, len(result.attempts)) == (JobStatus.CANCELLED, Decimal("0.5"), 2)
    assert records.finish(claim.fence, end(job_id)) is Finish.STALE
    assert records.cancelled([job_id]) == {job_id}


def test_slow_worker_hears_that_its_job_was_cancelled_meanwhile(
    records: Records, settings: Settings, heard: Any
) -> None:
    """It was taken over, but its worker may be at it yet; its call need not go on."""
    job_id = accepted(records)
    claimed(records, job_id, channel=settings.namespace)
    lost(records, job_id)
    assert records.cancel(job_id) is JobStatus.CANCELLED
    assert heard() == [job_id.encode()]
    assert records.cancelled([job_id]) == {job_id}


def test_lost_job_past_its_deadline_expires(records: Records, redis: Redis, keys: Any) -> None:
    """It did start, so its end does not claim that it had not."""
    job_id = accepted(records, deadline_seconds=100)
    claimed(records, job_id)
    lost(records, job_id)
    redis.hset(keys(job_id).record, "deadline_ms", redis_now_ms(redis))
    assert records.claim(job_id, "worker-2", OTHER_LEASE) is JobStatus.EXPIRED
    assert records.read([job_id])[0].to_result().error == JobError(
        type="deadline_exceeded", message=f"the deadline passed while it waited: {LOST}"
    )


@pytest.mark.parametrize("written", ["other lease", "queued"])
def test_index_that_is_wrong_is_put_right(records: Records, redis: Redis, keys: Any, written: str) -> None:
    """A sweeper that finds a job there under a dead lease does not find it again and again."""
    job_id = accepted(records)
    if written == "other lease":
        claimed(records, job_id, lease=OTHER_LEASE)
    redis.hset(keys(job_id).running, job_id, LEASE)
    assert lost(records, job_id) is None
    assert list(records.running()) == ([(job_id, OTHER_LEASE)] if written == "other lease" else [])


def test_running_record_without_a_worker_is_taken_over(records: Records, redis: Redis, keys: Any) -> None:
    """Whoever wrote to the record, the job goes on: the index follows the record, and then both agree."""
    job_id = accepted(records)
    claimed(records, job_id)
    redis.hdel(keys(job_id).record, "worker")
    assert lost(records, job_id, LEASE) is None
    assert list(records.running()) == [(job_id, "")]
    assert lost(records, job_id, "") is JobStatus.WAITING


def test_many_sweepers_take_a_job_over_once(records: Records) -> None:
    """Should several lead for a moment, one worker lost is one crash."""
    jobs = [accepted(records) for _ in range(20)]
    for job_id in jobs:
        claimed(records, job_id)
    start = threading.Barrier(8)
    states: list[JobStatus | None] = []

    def sweep() -> None:
        start.wait()
        states.extend(lost(records, job_id) for job_id in jobs)

    threads = [threading.Thread(target=sweep) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states.count(JobStatus.WAITING) == len(jobs)
    assert states.count(None) == 7 * len(jobs)
    assert {record.crashes for record in records.read(jobs)} == {1}
