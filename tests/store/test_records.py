import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import ConfigurationError, InvalidJobError, JobNotFoundError, ServiceUnavailableError
from attune_worker.jobs import JobError, JobStatus
from attune_worker.settings import Settings
from attune_worker.store.keys import idempotent_job_id
from attune_worker.store.records import WAITER_SECONDS, Claim, Finish, Records
from tests.store.job_lab import (
    LEASE,
    OTHER_LEASE,
    RETENTION_SECONDS,
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


def test_accepted_job_is_queued_and_does_not_expire(records: Records, redis: Redis, keys: Any) -> None:
    """An accepted job is on record until it has ended, however long that takes."""
    job_id, job, text = new_job(priority=2)
    before = redis_now_ms(redis)
    [acceptance] = records.accept([(job_id, job, text)])
    assert (acceptance.conflict, acceptance.wake) == (False, True)
    written = redis.hgetall(keys(job_id).record)
    assert (written[b"state"], written[b"job"], written[b"priority"]) == (b"queued", text.encode(), b"2")
    assert before <= int(written[b"accepted_ms"]) <= redis_now_ms(redis)
    assert redis.zscore(keys(job_id).queued, job_id) == int(written[b"accepted_ms"])
    assert redis.ttl(keys(job_id).record) == -1
    assert indexes_of(redis, keys(job_id), job_id) == {"queued"}


def test_accepting_again_changes_nothing_and_wakes_again(records: Records, redis: Redis, keys: Any) -> None:
    """A submission whose answer was lost is simply repeated."""
    job = new_job()
    records.accept([job])
    before = redis.hgetall(keys(job[0]).record)
    [again] = records.accept([job])
    assert (again.conflict, again.wake) == (False, True)
    assert redis.hgetall(keys(job[0]).record) == before


def test_job_that_runs_or_has_ended_is_not_woken_again(records: Records) -> None:
    """A repeated submission must not run a job twice."""
    job = new_job()
    records.accept([job])
    claim = claimed(records, job[0])
    assert records.accept([job])[0].wake is False
    records.finish(claim.fence, end(job[0]))
    [again] = records.accept([job])
    assert (again.conflict, again.wake) == (False, False)
    assert status_of(records, job[0]) is JobStatus.SUCCEEDED


def test_id_that_belongs_to_another_job_is_a_conflict(records: Records, redis: Redis, keys: Any) -> None:
    """One key, two prompts: the first keeps it, and the others of the batch are accepted."""
    job_id, job, text = new_job(prompt="one")
    records.accept([(job_id, job, text)])
    _, other_job, other_text = new_job(prompt="two")
    neighbour = new_job()
    answers = records.accept([(job_id, other_job, other_text), neighbour])
    assert [(answer.conflict, answer.wake) for answer in answers] == [(True, False), (False, True)]
    assert redis.hget(keys(job_id).record, "job") == text.encode()


def test_conflict_is_still_known_after_the_prompt_was_dropped(records: Records) -> None:
    """The digest stays for as long as the record, so a used key cannot be given a new job."""
    job_id, job, text = new_job(prompt="one")
    records.accept([(job_id, job, text)])
    records.finish(claimed(records, job_id).fence, end(job_id))
    _, other_job, other_text = new_job(prompt="two")
    assert records.accept([(job_id, other_job, other_text)])[0].conflict


def test_claim_hands_out_the_job_with_a_fence(records: Records, redis: Redis, keys: Any) -> None:
    """The worker gets all it needs in one round trip, and the job moves to the running index."""
    job_id, job, text = new_job(deadline_seconds=100)
    records.accept([(job_id, job, text)])
    claim = claimed(records, job_id)
    assert claim.job == text
    assert (claim.fence, claim.starts) == (claim.accepted_ms + 1, 1)
    assert 0 <= claim.queue_ms < 60_000
    assert claim.remaining_seconds is not None
    assert 40 < claim.remaining_seconds <= 100
    assert status_of(records, job_id) is JobStatus.RUNNING
    assert indexes_of(redis, keys(job_id), job_id) == {"running"}
    assert redis.hget(keys(job_id).running, job_id) == LEASE.encode()
    assert records.read([job_id])[0].worker == LEASE
    assert redis.ttl(keys(job_id).record) == -1


def test_job_without_a_deadline_has_all_the_time(records: Records) -> None:
    """No deadline is None, not zero seconds."""
    assert claimed(records, accepted(records)).remaining_seconds is None


def test_second_wake_up_finds_nothing_to_do(records: Records) -> None:
    """A doubled message must not run the job twice."""
    job_id = accepted(records)
    claimed(records, job_id, "worker-1")
    assert records.claim(job_id, "worker-2", LEASE) is JobStatus.RUNNING
    assert records.read([job_id])[0].attempts == 1


def test_same_owner_may_claim_again(records: Records) -> None:
    """A claim whose answer was lost on the network is repeated, and is the same claim."""
    job_id = accepted(records)
    first = claimed(records, job_id, "worker-1")
    again = claimed(records, job_id, "worker-1")
    assert again == dataclasses.replace(first, claimed_ms=again.claimed_ms)
    assert records.read([job_id])[0].attempts == 1


@pytest.mark.parametrize("how", ["put back", "taken over"])
def test_claim_that_arrives_after_its_run_is_over_takes_nothing(
    records: Records, redis: Redis, keys: Any, how: str
) -> None:
    """It was held up in the network and asked again meanwhile: the job would run for ever with nobody running it."""
    job_id = accepted(records)
    first = claimed(records, job_id, "worker-1")
    if how == "put back":
        records.put_back(job_id, first.fence, 60.0, "busy", ())
    else:
        records.take_over(job_id, LEASE, (), "lost")
    assert records.claim(job_id, "worker-1", LEASE) is JobStatus.WAITING
    assert status_of(records, job_id) is JobStatus.WAITING
    assert indexes_of(redis, keys(job_id), job_id) == {"due"}
    second = claimed(records, job_id, "worker-2")
    assert records.claim(job_id, "worker-1", LEASE) is JobStatus.RUNNING
    records.finish(second.fence, end(job_id, JobStatus.FAILED))
    assert records.claim(job_id, "worker-2", LEASE) is JobStatus.FAILED


def test_job_that_is_retried_may_be_claimed_by_any_owner(records: Records) -> None:
    """It begins anew, and so does the list of who had it: a message that is delivered again finds it queued."""
    job_id = accepted(records)
    first = claimed(records, job_id, "worker-1")
    records.finish(first.fence, end(job_id, JobStatus.FAILED))
    assert records.retry(job_id) is JobStatus.FAILED
    assert claimed(records, job_id, "worker-1").fence == first.fence + 1


def test_worker_of_a_job_that_is_long_over_ends_no_new_one_with_its_id(
    records: Records, redis: Redis, keys: Any, until: Any
) -> None:
    """A frozen worker wakes up when its job has ended elsewhere, expired, and its idempotency key was used again."""
    job_id = accepted(records)
    frozen = claimed(records, job_id, "frozen")
    redis.delete(keys(job_id).record)
    redis.hdel(keys(job_id).running, job_id)
    until(lambda: redis.time()[0] * 1000 > frozen.fence)  # the retention time is a second at least
    records.accept([(job_id, *new_job(prompt="another")[1:])])
    claim = claimed(records, job_id, "worker-1")
    assert records.finish(frozen.fence, end(job_id, content="of the old job")) is Finish.STALE
    assert not records.put_back(job_id, frozen.fence, 0.0, "its worker ends", ())
    assert records.finish(claim.fence, end(job_id)) is Finish.WRITTEN


@pytest.mark.parametrize("garbled", ["1e300", "9007199254740992", "-1", "1.5", "0x10", "nan", "x"])
def test_garbled_fence_keeps_no_job_from_its_end(records: Records, redis: Redis, keys: Any, garbled: str) -> None:
    """Whatever number somebody writes there, the next claim gets one that the record takes."""
    job_id = accepted(records)
    first = claimed(records, job_id, "worker-1")
    redis.hset(keys(job_id).record, "fence", garbled)
    assert records.finish(first.fence, end(job_id)) is Finish.STALE
    again = claimed(records, job_id, "worker-1")
    assert records.put_back(job_id, again.fence, 60.0, "busy", ())
    redis.hset(keys(job_id).record, "fence", garbled)
    assert records.finish(claimed(records, job_id, "worker-2").fence, end(job_id)) is Finish.WRITTEN


def test_fences_are_told_as_they_stand_for_jobs_of_one_lease(records: Records, redis: Redis, keys: Any) -> None:
    """A worker that finds it does not run a job puts it back with that, be it garbled."""
    mine, garbled, elsewhere, put_back = (accepted(records) for _ in range(4))
    fences = {
        job_id: claimed(records, job_id, lease=lease).fence
        for job_id, lease in [(mine, LEASE), (garbled, LEASE), (elsewhere, OTHER_LEASE), (put_back, LEASE)]
    }
    redis.hset(keys(garbled).record, "fence", b"1e300\xff")
    records.put_back(put_back, fences[put_back], 60.0, "busy", ())
    found = records.fences([mine, garbled, elsewhere, put_back, accepted(records), "nobody"], LEASE)
    assert found == {mine: b"%d" % fences[mine], garbled: b"1e300\xff"}
    assert all(records.put_back(job_id, fence, 0, "not run", ()) for job_id, fence in found.items())
    assert {status_of(records, job_id) for job_id in (mine, garbled)} == {JobStatus.WAITING}


def test_job_past_its_deadline_is_not_started(records: Records, redis: Redis, keys: Any) -> None:
    """An answer that nobody waits for any more is not paid for."""
    job_id = accepted(records, deadline_seconds=0.03)
    record = records.read([job_id])[0]
    assert record.deadline_ms == (record.accepted_ms or 0) + 30
    assert indexes_of(redis, keys(job_id), job_id) == {"queued", "due"}
    wait_on_the_clock_of_redis(redis, record.deadline_ms + 1)
    assert records.claim(job_id, "worker-2", LEASE) is JobStatus.EXPIRED
    result = records.read([job_id])[0].to_result()
    assert result.status is JobStatus.EXPIRED
    assert result.error == JobError(type="deadline_exceeded", message="the deadline passed before it started")
    assert indexes_of(redis, keys(job_id), job_id) == {"ended"}
    assert 0 < redis.ttl(keys(job_id).record) <= RETENTION_SECONDS


def test_longest_deadline_is_kept_exactly(records: Records) -> None:
    """Milliseconds of a year fit; Lua's numbers and Redis' integers must not garble them."""
    claim = claimed(records, accepted(records, deadline_seconds=366 * 86_400))
    assert claim.deadline_ms == claim.accepted_ms + 366 * 86_400_000


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.EXPIRED])
def test_end_is_kept_for_the_retention_time(records: Records, redis: Redis, keys: Any, status: JobStatus) -> None:
    """It can be read until then, and after that Redis is clean by itself."""
    job_id = accepted(records)
    claim = claimed(records, job_id)
    result = end(job_id, status, cost_usd=Decimal("0.000000001"), error=JobError(type="t", message="m"))
    assert records.finish(claim.fence, result) is Finish.WRITTEN
    record = records.read([job_id])[0]
    assert record.to_result() == result
    assert record.ended_ms is not None
    assert record.started_ms == claim.claimed_ms
    assert RETENTION_SECONDS - 60 < redis.ttl(keys(job_id).record) <= RETENTION_SECONDS
    assert indexes_of(redis, keys(job_id), job_id) == {"ended"}


