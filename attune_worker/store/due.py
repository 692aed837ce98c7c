"""Which waiting jobs are due, and which worker sends their wake-ups? LEAD, DUE, WAKE and HASTEN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attune_worker.settings import Settings
from attune_worker.store.connection import Command, RedisClient, close_idle, connect, reaching, together
from attune_worker.store.keys import FleetKeys, JobKeys, ShardKeys, job_in, shards
from attune_worker.store.scripts import Argument, Script

LEAD = Script("lead", "values")
DUE = Script("due", "values")
WAKE = Script("wake", "values", "places", "ending")
HASTEN = Script("hasten", "values")

BATCH = 100
"""Most jobs of each kind, waiting or past their deadline, that are taken from one shard at a time."""

HASTEN_BATCH = 1000
"""Most jobs of one shard that are made due by one command: Redis does nothing else meanwhile."""

RESEND_SECONDS = 10.0
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
        self._shards = shards(settings.namespace)

    def lead(self, worker: str, lease_seconds: float) -> bool:
        """Return whether ``worker`` is the one that wakes what is due, now and for ``lease_seconds``."""
        key = FleetKeys(self._settings.namespace).sweeper
        with reaching(self._settings):
            return bool(LEAD(self._redis, (key,), (worker, round(lease_seconds * 1000))))

    def resign(self, worker: str) -> None:
        """Let another worker lead at once, if this one does."""
        self.lead(worker, 0)

    def take(self, resend_seconds: float = RESEND_SECONDS) -> Due:
        """Take the jobs that are due; each is due again after ``resend_seconds``, or later if it is long overdue.

        Queued and waiting jobs whose deadline has passed end here.
        """
        with reaching(self._settings):
            answers = DUE.many(
                self._redis, [((shard.due,), (BATCH, round(resend_seconds * 1000))) for shard in self._shards]
            )
            taken = [(shard, raw) for shard, (_, *found) in zip(self._shards, answers, strict=True) for raw in found]
            return Due(self._priorities(taken, resend_seconds) if taken else (), sum(answer[0] for answer in answers))

    def again(self, job_ids: Sequence[str]) -> None:
        """Have jobs that were taken be due at once: their wake-ups could not be sent."""
        commands: list[tuple[str, Command]] = []
        for job_id in job_ids:
            due = JobKeys.of(self._settings.namespace, job_id).due
            commands.append((due, ("ZADD", due, 0, job_id)))  # also one that has ended: its last wake-up
        with reaching(self._settings):
            together(self._redis, commands)

    def hasten(self) -> int:
        """Have all waiting jobs be due now, because what they wait for may be over; return how many those are.

        Those that still cannot go on wait again, for as long as they are told to then.
        """
        moved = 0
        with reaching(self._settings):
            for shard in self._shards:
                while found := HASTEN(self._redis, (shard.due,), (HASTEN_BATCH,)):
                    moved += found
        return moved

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _priorities(self, taken: Sequence[tuple[ShardKeys, bytes]], resend_seconds: float) -> list[tuple[str, int]]:
        """Return the jobs that do wait, with their priorities; what else stood in an index is removed from it."""
        again_ms = round(resend_seconds * 1000), round(max(resend_seconds, RESEND_CAP_SECONDS) * 1000)
        calls: list[tuple[Sequence[str], Sequence[Argument]]] = []
        ids = []
        for shard, raw in taken:
            if (job_id := job_in(shard, raw)) is None:
                self._redis.zrem(shard.due, raw)
                continue
            ids.append(job_id)
            keys = JobKeys.of(self._settings.namespace, job_id)
            calls.append((keys.all, (job_id, *again_ms, self._settings.retention_seconds)))
        priorities = WAKE.many(self._redis, calls)
        return [(job_id, priority) for job_id, priority in zip(ids, priorities, strict=True) if priority >= 0]
