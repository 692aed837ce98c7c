"""What do tests do to jobs? They accept, claim and end them on their records, and look at the indexes."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from redis import Redis

from attune_worker.jobs import Attempt, Job, JobResult, JobStatus, ModelTier
from attune_worker.store.keys import JobKeys, new_job_id
from attune_worker.store.records import Claim, Records

LEASE = "host:1:aaaaaaaa"
OTHER_LEASE = "host:2:bbbbbbbb"
RETENTION_SECONDS = 86_400
INDEXES = ("queued", "running", "due", "dead", "ended")


def new_job(**fields: Any) -> tuple[str, Job, str]:
    job = Job.parse({"task_type": "summarize", "prompt": "a prompt", **fields})
    return new_job_id(), job, job.to_json()


def accepted(records: Records, **fields: Any) -> str:
    job = new_job(**fields)
    records.accept([job])
    return job[0]


def claimed(records: Records, job_id: str, owner: str = "", lease: str = LEASE, channel: str = "") -> Claim:
    """Claim a job as the given owner, or as one that never had it: nobody gets a job twice."""
    claim = records.claim(job_id, owner or new_job_id(), lease, channel)
    assert isinstance(claim, Claim)
    return claim


def end(job_id: str, status: JobStatus = JobStatus.SUCCEEDED, **fields: Any) -> JobResult:
    return JobResult(job_id=job_id, status=status, **fields)


def call(cost_usd: str | None = "0.25", **fields: Any) -> Attempt:
    known = {"model_id": "m", "provider": "p", "tier": ModelTier.CHEAP, "outcome": "failed", "latency_ms": 7}
    return Attempt(**{**known, "cost_usd": cost_usd and Decimal(cost_usd), **fields})


def waiting(records: Records, wait_seconds: float = 60.0, *attempts: Attempt, **fields: Any) -> str:
    job_id = accepted(records, **fields)
    assert records.put_back(job_id, claimed(records, job_id).fence, wait_seconds, "p is busy", attempts)
    return job_id


def status_of(records: Records, job_id: str) -> JobStatus:
    return records.read([job_id])[0].status


def indexes_of(redis: Redis, keys: JobKeys, job_id: str) -> set[str]:
    """Return the names of the indexes that the job stands in."""
    return {name for name in INDEXES if _stands_in(redis, getattr(keys, name), job_id)}


def _stands_in(redis: Redis, index: str, job_id: str) -> bool:
    if redis.type(index) == b"hash":
        return bool(redis.hexists(index, job_id))
    return redis.zscore(index, job_id) is not None


def redis_now_ms(redis: Redis) -> int:
    seconds, micros = redis.time()
    return int(seconds * 1000 + micros // 1000)


def wait_on_the_clock_of_redis(redis: Redis, until_ms: int) -> None:
    while redis_now_ms(redis) < until_ms:
        pass