def test_prompt_is_dropped_after_success_only(records: Records, redis: Redis, keys: Any) -> None:
    """What was answered is needed no more; what failed may be tried again."""
    for status, kept in [(JobStatus.SUCCEEDED, False), (JobStatus.FAILED, True)]:
        job_id = accepted(records)
        records.finish(claimed(records, job_id).fence, end(job_id, status))
        assert redis.hexists(keys(job_id).record, "job") is kept


def test_same_end_again_is_confirmed_and_another_end_is_not(records: Records) -> None:
    """An end whose answer was lost is repeated; the first end stands."""
    job_id = accepted(records)
    claim = claimed(records, job_id)
    assert records.finish(claim.fence, end(job_id, content="first")) is Finish.WRITTEN
    assert records.finish(claim.fence, end(job_id, content="first")) is Finish.WRITTEN
    assert records.finish(claim.fence, end(job_id, JobStatus.FAILED)) is Finish.STALE
    assert records.read([job_id])[0].to_result().content == "first"


@pytest.mark.parametrize("fence", [0, 2, -1])
def test_stale_fence_ends_nothing(records: Records, fence: int) -> None:
    """Only the holder of the current claim may write the end."""
    job_id = accepted(records)
    claimed(records, job_id)
    assert records.finish(fence, end(job_id)) is Finish.STALE
    assert status_of(records, job_id) is JobStatus.RUNNING


