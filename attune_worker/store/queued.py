"""Which queued jobs may have lost their wake-up? QUEUED and RESEND."""

from __future__ import annotations

from collections.abc import Sequence

from attune_worker.jobs import JobStatus
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, close_idle, connect, reaching
from attune_worker.store.keys import JobKeys, job_in, shards
from attune_worker.store.listing import Listing
from attune_worker.store.scripts import Argument, Script

QUEUED = Script("queued", "values")
RESEND = Script("resend", "values")


class QueuedJobs:
    """The queued jobs of one namespace. Every method raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._redis = redis or connect(settings, max_connections=2)
        self._shards = shards(settings.namespace)

    def count(self) -> int:
        """Return how many jobs wait for their first start."""
        return Listing(self._settings, self._redis).counts()[JobStatus.QUEUED]

    def take(self, older_than_seconds: float, limit: int) -> list[tuple[str, int]]:
        """Return up to ``limit`` jobs with their priorities, whose last wake-up was sent longer ago than this.

        Those that were woken longest ago come first. Their wake-ups count as sent now.
        """
        age_ms = round(older_than_seconds * 1000)
        with reaching(self._settings):
            answers = QUEUED.many(self._redis, [((shard.queued,), (age_ms, limit)) for shard in self._shards])
            entries = [
                (float(score), raw, shard)
                for shard, flat in zip(self._shards, answers, strict=True)
                for raw, score in zip(flat[::2], flat[1::2], strict=True)
            ]
            entries.sort(key=lambda entry: entry[0])
            ids = []
            for _, raw, shard in entries[:limit]:
                if (job_id := job_in(shard, raw)) is None:
                    self._redis.zrem(shard.queued, raw)
                else:
                    ids.append(job_id)
            return self._resend(ids)

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _resend(self, job_ids: Sequence[str]) -> list[tuple[str, int]]:
        calls: list[tuple[Sequence[str], Sequence[Argument]]] = []
        for job_id in job_ids:
            keys = JobKeys.of(self._settings.namespace, job_id)
            calls.append(((keys.record, keys.queued), (job_id,)))
        priorities = RESEND.many(self._redis, calls)
        return [(job_id, priority) for job_id, priority in zip(job_ids, priorities, strict=True) if priority >= 0]
