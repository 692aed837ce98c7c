from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.store.keys import SHARDS, JobKeys, shard_of
from attune_worker.store.queued import QueuedJobs
from attune_worker.store.records import Records
from tests.store.job_lab import accepted, claimed, new_job, redis_now_ms, waiting

HOUR_MS = 3_600_000


@pytest.fixture
def queued_jobs(settings: Settings) -> Iterator[QueuedJobs]:
    found = QueuedJobs(settings)
    yield found
    found.close()


def woken_ago(redis: Redis, keys: JobKeys, job_id: str, ms: int) -> None:
    redis.zadd(keys.queued, {job_id: redis_now_ms(redis) - ms}, xx=True)


def test_queued_jobs_of_all_shards_are_counted(records: Records, queued_jobs: QueuedJobs) -> None:
    """Those that wait for their first start, and no others."""
    assert queued_jobs.count() == 0
    jobs = [accepted(records, deadline_seconds=60) for _ in range(40)]
    waiting(records)
    claimed(records, jobs[0])
    records.cancel(jobs[1])
    assert queued_jobs.count() == 38


def test_jobs_woken_longest_ago_are_taken_first(
    records: Records, queued_jobs: QueuedJobs, redis: Redis, keys: Any
) -> None:
    """Whatever their shards, with their priorities, and no more than asked for."""
    jobs = [accepted(records, priority=number % 10) for number in range(40)]
    assert len({shard_of(job_id) for job_id in jobs}) > SHARDS / 2
    for number, job_id in enumerate(jobs):
        woken_ago(redis, keys(job_id), job_id, HOUR_MS - number * 1000)
    assert queued_jobs.take(5, 7) == [(job_id, number) for number, job_id in enumerate(jobs[:7])]
    assert queued_jobs.take(3590.5, 100) == [(job_id, number) for number, job_id in enumerate(jobs[7:10], start=7)]


def test_job_that_was_taken_counts_as_woken_now(
    records: Records, queued_jobs: QueuedJobs, redis: Redis, keys: Any
) -> None:
    """Its wake-up is sent again; until that has had time to arrive, there is no other."""
    job_id, fresh = accepted(records), accepted(records)
    woken_ago(redis, keys(job_id), job_id, 6000)
    before = redis_now_ms(redis)
    assert queued_jobs.take(5, 10) == [(job_id, 5)]
    assert before <= (redis.zscore(keys(job_id).queued, job_id) or 0) <= redis_now_ms(redis)
    assert queued_jobs.take(5, 10) == []
    assert {each for each, _ in queued_jobs.take(-1, 10)} == {job_id, fresh}


def test_submission_that_is_repeated_wakes_the_job(
    records: Records, queued_jobs: QueuedJobs, redis: Redis, keys: Any
) -> None:
    """So the sweeper need not; an index entry that somebody removed is back as well."""
    job = new_job()
    records.accept([job])
    woken_ago(redis, keys(job[0]), job[0], HOUR_MS)
    assert records.accept([job])[0].wake
    assert queued_jobs.take(5, 10) == []
    redis.delete(keys(job[0]).queued)
    assert records.accept([job])[0].wake
    assert queued_jobs.count() == 1


def test_what_is_not_queued_is_removed(records: Records, queued_jobs: QueuedJobs, redis: Redis, keys: Any) -> None:
    """Foreign entries, and those of jobs that moved on, are dropped without a word."""
    job_id = accepted(records)
    index = keys(job_id).queued
    names = [f"job-{number}" for number in range(99)]
    unknown = next(name for name in names if shard_of(name) == shard_of(job_id))
    elsewhere = next(name for name in names if shard_of(name) != shard_of(job_id))
    redis.zadd(index, {b"\xff\xfe": 1, unknown: 2, elsewhere: 3, job_id: 4})
    assert queued_jobs.take(5, 10) == [(job_id, 5)]
    assert redis.zrange(index, 0, -1) == [job_id.encode()]


def test_foreign_key_in_the_place_of_an_index_is_replaced(
    records: Records, queued_jobs: QueuedJobs, redis: Redis, keys: Any
) -> None:
    """A value of another type stops nobody."""
    job_id = accepted(records)
    for _ in range(2):
        redis.delete(keys(job_id).queued)
        redis.rpush(keys(job_id).queued, "a list")
        assert queued_jobs.take(5, 10) == []
        assert queued_jobs.count() == 0
    claimed(records, job_id)


def test_look_survives_forgotten_scripts(records: Records, queued_jobs: QueuedJobs, redis: Redis) -> None:
    """SCRIPT FLUSH costs a round trip, and no wake-up."""
    job_id = accepted(records)
    redis.script_flush()
    assert queued_jobs.count() == 1
    redis.script_flush()
    assert queued_jobs.take(-1, 10) == [(job_id, 5)]


def test_redis_that_is_away_is_a_typed_error() -> None:
    """The sweeper tells it from an error of its own."""
    environ = {"ATTUNE_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0", "ATTUNE_REDIS_TIMEOUT_SECONDS": "0.2"}
    queued_jobs = QueuedJobs(Settings.load(environ=environ))
    for ask in (queued_jobs.count, lambda: queued_jobs.take(5, 10)):
        with pytest.raises(ServiceUnavailableError):
            ask()