def test_job_that_is_gone_cannot_be_finished_or_claimed(records: Records, redis: Redis, settings: Settings) -> None:
    """After the retention time, nothing may write half a record back."""
    assert records.finish(1, end("gone")) is Finish.STALE
    assert records.claim("gone", "worker-1", LEASE) is JobStatus.UNKNOWN
    assert records.cancel("gone") is JobStatus.UNKNOWN
    assert records.watch(["gone"], "channel")[0].status is JobStatus.UNKNOWN
    assert list(redis.scan_iter(f"*{settings.namespace}*")) == []
    with pytest.raises(JobNotFoundError, match="gone"):
        records.read(["gone"])[0].to_result()


def test_queued_job_can_be_cancelled(records: Records, redis: Redis, keys: Any) -> None:
    """It never starts, says so, and goes after the retention time."""
    job_id = accepted(records)
    assert records.cancel(job_id) is JobStatus.CANCELLED
    assert records.cancel(job_id) is JobStatus.CANCELLED
    assert records.claim(job_id, "worker-1", LEASE) is JobStatus.CANCELLED
    result = records.read([job_id])[0].to_result()
    assert result.error is not None
    assert (result.status, result.error.type) == (JobStatus.CANCELLED, "cancelled")
    assert indexes_of(redis, keys(job_id), job_id) == {"ended"}
    assert 0 < redis.ttl(keys(job_id).record) <= RETENTION_SECONDS


