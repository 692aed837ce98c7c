"""Which waiting jobs are due, and which worker sends their wake-ups? LEAD, DUE and WAKE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, close_idle, connect, reaching
from attune_worker.store.keys import FleetKeys, JobKeys, shards
from attune_worker.store.scripts import Argument, Script

LEAD = Script("lead", "values")
DUE = Script("due", "values")
WAKE = Script("wake", "values")

BATCH = 100
"""Most jobs that are taken from one shard at a time."""

RESEND_SECONDS = 30.0
"""A job whose wake-up was sent is due again after this long, unless it was claimed."""

RESEND_CAP_SECONDS = 300.0
"""The longer a job is overdue, the rarer its wake-ups, down to one in this time."""


@dataclass(frozen=True, slots=True)
class Due:
    """What was found: ``(job id, priority)`` of the jobs to wake, and how many ``waiting`` jobs there are in all."""

    jobs: Sequence[tuple[str, int]]
    waiting: int


class DueJobs:
    """The waiting jobs of one namespace. Every method raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._redis = redis or connect(settings, max_connections=2)
        self._indexes = [shard.due for shard in shards(settings.namespace)]

    def lead(self, worker: str, lease_seconds: float) -> bool:
        """Return whether ``worker`` is the one that wakes what is due, now and for ``lease_seconds``."""
        key = FleetKeys(self._settings.namespace).sweeper
        with reaching(self._settings):
            return bool(LEAD(self._redis, (key,), (worker, round(lease_seconds * 1000))))

    def resign(self, worker: str) -> None:
        """Let another worker lead at once, if this one does."""
        self.lead(worker, 0)

    def take(self, resend_seconds: float = RESEND_SECONDS) -> Due:
        """Take the jobs that are due; each is due again after ``resend_seconds``, or later if it is long overdue."""
        with reaching(self._settings):
            answers = DUE.many(
                self._redis, [((index,), (BATCH, round(resend_seconds * 1000))) for index in self._indexes]
            )
            taken = [
                (index, job_id)
                for index, (_, *job_ids) in zip(self._indexes, answers, strict=True)
                for job_id in job_ids
            ]
            return Due(self._priorities(taken, resend_seconds) if taken else (), sum(answer[0] for answer in answers))

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _priorities(self, taken: Sequence[tuple[str, bytes]], resend_seconds: float) -> list[tuple[str, int]]:
        """Return the jobs that do wait, with their priorities; what else stood in an index is removed from it."""
        again_ms = round(resend_seconds * 1000), round(max(resend_seconds, RESEND_CAP_SECONDS) * 1000)
        calls: list[tuple[Sequence[str], Sequence[Argument]]] = []
        ids = []
        for index, raw in taken:
            job_id = _text(raw)
            if job_id is None or (keys := JobKeys.of(self._settings.namespace, job_id)).due != index:
                self._redis.zrem(index, raw)  # no job of ours
                continue
            ids.append(job_id)
            calls.append(((keys.record, keys.due), (job_id, *again_ms)))
        priorities = WAKE.many(self._redis, calls)
        return [(job_id, priority) for job_id, priority in zip(ids, priorities, strict=True) if priority >= 0]


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return None
