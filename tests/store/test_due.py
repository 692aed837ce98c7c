import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import Job, JobStatus
from attune_worker.settings import Settings
from attune_worker.store.due import BATCH, Due, DueJobs
from attune_worker.store.keys import SHARDS, FleetKeys, JobKeys, new_job_id, shard_of
from attune_worker.store.records import Claim, Records
from tests.conftest import longer_and_longer

LEASE = "lease-1"
AT_ONCE = 0.001


@pytest.fixture
def due_jobs(settings: Settings) -> Iterator[DueJobs]:
    found = DueJobs(settings)
    yield found
    found.close()


def started(records: Records, **fields: Any) -> tuple[str, Claim | JobStatus]:
    job_id = new_job_id()
    job = Job.parse({"task_type": "summarize", "prompt": "a prompt", **fields})
    records.accept([(job_id, job, job.to_json())])
    return job_id, records.claim(job_id, "worker-1", LEASE)


def put_back(records: Records, wait_seconds: float, **fields: Any) -> str:
    job_id, claim = started(records, **fields)
    assert isinstance(claim, Claim)
    assert records.put_back(job_id, claim.fence, wait_seconds, "busy", ())
    return job_id


def taken(due_jobs: DueJobs, until: Callable[[Callable[[], Any]], Any], count: int, **options: Any) -> dict[str, int]:
    """Take until that many jobs were found, each once."""
    found: list[tuple[str, int]] = []

    def look() -> bool:
        found.extend(due_jobs.take(**options).jobs)
        return len(found) >= count

    until(look)
    assert len(found) == count
    return dict(found)


def test_nothing_waits_nothing_is_due(due_jobs: DueJobs, settings: Settings, redis: Redis) -> None:
    """An idle fleet's look costs one round trip and leaves nothing behind."""
    assert due_jobs.take() == Due((), 0)
    assert list(redis.scan_iter(f"*{settings.namespace}*")) == []


def test_jobs_of_all_shards_are_found_when_their_time_comes(records: Records, due_jobs: DueJobs, until: Any) -> None:
    """With the priority of their wake-ups, and none before its time."""
    jobs = {put_back(records, AT_ONCE, priority=number % 10): number % 10 for number in range(40)}
    later = put_back(records, 60.0)
    assert len({shard_of(job_id) for job_id in jobs}) > SHARDS / 2
    assert taken(due_jobs, until, len(jobs)) == jobs
    assert due_jobs.take() == Due((), len(jobs) + 1)
    assert records.read([later])[0].status is JobStatus.WAITING


def test_lost_wake_up_is_sent_again_until_the_job_is_claimed(records: Records, due_jobs: DueJobs, until: Any) -> None:
    """A message that nobody got costs the time of resending, and a job that runs is left alone."""
    job_id = put_back(records, AT_ONCE)
    for _ in range(3):
        assert taken(due_jobs, until, 1, resend_seconds=0.02) == {job_id: 5}
    assert isinstance(records.claim(job_id, "worker-2", LEASE), Claim)
    assert due_jobs.take() == Due((), 0)


def test_wake_ups_that_could_not_be_sent_are_due_at_once(records: Records, due_jobs: DueJobs, until: Any) -> None:
    """The broker was away: of jobs that wait or have ended, and not of those that somebody claimed meanwhile."""
    waits, claimed, cancelled = put_back(records, AT_ONCE), put_back(records, AT_ONCE), put_back(records, 60.0)
    records.cancel(cancelled)
    found = taken(due_jobs, until, 3)
    assert found == {waits: 5, claimed: 5, cancelled: 5}
    assert isinstance(records.claim(claimed, "worker-2", LEASE), Claim)
    due_jobs.again(list(found))
    assert taken(due_jobs, until, 2) == {waits: 5, cancelled: 5}
    assert due_jobs.take() == Due((), 1)


