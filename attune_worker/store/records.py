"""What is known of a job, and who may change it? ACCEPT, CLAIM, FINISH, CANCEL and WATCH on its record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from math import ceil

from pydantic import JsonValue, ValidationError
from redis import Redis

from attune_worker.errors import AttuneError, InvalidJobError, JobNotFoundError
from attune_worker.jobs import Job, JobError, JobResult, JobStatus
from attune_worker.settings import Settings
from attune_worker.store.connection import connect, reaching
from attune_worker.store.keys import JobKeys
from attune_worker.store.scripts import Argument, Script

ACCEPT = Script("accept", "values", "ending")
CLAIM = Script("claim", "values", "ending")
FINISH = Script("finish", "values", "ending")
CANCEL = Script("cancel", "values", "ending")
WATCH = Script("watch")

WAITER_SECONDS = 3600
"""How long a waiting client is remembered; one that waits longer says so again."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What ACCEPT said of a job. ``conflict``: its id belongs to a different job; ``wake``: a wake-up is due."""

    conflict: bool
    wake: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """A job taken by one worker. ``fence`` proves it at FINISH; times are in milliseconds of Redis' clock."""

    fence: int
    job: str
    accepted_ms: int
    claimed_ms: int
    deadline_ms: int

    @property
    def queue_ms(self) -> int:
        """How long the job waited to be claimed."""
        return self.claimed_ms - self.accepted_ms

    @property
    def remaining_seconds(self) -> float | None:
        """Time left at the claim until the job's deadline; None: it has none."""
        return (self.deadline_ms - self.claimed_ms) / 1000 if self.deadline_ms else None


@dataclass(frozen=True, slots=True)
class Record:
    """Where a job is, as it was read."""

    job_id: str
    status: JobStatus
    result: str | None = None
    accepted_ms: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    attempts: int = 0
    metadata: dict[str, JsonValue] = field(default_factory=dict)

    def to_result(self) -> JobResult:
        """Return the result of a job that has ended; raises ``JobNotFoundError`` for one that is unknown."""
        if self.status is JobStatus.UNKNOWN:
            raise JobNotFoundError(self.job_id)
        if self.result is not None:
            try:
                return JobResult.model_validate_json(self.result)
            except ValidationError:
                raise AttuneError(f"the result of job {self.job_id} cannot be read; was it written by us?") from None
        waited_ms = self.ended_ms - self.accepted_ms if self.ended_ms and self.accepted_ms else None
        return JobResult(
            job_id=self.job_id,
            status=self.status,
            cost_usd=Decimal(0) if self.status.ended else None,
            queue_ms=waited_ms,
            error=_ENDED_WITHOUT_A_CALL.get(self.status),
            metadata=self.metadata,
        )


_ENDED_WITHOUT_A_CALL = {
    JobStatus.CANCELLED: JobError(type="cancelled", message="cancelled before it started"),
    JobStatus.EXPIRED: JobError(type="deadline_exceeded", message="the deadline passed before it started"),
}


class Records:
    """The job records of one namespace. Every method raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: Redis | None = None) -> None:
        self._settings = settings
        self._redis = redis or connect(settings)

    def accept(self, jobs: Sequence[tuple[str, Job, str]]) -> list[Acceptance]:
        """Write the records of ``(job id, job, its JSON)`` in one round trip, and return what became of each."""
        with reaching(self._settings):
            answers = ACCEPT.many(self._redis, [self._accept_call(*job) for job in jobs])
        return [Acceptance(conflict=verdict == b"conflict", wake=bool(due)) for verdict, due in answers]

    def _accept_call(self, job_id: str, job: Job, text: str) -> tuple[Sequence[str], Sequence[Argument]]:
        keys = self._keys(job_id)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return (keys.record, keys.queued), (
            job_id,
            text,
            digest,
            job.priority,
            ceil((job.deadline_seconds or 0) * 1000),
        )

    def claim(self, job_id: str, owner: str, lease_seconds: float) -> Claim | JobStatus:
        """Take a queued job, or return the status that forbids it."""
        keys = self._keys(job_id)
        with reaching(self._settings):
            answer = CLAIM(
                self._redis,
                (keys.record, keys.queued, keys.running, keys.waiters),
                (job_id, owner, round(lease_seconds * 1000), self._settings.retention_seconds),
            )
        if answer[0] != b"claimed":
            return JobStatus(answer[0].decode())
        _, fence, job, accepted_ms, claimed_ms, deadline_ms = answer
        return Claim(fence, (job or b"").decode(errors="replace"), accepted_ms, claimed_ms, deadline_ms)

    def finish(self, fence: int, result: JobResult) -> bool:
        """Write how a job ended; False when another worker holds the job by now and this end does not count."""
        keys = self._keys(result.job_id)
        with reaching(self._settings):
            return bool(
                FINISH(
                    self._redis,
                    (keys.record, keys.running, keys.waiters),
                    (
                        result.job_id,
                        fence,
                        result.status.value,
                        result.model_dump_json(exclude_defaults=True),
                        self._settings.retention_seconds,
                    ),
                )
            )

    def cancel(self, job_id: str) -> JobStatus:
        """Cancel a job that has not started, and return where it is then."""
        keys = self._keys(job_id)
        with reaching(self._settings):
            state = CANCEL(
                self._redis, (keys.record, keys.queued, keys.waiters), (job_id, self._settings.retention_seconds)
            )
        return JobStatus(state.decode())

    def read(self, job_ids: Sequence[str]) -> list[Record]:
        """Read where jobs are, in one round trip."""
        fields = ("state", "result", "accepted_ms", "started_ms", "ended_ms", "attempts")
        with reaching(self._settings), self._redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(self._keys(job_id).record, fields)
            return [self._record(*pair) for pair in zip(job_ids, pipeline.execute(), strict=True)]

    def watch(self, job_ids: Sequence[str], channel: str) -> list[Record]:
        """Read where jobs are, and have ``channel`` told the id of each that has not ended yet, when it does."""
        calls = []
        for job_id in job_ids:
            keys = self._keys(job_id)
            calls.append(((keys.record, keys.waiters), (channel, WAITER_SECONDS)))
        with reaching(self._settings):
            return [self._record(*pair) for pair in zip(job_ids, WATCH.many(self._redis, calls), strict=True)]

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    def _record(self, job_id: str, fields: Sequence[bytes | None]) -> Record:
        record = _record(job_id, fields)
        if record.status.ended and record.result is None:  # it ended without a call: the job itself tells the rest
            job = self._redis.hget(self._keys(job_id).record, "job")
            with suppress(InvalidJobError):
                return replace(record, metadata=Job.from_json(job or b"").metadata)
        return record

    def _keys(self, job_id: str) -> JobKeys:
        return JobKeys.of(self._settings.namespace, job_id)


def _record(job_id: str, fields: Sequence[bytes | None]) -> Record:
    state, result, accepted_ms, started_ms, ended_ms, attempts = fields
    if state is None:
        return Record(job_id, JobStatus.UNKNOWN)
    times = [int(ms) if ms is not None else None for ms in (accepted_ms, started_ms, ended_ms)]
    status = JobStatus(state.decode())
    return Record(
        job_id,
        status,
        result.decode() if result is not None else None,
        times[0],
        times[1],
        times[2],
        int(attempts or 0),
    )
