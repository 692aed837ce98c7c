"""Which jobs are there? How many are in each state, which of them run, and which came last."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from attune_worker.jobs import JobStatus
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, reaching
from attune_worker.store.keys import ShardKeys, job_in, shards
from attune_worker.store.scripts import Script

RUNNING = Script("running", "values")
COUNTS = Script("counts", "values")
NEWEST = Script("newest", "values")

PART = 500
"""About how many running jobs are read from a shard at a time."""

_COUNTED = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.WAITING, JobStatus.DEAD)
"""In the order in which counts.lua answers."""


class Listing:
    """The indexes of one namespace's jobs. Every method raises ``ServiceUnavailableError`` when Redis is away.

    A job may have moved on since it was read from an index: its record says where it is.
    """

    def __init__(self, settings: Settings, redis: RedisClient) -> None:
        self._settings = settings
        self._redis = redis
        self._shards = shards(settings.namespace)

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs are queued, running, waiting and dead."""
        keys = [(shard.queued, shard.running, shard.due, shard.dead) for shard in self._shards]
        with reaching(self._settings):
            answers = COUNTS.many(self._redis, [(each, (self._settings.retention_seconds,)) for each in keys])
        return dict(zip(_COUNTED, map(sum, zip(*answers, strict=True)), strict=True))

    def running(self) -> Iterator[tuple[str, str]]:
        """Go through the running jobs, a part of a shard at a time: job id, and lease of the worker that runs it.

        A job that starts or ends meanwhile may be missed, and one may be seen twice.
        """
        for shard in self._shards:
            cursor = 0
            while True:
                cursor, jobs = self._part(shard, cursor)
                yield from jobs
                if cursor == 0:
                    break

    def _part(self, shard: ShardKeys, cursor: int) -> tuple[int, list[tuple[str, str]]]:
        """Return the next cursor, and some of the shard's running jobs; what is none of ours is removed."""
        jobs = []
        with reaching(self._settings):
            after, flat = RUNNING(self._redis, (shard.running,), (cursor, PART))
            for raw, lease in zip(flat[::2], flat[1::2], strict=True):
                if (job_id := job_in(shard, raw)) is None:
                    self._redis.hdel(shard.running, raw)
                else:
                    jobs.append((job_id, lease.decode(errors="replace")))
        return int(after), jobs

    def newest(self, status: JobStatus | None, limit: int) -> Iterator[str]:
        """Go through jobs that may be in this state, the latest first; None: those under way, then the ended.

        Up to ``limit`` of those under way and the dead, and of those that ended in other ways as many as are kept.
        """
        if status in {None, JobStatus.RUNNING}:
            yield from (job_id for job_id, _ in islice(self.running(), limit))
        if status in {None, JobStatus.WAITING}:
            yield from self._latest("due", limit, lowest="0")  # below are deadlines of queued jobs
        if status in {None, JobStatus.QUEUED}:
            yield from self._latest("queued", limit)
        if status is JobStatus.DEAD:
            yield from self._latest("dead", limit)
        elif status is None or status.ended:
            yield from self._latest("ended", -1)

    def _latest(self, index: str, limit: int, *, lowest: str = "-inf") -> list[str]:
        calls = [((getattr(shard, index),), (lowest, limit)) for shard in self._shards]
        with reaching(self._settings):
            answers = NEWEST.many(self._redis, calls)
        found = [
            (float(score), job_id)
            for shard, flat in zip(self._shards, answers, strict=True)
            for raw, score in zip(flat[::2], flat[1::2], strict=True)
            if (job_id := job_in(shard, raw)) is not None
        ]
        found.sort(reverse=True)
        return [job_id for _, job_id in found[: None if limit < 0 else limit]]
