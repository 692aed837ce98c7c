from typing import Any

import pytest
from redis import Redis

from attune_worker.jobs import JobStatus
from attune_worker.store.keys import FleetKeys
from attune_worker.store.records import RETRY, Finish, Records
from tests.store.job_lab import (
    LEASE,
    accepted,
    call,
    claimed,
    end,
    indexes_of,
    new_job,
    redis_now_ms,
    status_of,
    wait_on_the_clock_of_redis,
    waiting,
)


def ended(records: Records, how: JobStatus, **fields: Any) -> str:
    """Return a job that ended in this way."""
    if how is JobStatus.CANCELLED:
        job_id = waiting(records, 60.0, call(), **fields)
        assert records.cancel(job_id) is how
        return job_id
    job_id = accepted(records, **fields)
    for _ in range(3):
        claim = claimed(records, job_id)
        if how is not JobStatus.DEAD:
            assert records.finish(claim.fence, end(job_id, how, attempts=(call(),))) is Finish.WRITTEN
            return job_id
        records.take_over(job_id, LEASE, (call(),), "it was killed")
    return job_id


ENDS = [JobStatus.DEAD, JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED]


@pytest.mark.parametrize("how", ENDS)
def test_job_without_an_answer_goes_back_in_line_as_new(
    records: Records, redis: Redis, keys: Any, how: JobStatus
) -> None:
    """Nothing of its first life counts against it, and its record stays until it has ended again."""
    job_id = ended(records, how, deadline_seconds=100, metadata={"a": 1})
    before = records.read([job_id])[0]
    assert (before.status, before.attempts) == (how, 3 if how is JobStatus.DEAD else 1)
    wait_on_the_clock_of_redis(redis, (before.ended_ms or 0) + 2)
    assert records.retry(job_id) is how
    record = records.read([job_id])[0]
    assert (record.status, record.attempts, record.crashes, record.lost) == (JobStatus.QUEUED, 0, 0, ())
    assert (record.result, record.progress, record.reason, record.started_ms) == (None, (), None, None)
    assert (record.ended_ms, record.cancelled_ms, record.worker) == (None, None, None)
    assert (record.accepted_ms or 0) > (before.accepted_ms or 0)
    assert record.deadline_ms == (record.accepted_ms or 0) + 100_000
    assert redis.ttl(keys(job_id).record) == -1
    assert indexes_of(redis, keys(job_id), job_id) == {"queued", "due"}
    claim = claimed(records, job_id, "worker-9")
    assert (claim.attempts, claim.crashes) == ((), 0)
    assert records.finish(claim.fence, end(job_id, content="at last")) is Finish.WRITTEN
    assert records.read([job_id])[0].to_result().content == "at last"


def test_job_that_was_cancelled_while_it_ran_is_not_cancelled_again(records: Records) -> None:
    """The mark goes with the life that it was about."""
    job_id = accepted(records)
    first = claimed(records, job_id)
    records.cancel(job_id)
    assert records.finish(first.fence, end(job_id, JobStatus.CANCELLED)) is Finish.WRITTEN
    assert records.retry(job_id) is JobStatus.CANCELLED
    assert records.cancelled([job_id]) == set()
    second = claimed(records, job_id, "worker-2")
    assert records.finish(second.fence, end(job_id)) is Finish.WRITTEN


def test_whoever_ran_it_before_cannot_end_it_now(records: Records) -> None:
    """The fencing token goes on from where it was."""
    job_id = accepted(records)
    first = claimed(records, job_id)
    records.finish(first.fence, end(job_id, JobStatus.FAILED))
    records.retry(job_id)
    for status in (JobStatus.FAILED, JobStatus.SUCCEEDED):
        assert records.finish(first.fence, end(job_id, status)) is Finish.STALE
    assert records.put_back(job_id, first.fence, 1.0, "busy", ()) is False
    assert claimed(records, job_id, "worker-2").fence > first.fence
    assert records.finish(first.fence, end(job_id)) is Finish.STALE


def test_what_is_under_way_or_answered_cannot_be_retried(records: Records, redis: Redis, keys: Any) -> None:
    """Nor what is unknown, nor what has no prompt any more; and nothing changes."""
    queued, later, running, done, bare = (
        accepted(records),
        waiting(records),
        accepted(records),
        accepted(records),
        ended(records, JobStatus.FAILED),
    )
    claimed(records, running)
    records.finish(claimed(records, done).fence, end(done))
    redis.hdel(keys(bare).record, "job")
    jobs = [queued, later, running, done, bare]
    before = [redis.hgetall(keys(job_id).record) for job_id in jobs]
    assert [records.retry(job_id) for job_id in [*jobs, "nobody"]] == [None] * 6
    assert [redis.hgetall(keys(job_id).record) for job_id in jobs] == before
    assert redis.exists(keys("nobody").record) == 0


def test_request_whose_answer_was_lost_is_the_same_request(records: Records, redis: Redis, keys: Any) -> None:
    """It is sent again when a connection breaks, and must not look like a refusal then; another one is refused."""
    job_id = ended(records, JobStatus.FAILED)
    first = RETRY(redis, keys(job_id).all, (job_id, "token"))
    accepted_ms = records.read([job_id])[0].accepted_ms
    wait_on_the_clock_of_redis(redis, (accepted_ms or 0) + 2)
    assert RETRY(redis, keys(job_id).all, (job_id, "token")) == first == b"failed"
    assert records.read([job_id])[0].accepted_ms == accepted_ms
    assert RETRY(redis, keys(job_id).all, (job_id, "another")) is None
    assert records.retry(job_id) is None


def test_retried_job_is_still_the_one_of_its_key(records: Records, redis: Redis) -> None:
    """Submitting it again wakes it; submitting another under its id is refused."""
    job = new_job()
    records.accept([job])
    records.finish(claimed(records, job[0]).fence, end(job[0], JobStatus.FAILED))
    assert records.accept([job])[0].wake is False
    records.retry(job[0])
    assert records.accept([job])[0].wake is True
    assert records.accept([(job[0], *new_job(prompt="another")[1:])])[0].conflict
    assert status_of(records, job[0]) is JobStatus.QUEUED
    assert (records.read([job[0]])[0].accepted_ms or 0) <= redis_now_ms(redis)


def test_the_calls_of_its_former_life_are_none_of_the_new_one(records: Records, redis: Redis) -> None:
    """Should a worker die with it again, its history begins with the retry; what it cost before is in the ledger."""
    job_id = ended(records, JobStatus.FAILED)
    calls = FleetKeys(records._settings.namespace).job_calls(job_id)
    redis.rpush(calls, "a call")
    assert records.retry(job_id) is JobStatus.FAILED
    assert not redis.exists(calls)


def test_the_calls_of_a_job_that_is_not_retried_stay(records: Records, redis: Redis) -> None:
    """One that runs needs them, should its worker be lost."""
    job = new_job()
    records.accept([job])
    claimed(records, job[0])
    calls = FleetKeys(records._settings.namespace).job_calls(job[0])
    redis.rpush(calls, "a call")
    assert records.retry(job[0]) is None
    assert redis.exists(calls)