def test_running_job_that_is_cancelled_ends_so_whatever_happens(
    records: Records, redis: Redis, settings: Settings, keys: Any, heard: Any
) -> None:
    """Its worker is told, each time it is asked for, and no other end is taken from then on."""
    job_id = accepted(records, metadata={"a": 1})
    claim = claimed(records, job_id, channel=settings.namespace)
    assert records.cancelled([job_id]) == set()
    assert records.cancel(job_id) is records.cancel(job_id) is JobStatus.CANCELLED
    assert heard() == [job_id.encode()] * 2
    assert status_of(records, job_id) is JobStatus.RUNNING
    assert records.cancelled([job_id, accepted(records), "nobody"]) == {job_id}
    for status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.EXPIRED):
        assert records.finish(claim.fence, end(job_id, status)) is Finish.CANCELLED
    assert records.read([job_id])[0].result is None
    result = end(job_id, JobStatus.CANCELLED, cost_usd=Decimal("0.5"), attempts=(call("0.5"),))
    assert records.finish(claim.fence, result) is Finish.WRITTEN
    assert records.read([job_id])[0].to_result() == result
    assert records.cancel(job_id) is JobStatus.CANCELLED
    assert heard() == []
    assert indexes_of(redis, keys(job_id), job_id) == {"ended"}


def test_running_job_that_is_cancelled_cannot_wait(records: Records, redis: Redis, keys: Any) -> None:
    """It ends where it would have been put back, with what it has cost so far."""
    job_id = accepted(records)
    claim = claimed(records, job_id)
    records.cancel(job_id)
    for _ in range(2):
        assert records.put_back(job_id, claim.fence, 60.0, "busy", (call("0.5"),)) is False
    result = records.read([job_id])[0].to_result()
    assert result.error == JobError(type="cancelled", message="cancelled while it ran")
    assert (result.status, result.cost_usd, result.attempts) == (JobStatus.CANCELLED, Decimal("0.5"), (call("0.5"),))
    assert indexes_of(redis, keys(job_id), job_id) == {"ended", "due"}  # for a last wake-up


def test_worker_that_has_put_a_job_back_hears_no_more_of_it(records: Records, settings: Settings, heard: Any) -> None:
    """The job is not its own any more, so there is nothing to stop."""
    job_id = accepted(records)
    claim = claimed(records, job_id, channel=settings.namespace)
    records.put_back(job_id, claim.fence, 60.0, "busy", ())
    records.cancel(job_id)
    assert heard() == []