def test_job_is_taken_by_one_of_many_at_a_time(records: Records, settings: Settings, until: Any) -> None:
    """Should two workers sweep at once, no wake-up is sent twice."""
    jobs = {put_back(records, AT_ONCE) for _ in range(30)}
    found: list[str] = []
    start = threading.Barrier(8)

    def sweep() -> None:
        mine = DueJobs(settings)
        start.wait()
        until(lambda: found.extend(job_id for job_id, _ in mine.take().jobs) or len(found) >= len(jobs))
        mine.close()

    threads = [threading.Thread(target=sweep) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(jobs)


def test_long_overdue_job_is_woken_more_rarely(
    records: Records, due_jobs: DueJobs, settings: Settings, redis: Redis, until: Any
) -> None:
    """Where jobs pile up before busy workers, wake-ups must not pile up much faster."""
    job_id = put_back(records, AT_ONCE)
    keys = JobKeys.of(settings.namespace, job_id)
    for overdue_ms, expected_ms in [(100_000, 100_000), (10**9, 300_000)]:
        redis.hset(keys.record, "due_ms", int(redis.time()[0]) * 1000 - overdue_ms if overdue_ms < 10**9 else 0)
        redis.zadd(keys.due, {job_id: 1})
        assert taken(due_jobs, until, 1) == {job_id: 5}
        left_ms = (redis.zscore(keys.due, job_id) or 0) - int(redis.time()[0]) * 1000
        assert expected_ms - 20_000 < left_ms < expected_ms + 20_000


def test_what_does_not_wait_is_removed(
    records: Records, due_jobs: DueJobs, settings: Settings, redis: Redis, until: Any
) -> None:
    """Foreign entries are no jobs; they are dropped without a word, and waiting jobs are found all the same."""
    job_id = put_back(records, AT_ONCE)
    keys = JobKeys.of(settings.namespace, job_id)
    elsewhere = next(name for name in map(str, range(99)) if shard_of(name) != shard_of(job_id))
    ended = next(name for name in map(str, range(99)) if shard_of(name) == shard_of(job_id))
    redis.zadd(keys.due, {b"\xff\xfe": 1, elsewhere: -1, ended: 0})
    assert taken(due_jobs, until, 1) == {job_id: 5}
    assert redis.zrange(keys.due, 0, -1) == [job_id.encode()]


def test_foreign_key_in_an_index_s_place_is_replaced(
    records: Records, due_jobs: DueJobs, settings: Settings, redis: Redis, until: Any
) -> None:
    """A value of another type stops nobody, and jobs put back after it are found."""
    job_id = new_job_id()
    redis.set(JobKeys.of(settings.namespace, job_id).due, "text", ex=60)
    assert due_jobs.take() == Due((), 0)
    redis.set(JobKeys.of(settings.namespace, job_id).due, "text", ex=60)
    later = put_back(records, AT_ONCE)
    assert taken(due_jobs, until, 1) == {later: 5}


def expired(records: Records, job_id: str) -> bool:
    return records.read([job_id])[0].status is JobStatus.EXPIRED


def test_jobs_past_their_deadline_end_without_a_worker(
    records: Records, due_jobs: DueJobs, settings: Settings, redis: Redis, until: Any
) -> None:
    """Queued or waiting, whoever waits for it hears of it then; a last wake-up has Celery hear of it, too."""
    queued, later = new_job_id(), new_job_id()
    for job_id, seconds in [(queued, 0.03), (later, 600)]:
        job = Job.parse({"task_type": "summarize", "prompt": "a prompt", "deadline_seconds": seconds})
        records.accept([(job_id, job, job.to_json())])
    for seconds in longer_and_longer(0.2):
        waiting, claim = started(records, deadline_seconds=seconds)
        if isinstance(claim, Claim):  # not when its time was over before
            break
    assert records.put_back(waiting, claim.fence, 60.0, "busy", ())
    found: list[tuple[str, int]] = []
    until(lambda: found.extend(due_jobs.take().jobs) or (expired(records, queued) and expired(records, waiting)))
    assert sorted(found) == sorted([(queued, 5), (waiting, 5)])
    assert records.read([later])[0].status is JobStatus.QUEUED
    for job_id in (queued, waiting):
        keys = JobKeys.of(settings.namespace, job_id)
        assert redis.zscore(keys.due, job_id) is redis.zscore(keys.queued, job_id) is None
        assert redis.zscore(keys.ended, job_id) is not None
    assert due_jobs.take() == Due((), 0)


def test_deadline_that_is_not_yet_over_stays(
    records: Records, due_jobs: DueJobs, settings: Settings, redis: Redis
) -> None:
    """Whatever made the sweeper look too early; and without a deadline, a queued job has no place there."""
    job_id, without = new_job_id(), new_job_id()
    for each, seconds in [(job_id, 600), (without, None)]:
        job = Job.parse({"task_type": "summarize", "prompt": "a prompt", "deadline_seconds": seconds})
        records.accept([(each, job, job.to_json())])
    keys, others = JobKeys.of(settings.namespace, job_id), JobKeys.of(settings.namespace, without)
    before = redis.zscore(keys.due, job_id)
    redis.zadd(keys.due, {job_id: 1})
    redis.zadd(others.due, {without: 1})
    assert due_jobs.take().jobs == []
    assert redis.zscore(keys.due, job_id) == before
    assert redis.zscore(others.due, without) is None
    assert records.read([job_id])[0].status is JobStatus.QUEUED


def test_flood_of_due_jobs_comes_in_batches(due_jobs: DueJobs, settings: Settings, redis: Redis) -> None:
    """However many are due, one look takes no more of a shard than a batch."""
    index = JobKeys.of(settings.namespace, "a").due
    redis.zadd(index, {f"job-{number}": 1 for number in range(BATCH * 2)})
    due_jobs.take()
    assert redis.zcount(index, 1, 1) == BATCH


def test_one_worker_leads_until_it_resigns_or_dies(
    due_jobs: DueJobs, settings: Settings, redis: Redis, until: Any
) -> None:
    """Its lease is its own to renew; without that, another takes over when it has run out."""
    assert due_jobs.lead("worker-1", 60.0)
    assert due_jobs.lead("worker-1", 60.0)
    assert not due_jobs.lead("worker-2", 60.0)
    assert 50_000 < redis.pttl(FleetKeys(settings.namespace).sweeper) <= 60_000
    due_jobs.resign("worker-2")
    assert not due_jobs.lead("worker-2", 60.0)
    due_jobs.resign("worker-1")
    assert due_jobs.lead("worker-2", 0.02)
    until(lambda: due_jobs.lead("worker-3", 60.0))
    assert not due_jobs.lead("worker-2", 60.0)


def test_lease_that_nobody_took_is_nobody_s(due_jobs: DueJobs, settings: Settings, redis: Redis) -> None:
    """A value that would never go away must not keep jobs waiting for ever."""
    key = FleetKeys(settings.namespace).sweeper
    for write in (lambda: redis.set(key, "someone"), lambda: redis.rpush(key, "a list")):
        redis.delete(key)
        write()
        assert due_jobs.lead("worker-1", 60.0)
        assert redis.get(key) == b"worker-1"


def test_sweep_survives_forgotten_scripts(records: Records, due_jobs: DueJobs, redis: Redis, until: Any) -> None:
    """SCRIPT FLUSH costs a round trip, and no wake-up."""
    job_id = put_back(records, AT_ONCE)
    redis.script_flush()
    assert due_jobs.lead("worker-1", 60.0)
    redis.script_flush()
    assert taken(due_jobs, until, 1) == {job_id: 5}


def test_redis_that_is_away_is_a_typed_error() -> None:
    """The sweeper tells it from an error of its own."""
    environ = {"ATTUNE_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0", "ATTUNE_REDIS_TIMEOUT_SECONDS": "0.2"}
    due_jobs = DueJobs(Settings.load(environ=environ))
    for call in (due_jobs.take, lambda: due_jobs.lead("worker-1", 1.0), lambda: due_jobs.resign("worker-1")):
        with pytest.raises(ServiceUnavailableError):
            call()
