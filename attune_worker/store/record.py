"""What is known of a job? Its record as it was read, the claim of whoever runs it, and how an end was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import JsonValue, TypeAdapter, ValidationError

from attune_worker.errors import AttuneError, JobNotFoundError
from attune_worker.jobs import Attempt, JobError, JobResult, JobStatus, total_cost

FIELDS = (
    "state",
    "result",
    "accepted_ms",
    "started_ms",
    "ended_ms",
    "attempts",
    "reason",
    "progress",
    "due_ms",
    "deadline_ms",
    "cancelled_ms",
    "crashes",
    "lost",
    "worker",
)
"""What is read of a record, in the order in which ``Record.of`` takes it."""

_ATTEMPTS = TypeAdapter(tuple[Attempt, ...])


class Finish(StrEnum):
    """How FINISH took an end.

    ``stale``: another worker has the job by now, or it has ended, so this end does not count. ``cancelled``: the job
    was cancelled while it ran, and no other end is taken.
    """

    WRITTEN = "written"
    STALE = "stale"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What ACCEPT said of a job. ``conflict``: its id belongs to a different job; ``wake``: a wake-up is due."""

    conflict: bool
    wake: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """A job taken by one worker. ``fence`` proves it at FINISH; times are in milliseconds of Redis' clock.

    ``attempts`` are the calls of its earlier starts, ``crashes`` counts the workers that were lost with it, and
    ``starts`` how often it was taken, this time included.
    """

    fence: int
    job: str
    accepted_ms: int
    claimed_ms: int
    deadline_ms: int
    started_ms: int
    attempts: tuple[Attempt, ...] = ()
    crashes: int = 0
    starts: int = 1

    @property
    def queue_ms(self) -> int:
        """How long the job waited until its first start."""
        return self.started_ms - self.accepted_ms

    @property
    def remaining_seconds(self) -> float | None:
        """Time left at the claim until the job's deadline; None: it has none."""
        return (self.deadline_ms - self.claimed_ms) / 1000 if self.deadline_ms else None


@dataclass(frozen=True, slots=True)
class Record:
    """Where a job is, as it was read.

    ``started_ms`` is its first start, ``attempts`` counts its starts. ``progress`` are the calls of starts that put
    it back or were lost; while it waits, ``reason`` says why and ``due_ms`` until when. ``worker`` is the lease of the
    worker that runs it, or ran it last; ``crashes`` counts those that were lost with it, ``lost`` tells how, a line
    for each. ``cancelled_ms``: it was cancelled then, while it ran. Times are in ms of Redis' clock.
    """

    job_id: str
    status: JobStatus
    result: str | None = None
    accepted_ms: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    attempts: int = 0
    reason: str | None = None
    progress: tuple[Attempt, ...] = ()
    due_ms: int | None = None
    deadline_ms: int | None = None
    cancelled_ms: int | None = None
    crashes: int = 0
    lost: tuple[str, ...] = ()
    worker: str | None = None
    metadata: dict[str, JsonValue] = field(default_factory=dict)

    @classmethod
    def of(cls, job_id: str, values: Sequence[bytes | None]) -> Record:
        """Return the record whose ``FIELDS`` have these values; what cannot be read counts as missing."""
        read = dict(zip(FIELDS, values, strict=True))
        status = status_of(read["state"])
        if status is JobStatus.UNKNOWN:
            return cls(job_id, status)
        return cls(
            job_id,
            status,
            result=_text(read["result"]),
            accepted_ms=whole(read["accepted_ms"]),
            started_ms=whole(read["started_ms"]),
            ended_ms=whole(read["ended_ms"]),
            attempts=whole(read["attempts"]) or 0,
            reason=_text(read["reason"]),
            progress=attempts_of(read["progress"]),
            due_ms=whole(read["due_ms"]),
            deadline_ms=whole(read["deadline_ms"]) or None,
            cancelled_ms=whole(read["cancelled_ms"]),
            crashes=whole(read["crashes"]) or 0,
            lost=tuple((_text(read["lost"]) or "").splitlines()),
            worker=_text(read["worker"]) or None,
        )

    def to_result(self) -> JobResult:
        """Return how the job ended, or what is known so far; raises ``JobNotFoundError`` for one that is unknown."""
        if self.status is JobStatus.UNKNOWN:
            raise JobNotFoundError(self.job_id)
        if self.result is not None:
            try:
                return JobResult.model_validate_json(self.result)
            except ValidationError:
                raise AttuneError(f"the result of job {self.job_id} cannot be read; was it written by us?") from None
        return JobResult(
            job_id=self.job_id,
            status=self.status,
            cost_usd=total_cost(self.progress) if self.status.ended else None,
            queue_ms=self._queue_ms,
            attempts=self.progress,
            error=self._error,
            metadata=self.metadata,
        )

    @property
    def _queue_ms(self) -> int | None:
        until_ms = self.started_ms or self.ended_ms
        return until_ms - self.accepted_ms if until_ms and self.accepted_ms else None

    @property
    def _error(self) -> JobError | None:
        """How a job came to end that no worker ended."""
        when = "before it started"
        if self.reason is not None:
            when = f"while it waited: {self.reason}"
        elif self.cancelled_ms is not None:
            when = "while it ran"
        if self.status is JobStatus.CANCELLED:
            return JobError(type="cancelled", message=f"cancelled {when}")
        if self.status is JobStatus.EXPIRED:
            return JobError(type="deadline_exceeded", message=f"the deadline passed {when}")
        if self.status is JobStatus.DEAD:
            workers = "1 worker was" if self.crashes == 1 else f"{self.crashes} workers were"
            evidence = f": {'; '.join(self.lost)}" if self.lost else ""
            return JobError(type="poison", message=f"{workers} lost while they ran it{evidence}")
        return None


def status_of(state: bytes | None) -> JobStatus:
    """Return the status that a record's state stands for."""
    try:
        return JobStatus((state or b"").decode(errors="replace"))
    except ValueError:  # nobody of us wrote that
        return JobStatus.UNKNOWN


def whole(value: bytes | None) -> int | None:
    """Return a number of a record; None where there is none."""
    try:
        return None if value is None else int(value)
    except ValueError:
        return None


def attempts_of(progress: bytes | None) -> tuple[Attempt, ...]:
    """Return the calls that a record tells of."""
    if not progress:
        return ()
    try:
        return _ATTEMPTS.validate_json(progress)
    except ValidationError:
        return ()


def progress_of(attempts: Sequence[Attempt]) -> bytes:
    """Return calls as a record tells of them."""
    return _ATTEMPTS.dump_json(tuple(attempts), exclude_defaults=True)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")