def test_ended_job_is_not_cancelled(records: Records) -> None:
    """The answer says how it ended instead."""
    job_id = accepted(records)
    assert records.finish(claimed(records, job_id).fence, end(job_id)) is Finish.WRITTEN
    assert records.cancel(job_id) is JobStatus.SUCCEEDED
    assert records.cancelled([job_id]) == set()


def test_job_that_was_put_back_goes_on_elsewhere(records: Records, redis: Redis, keys: Any) -> None:
    """It leaves its worker and the running index, and whoever takes it next knows of its calls so far."""
    job_id = accepted(records)
    first = claimed(records, job_id, "worker-1")
    calls = (call(), call(None, error_type="timeout"))
    assert records.put_back(job_id, first.fence, 60.0, "p is busy", calls)
    record = records.read([job_id])[0]
    assert (record.status, record.reason, record.progress) == (JobStatus.WAITING, "p is busy", calls)
    assert redis.zscore(keys(job_id).due, job_id) == record.due_ms
    assert first.claimed_ms + 60_000 <= (record.due_ms or 0) <= redis_now_ms(redis) + 60_000
    assert 50 < (records.due_in_seconds(job_id) or 0) <= 60
    assert indexes_of(redis, keys(job_id), job_id) == {"due"}
    assert redis.ttl(keys(job_id).record) == -1

    second = claimed(records, job_id, "worker-2")
    assert second.attempts == calls
    assert second.fence > first.fence
    assert second.queue_ms == first.queue_ms
    assert redis.zscore(keys(job_id).due, job_id) is None
    assert records.due_in_seconds(job_id) is None
    assert records.finish(first.fence, end(job_id, content="late")) is Finish.STALE
    assert records.finish(second.fence, end(job_id)) is Finish.WRITTEN
    record = records.read([job_id])[0]
    assert (record.attempts, record.started_ms, record.progress) == (2, first.claimed_ms, ())


def test_putting_back_is_repeatable_and_fenced(records: Records, redis: Redis, keys: Any) -> None:
    """An answer that was lost is asked for again; a worker that lost its claim cannot put the job back."""
    job_id = accepted(records)
    first = claimed(records, job_id)
    assert records.put_back(job_id, first.fence, 60.0, "busy", ())
    due_ms = redis.zscore(keys(job_id).due, job_id)
    assert records.put_back(job_id, first.fence, 90.0, "busy again", ())
    assert redis.zscore(keys(job_id).due, job_id) == due_ms
    second = claimed(records, job_id, "worker-2")
    assert records.put_back(job_id, first.fence, 60.0, "busy", ()) is False
    assert status_of(records, job_id) is JobStatus.RUNNING
    records.finish(second.fence, end(job_id))
    assert records.put_back(job_id, second.fence, 60.0, "busy", ()) is False
    assert records.put_back("gone", 1, 60.0, "busy", ()) is False
    assert status_of(records, job_id) is JobStatus.SUCCEEDED


def test_waiting_job_expires_at_its_deadline(records: Records, redis: Redis, keys: Any) -> None:
    """It is due then at the latest, and its end says what it waited for and what it has cost."""
    job_id = waiting(records, 3600.0, call(), deadline_seconds=100, metadata={"a": 1})
    record = records.read([job_id])[0]
    assert record.due_ms == (record.accepted_ms or 0) + 100_000
    redis.hset(keys(job_id).record, "deadline_ms", redis_now_ms(redis))
    assert records.claim(job_id, "worker-2", LEASE) is JobStatus.EXPIRED
    result = records.read([job_id])[0].to_result()
    assert result.error == JobError(type="deadline_exceeded", message="the deadline passed while it waited: p is busy")
    assert (result.status, result.cost_usd, result.attempts) == (JobStatus.EXPIRED, Decimal("0.25"), (call(),))
    assert result.metadata == {"a": 1}
    assert redis.zscore(keys(job_id).due, job_id) is None
    assert 0 < redis.ttl(keys(job_id).record) <= RETENTION_SECONDS


