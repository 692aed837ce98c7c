from typing import Any

from redis import Redis

from attune_worker.jobs import JobStatus
from attune_worker.store.listing import PART
from attune_worker.store.records import Records
from tests.store.job_lab import LEASE, OTHER_LEASE, accepted, claimed, end, wait_on_the_clock_of_redis, waiting


def ended(records: Records, status: JobStatus) -> str:
    job_id = accepted(records)
    records.finish(claimed(records, job_id).fence, end(job_id, status))
    return job_id


def dead(records: Records) -> str:
    job_id = accepted(records)
    while claimed(records, job_id):
        if records.take_over(job_id, LEASE, (), "it was killed") is JobStatus.DEAD:
            break
    return job_id


def listed(records: Records, status: JobStatus | None, limit: int = 100) -> list[str]:
    return [record.job_id for record in records.listed(status, limit)]


def test_nothing_is_there(records: Records) -> None:
    """An empty fleet has no jobs, in whatever state."""
    assert set(records.counts().values()) == {0}
    assert list(records.running()) == []
    assert [records.listed(status, 10) for status in [None, *JobStatus]] == [[]] * (len(JobStatus) + 1)


def test_jobs_are_listed_by_where_they_are(records: Records) -> None:
    """Each under its own state; together, those that run come first, then what waits and is queued, then the ended."""
    queued = accepted(records, deadline_seconds=600)
    later = waiting(records)
    runs = accepted(records)
    claimed(records, runs)
    ends = {status: ended(records, status) for status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.EXPIRED)}
    ends[JobStatus.DEAD] = dead(records)
    expected = {JobStatus.QUEUED: queued, JobStatus.WAITING: later, JobStatus.RUNNING: runs, **ends}
    for status, job_id in expected.items():
        assert listed(records, status) == [job_id]
    assert listed(records, JobStatus.CANCELLED) == listed(records, JobStatus.UNKNOWN) == []
    together = listed(records, None)
    assert together[:3] == [runs, later, queued]
    assert set(together[3:]) == set(ends.values())
    assert listed(records, None, 2) == together[:2]
    counts = dict.fromkeys((JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.WAITING, JobStatus.DEAD), 1)
    assert records.counts() == counts


def test_latest_jobs_come_first_over_all_shards(records: Records, redis: Redis) -> None:
    """A list that is cut shows what happened last."""
    jobs = []
    for _ in range(25):
        jobs.append(ended(records, JobStatus.FAILED))
        wait_on_the_clock_of_redis(redis, (records.read(jobs[-1:])[0].ended_ms or 0) + 1)
    ended(records, JobStatus.SUCCEEDED)
    assert listed(records, JobStatus.FAILED, 10) == jobs[:-11:-1]
    assert len(listed(records, None, 10)) == 10


def test_only_the_latest_ended_jobs_are_kept_in_the_list(records: Records, redis: Redis, keys: Any) -> None:
    """It stays small, however many jobs there have been."""
    job_id = accepted(records)
    redis.zadd(keys(job_id).ended, {f"job-{number}": number for number in range(1500)})
    records.cancel(job_id)
    assert redis.zcard(keys(job_id).ended) == 1000
    assert listed(records, None) == [job_id]  # the others have no records


def test_all_running_jobs_are_found_with_their_leases(records: Records) -> None:
    """More than are read at a time; what somebody else wrote there is removed."""
    leases = {accepted(records): lease for lease in [LEASE, OTHER_LEASE] * 20}
    for job_id, lease in leases.items():
        claimed(records, job_id, lease=lease)
    assert dict(records.running()) == leases


def test_large_shard_is_read_in_parts(records: Records, redis: Redis, keys: Any) -> None:
    """A hash of thousands does not come in one answer, and every job in it is found."""
    index = keys("job").running
    names = [name for name in map(str, range(PART * 80)) if keys(name).running == index]
    foreign = [b"\xff\xfe", next(name for name in map(str, range(99)) if keys(name).running != index).encode()]
    redis.hset(index, mapping={**dict.fromkeys(names, LEASE), **dict.fromkeys(foreign, "x")})
    assert len(names) > PART * 3
    assert {job_id for job_id, _ in records.running()} == set(names)
    assert not any(redis.hmget(index, foreign))


def test_foreign_keys_in_the_place_of_indexes_count_as_missing(records: Records, redis: Redis, keys: Any) -> None:
    """They stop neither a count nor a list."""
    for index in (keys("a").queued, keys("a").running, keys("a").due, keys("a").dead, keys("a").ended):
        redis.set(index, "text", ex=60)
    assert set(records.counts().values()) == {0}
    redis.set(keys("a").running, "text", ex=60)
    assert list(records.running()) == records.listed(None, 10) == []