def test_waiting_job_can_be_cancelled(records: Records, redis: Redis, keys: Any) -> None:
    """It goes on nowhere; what it has cost so far is in its result."""
    job_id = waiting(records, 60.0, call("0.5"), call("0.25"))
    assert records.cancel(job_id) is JobStatus.CANCELLED
    assert records.claim(job_id, "worker-2", LEASE) is JobStatus.CANCELLED
    result = records.read([job_id])[0].to_result()
    assert result.error == JobError(type="cancelled", message="cancelled while it waited: p is busy")
    assert (result.cost_usd, len(result.attempts)) == (Decimal("0.75"), 2)
    assert redis.zscore(keys(job_id).due, job_id) == -1  # for a last wake-up: Celery has to hear of it


def test_waiters_hear_of_the_end_only(records: Records, settings: Settings, heard: Any) -> None:
    """A job that is put back has not ended; whoever waits for it goes on waiting, also from then on."""
    job_id = accepted(records)
    claim = claimed(records, job_id)
    records.watch([job_id], settings.namespace)
    records.put_back(job_id, claim.fence, 60.0, "busy", ())
    assert records.watch([job_id], settings.namespace)[0].status is JobStatus.WAITING
    assert heard() == []
    records.cancel(job_id)
    assert heard() == [job_id.encode()]


def test_waiting_job_is_woken_by_submission_only_when_overdue(records: Records, redis: Redis) -> None:
    """Before its time it would only be put back again; after it, its wake-up may have been lost."""
    job = new_job()
    records.accept([job])
    records.put_back(job[0], claimed(records, job[0]).fence, 60.0, "busy", ())
    assert records.accept([job])[0].wake is False
    second = claimed(records, job[0], "worker-2")
    records.put_back(job[0], second.fence, 0.001, "busy", ())
    wait_on_the_clock_of_redis(redis, records.read([job[0]])[0].due_ms or 0)
    assert records.accept([job])[0].wake is True


def test_foreign_values_count_as_missing(records: Records, redis: Redis, keys: Any) -> None:
    """Whoever else writes to our keys may cost a job its history, and never its life."""
    job_id = accepted(records)
    names = keys(job_id)
    redis.set(names.due, "not an index")
    redis.delete(names.queued)
    redis.set(names.running, "not an index")
    claim = claimed(records, job_id)
    assert records.put_back(job_id, claim.fence, 60.0, "busy", (call(),))
    redis.hset(names.record, mapping={"progress": '[{"x":', "due_ms": "soon", "started_ms": "\xff", "attempts": "x"})
    record = records.read([job_id])[0]
    assert (record.status, record.progress, record.due_ms, record.attempts) == (JobStatus.WAITING, (), None, 0)
    again = claimed(records, job_id, "worker-2")
    assert (again.attempts, again.fence) == ((), claim.fence + 1)
    redis.hset(names.record, mapping={"fence": "x", "crashes": "y", "deadline_ms": "z", "lost": "\xff"})
    assert records.take_over(job_id, LEASE, (), "lost") is JobStatus.WAITING
    third = claimed(records, job_id, "worker-3")
    assert third.fence > again.fence
    assert third.crashes == 1
    redis.hset(names.record, "state", "dancing")
    assert status_of(records, job_id) is JobStatus.UNKNOWN
    assert records.claim(job_id, "worker-4", LEASE) is JobStatus.UNKNOWN
    assert records.cancel(job_id) is JobStatus.UNKNOWN
    assert records.take_over(job_id, LEASE, (), "lost") is None
    assert records.finish(third.fence, end(job_id)) is Finish.STALE
    assert records.retry(job_id) is None
    assert redis.hget(names.record, "state") == b"dancing"


def test_job_is_read_as_it_was_submitted(records: Records, redis: Redis, keys: Any) -> None:
    """Until it has succeeded; a record that somebody else wrote to is refused."""
    job_id, job, text = new_job(metadata={"a": 1})
    records.accept([(job_id, job, text)])
    assert records.read_job(job_id) == job
    assert records.read_job("nobody") is None
    records.finish(claimed(records, job_id).fence, end(job_id))
    assert records.read_job(job_id) is None
    redis.hset(keys(job_id).record, "job", "not JSON")
    with pytest.raises(InvalidJobError, match="not JSON"):
        records.read_job(job_id)


def test_waiting_client_is_remembered_for_a_while(records: Records, redis: Redis, keys: Any) -> None:
    """A client that died waiting leaves nothing behind for ever."""
    job_id = accepted(records)
    assert records.watch([job_id], "channel")[0].status is JobStatus.QUEUED
    assert redis.smembers(keys(job_id).waiters) == {b"channel"}
    assert WAITER_SECONDS - 60 < redis.ttl(keys(job_id).waiters) <= WAITER_SECONDS


@pytest.mark.parametrize("how", ["finished", "cancelled", "expired"])
def test_whoever_waits_is_told_however_the_job_ends(
    records: Records, redis: Redis, settings: Settings, keys: Any, heard: Any, how: str
) -> None:
    """Every way to end a job tells its waiters once, and then forgets them."""
    job_id = accepted(records, deadline_seconds=0.03 if how == "expired" else None)
    records.watch([job_id], settings.namespace)
    records.watch([job_id], settings.namespace)
    if how == "finished":
        records.finish(claimed(records, job_id).fence, end(job_id))
    elif how == "cancelled":
        records.cancel(job_id)
    else:
        wait_on_the_clock_of_redis(redis, (records.read([job_id])[0].accepted_ms or 0) + 31)
        records.claim(job_id, "worker-1", LEASE)
    assert heard() == [job_id.encode()]
    assert redis.exists(keys(job_id).waiters) == 0


def test_ended_job_keeps_no_waiters(records: Records, redis: Redis, keys: Any) -> None:
    """Whoever asks after the end has the answer already."""
    job_id = accepted(records)
    records.finish(claimed(records, job_id).fence, end(job_id, content="done"))
    record = records.watch([job_id], "channel")[0]
    assert record.to_result().content == "done"
    assert redis.exists(keys(job_id).waiters) == 0


def test_many_jobs_are_read_in_order(records: Records) -> None:
    """Answers belong to the ids they were asked for, also where some are unknown."""
    ids = [accepted(records) for _ in range(5)]
    records.cancel(ids[1])
    asked = [ids[4], "nobody", ids[1], ids[0]]
    statuses = [JobStatus.QUEUED, JobStatus.UNKNOWN, JobStatus.CANCELLED, JobStatus.QUEUED]
    assert [(record.job_id, record.status) for record in records.read(asked)] == list(zip(asked, statuses, strict=True))
    assert [record.status for record in records.watch(asked, "channel")] == statuses
    assert records.read([]) == records.watch([], "channel") == []


def test_life_of_a_job_survives_forgotten_scripts(records: Records, redis: Redis) -> None:
    """SCRIPT FLUSH at any moment costs a round trip, and nothing else."""
    redis.script_flush()
    job_id = accepted(records)
    redis.script_flush()
    claim = claimed(records, job_id)
    redis.script_flush()
    records.watch([job_id], "channel")
    redis.script_flush()
    assert records.put_back(job_id, claim.fence, 60.0, "busy", ())
    claim = claimed(records, job_id, "worker-2")
    redis.script_flush()
    assert records.finish(claim.fence, end(job_id)) is Finish.WRITTEN


def test_fifty_threads_with_one_key_make_one_job(records: Records, settings: Settings, redis: Redis) -> None:
    """The key decides, not who comes first: all get the same job, written once, claimed once."""
    _, job, text = new_job(idempotency_key="k")
    job_id = idempotent_job_id(settings.namespace, None, "k")
    start = threading.Barrier(50)
    claims: list[Claim | JobStatus] = []

    def submit(number: int) -> None:
        start.wait()
        assert not records.accept([(job_id, job, text)])[0].conflict
        claims.append(records.claim(job_id, f"worker-{number}", LEASE))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claims) == 50
    assert sum(isinstance(claim, Claim) for claim in claims) == 1
    assert len(list(redis.scan_iter(f"*{settings.namespace}*:job:*"))) == 1


FIFTY_PROCESSES = """
import os, sys
from attune_worker.client import Client
from attune_worker.settings import Settings
settings = Settings.load()
go, say_go = os.pipe()
children = []
for number in range(50):
    if (child := os.fork()) == 0:
        os.close(say_go)
        os.read(go, 1)
        client = Client(settings)
        [accepted] = client._submission.prepare([{"task_type": "x", "prompt": "y", "idempotency_key": "k"}])
        client.records.accept([accepted])
        os.write(1, f"{accepted[0]}\\n".encode())
        os._exit(0)
    children.append(child)
os.close(say_go)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


def test_fifty_processes_with_one_key_make_one_job(
    environ: dict[str, str], settings: Settings, redis: Redis, keys: Any
) -> None:
    """As above, with nothing shared but Redis."""
    done = subprocess.run(
        [sys.executable, "-c", FIFTY_PROCESSES], env={**os.environ, **environ}, capture_output=True, check=True
    )
    ids = done.stdout.decode().split()
    assert len(ids) == 50
    assert set(ids) == {idempotent_job_id(settings.namespace, None, "k")}
    assert len(list(redis.scan_iter(f"*{settings.namespace}*:job:*"))) == 1
    assert redis.zcard(keys(ids[0]).queued) == 1


def test_redis_that_is_away_is_a_typed_error_without_the_password() -> None:
    """Every method says which server is meant, and never how to get in."""
    environ = {"ATTUNE_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0", "ATTUNE_REDIS_TIMEOUT_SECONDS": "0.2"}
    records = Records(Settings.load(environ=environ))
    calls: list[Callable[[], Any]] = [
        lambda: records.accept([new_job()]),
        lambda: records.claim("a", "w", LEASE),
        lambda: records.finish(1, end("a")),
        lambda: records.put_back("a", 1, 1.0, "busy", ()),
        lambda: records.cancel("a"),
        lambda: records.cancelled(["a"]),
        lambda: records.fences(["a"], LEASE),
        lambda: records.take_over("a", LEASE, (), "lost"),
        lambda: records.retry("a"),
        lambda: records.read_job("a"),
        lambda: list(records.running()),
        records.counts,
        lambda: records.listed(None, 1),
        lambda: records.due_in_seconds("a"),
        lambda: records.read(["a"]),
        lambda: records.watch(["a"], "c"),
    ]
    for ask in calls:
        with pytest.raises(
            ServiceUnavailableError, match=r"redis://:\*\*\*@127\.0\.0\.1:1/0 cannot be reached"
        ) as away:
            ask()
        assert "hunter2" not in str(away.value)


def test_wrong_password_is_named_as_such(redis_server: Any) -> None:
    """Restarting Redis would not help, so the message must not say that it is down."""
    url = f"redis://:wrong-hunter2@127.0.0.1:{redis_server.port}/0"
    records = Records(Settings.load(environ={"ATTUNE_REDIS_URL": url}))
    with pytest.raises(ServiceUnavailableError, match="refused the user or password") as refused:
        records.read(["a"])
    assert "hunter2" not in str(refused.value)


def test_odd_ids_are_unknown_jobs(records: Records) -> None:
    """An id comes from a caller's URL; whatever it holds, it is at worst unknown."""
    for job_id in ["", " ", "}{", "\n", "*", "\0", "x" * 10_000]:
        assert status_of(records, job_id) is JobStatus.UNKNOWN
        assert records.cancel(job_id) is JobStatus.UNKNOWN


def test_connection_that_was_cut_is_made_again(records: Records, redis: Redis) -> None:
    """Firewalls and failovers cut idle connections; the next call must not notice."""
    job_id = accepted(records)
    redis.client_kill_filter(_type="normal", skipme=True)
    assert status_of(records, job_id) is JobStatus.QUEUED


def test_url_of_no_known_kind_is_a_configuration_error() -> None:
    """It is found when the client is made, not when the first job is lost."""
    with pytest.raises(ConfigurationError, match="ATTUNE_REDIS_URL"):
        Records(Settings.load(environ={"ATTUNE_REDIS_URL": "http://127.0.0.1"}))


def test_write_that_redis_refuses_is_a_typed_error(records: Records, redis: Redis) -> None:
    """A full Redis refuses to write; the caller learns that the job was not accepted."""
    job_id, job, text = new_job()
    redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(ServiceUnavailableError, match="OOM"):
            records.accept([(job_id, job, text)])
    finally:
        redis.config_set("maxmemory", "0")
    assert status_of(records, job_id) is JobStatus.UNKNOWN
