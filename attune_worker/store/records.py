"""What is known of a job, and who may change it? ACCEPT, CLAIM, PUT_BACK, FINISH, CANCEL and WATCH on its record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from attune_worker.errors import AttuneError, InvalidJobError, JobNotFoundError
from attune_worker.jobs import Attempt, Job, JobError, JobResult, JobStatus, total_cost
from attune_worker.settings import Settings
from attune_worker.store.connection import Command, RedisClient, close_idle, connect, reaching, together
from attune_worker.store.keys import JobKeys
from attune_worker.store.scripts import Argument, Script

ACCEPT = Script("accept", "values")
CLAIM = Script("claim", "values", "ending")
PUT_BACK = Script("put_back", "values")
FINISH = Script("finish", "values", "ending")
CANCEL = Script("cancel", "values", "ending")
WATCH = Script("watch")

WAITER_SECONDS = 3600
"""How long a waiting client is remembered; one that waits longer says so again."""

_FIELDS = ("state", "result", "accepted_ms", "started_ms", "ended_ms", "attempts", "reason", "progress", "due_ms")
"""What is read of a record; watch.lua has the same list."""

_ATTEMPTS = TypeAdapter(tuple[Attempt, ...])


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What ACCEPT said of a job. ``conflict``: its id belongs to a different job; ``wake``: a wake-up is due."""

    conflict: bool
    wake: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """A job taken by one worker. ``fence`` proves it at FINISH; times are in milliseconds of Redis' clock.

    ``attempts`` are the calls of its earlier starts, if it was put back.
    """

    fence: int
    job: str
    accepted_ms: int
    claimed_ms: int
    deadline_ms: int
    started_ms: int
    attempts: tuple[Attempt, ...] = ()

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
    it back; while it waits, ``reason`` says why and ``due_ms`` until when. Times are in ms of Redis' clock.
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
    metadata: dict[str, JsonValue] = field(default_factory=dict)

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
        when = "before it started"
        if self.reason is not None:
            when = f"while it waited: {self.reason}"
        elif self.attempts:
            when = "after the worker that ran it was lost"
        if self.status is JobStatus.CANCELLED:
            return JobError(type="cancelled", message=f"cancelled {when}")
        if self.status is JobStatus.EXPIRED:
            return JobError(type="deadline_exceeded", message=f"the deadline passed {when}")
        return None


class Records:
    """The job records of one namespace. Every method raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
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
        """Take a job that is queued or waits, or return the status that forbids it."""
        keys = self._keys(job_id)
        with reaching(self._settings):
            answer = CLAIM(
                self._redis,
                (keys.record, keys.queued, keys.running, keys.waiters, keys.due),
                (job_id, owner, round(lease_seconds * 1000), self._settings.retention_seconds),
            )
        if answer[0] != b"claimed":
            return _status(answer[0])
        _, fence, job, accepted_ms, claimed_ms, deadline_ms, started_ms, progress = answer
        return Claim(
            fence,
            (job or b"").decode(errors="replace"),
            accepted_ms,
            claimed_ms,
            deadline_ms,
            started_ms,
            _attempts(progress),
        )

    def put_back(self, job_id: str, fence: int, wait_seconds: float, reason: str, attempts: Sequence[Attempt]) -> bool:
        """Have a claimed job wait before it goes on, though not past its deadline; False as for ``finish``.

        ``reason`` says why, in one line for whoever watches; ``attempts`` are all calls so far.
        """
        keys = self._keys(job_id)
        progress = _ATTEMPTS.dump_json(tuple(attempts), exclude_defaults=True)
        with reaching(self._settings):
            return bool(
                PUT_BACK(
                    self._redis,
                    (keys.record, keys.running, keys.due),
                    (job_id, fence, ceil(wait_seconds * 1000), reason, progress),
                )
            )

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
        """Cancel a job that has not started, or waits to go on, and return where it is then."""
        keys = self._keys(job_id)
        with reaching(self._settings):
            state = CANCEL(
                self._redis,
                (keys.record, keys.queued, keys.waiters, keys.due),
                (job_id, self._settings.retention_seconds),
            )
        return _status(state)

    def read(self, job_ids: Sequence[str]) -> list[Record]:
        """Read where jobs are, in one round trip."""
        records = [self._keys(job_id).record for job_id in job_ids]
        answers = self._together([(record, ("HMGET", record, *_FIELDS)) for record in records])
        return [self._record(*pair) for pair in zip(job_ids, answers, strict=True)]

    def watch(self, job_ids: Sequence[str], channel: str) -> list[Record]:
        """Read where jobs are, and have ``channel`` told the id of each that has not ended yet, when it does."""
        calls = []
        for job_id in job_ids:
            keys = self._keys(job_id)
            calls.append(((keys.record, keys.waiters), (channel, WAITER_SECONDS)))
        with reaching(self._settings):
            return [self._record(*pair) for pair in zip(job_ids, WATCH.many(self._redis, calls), strict=True)]

    def due_in_seconds(self, job_id: str) -> float | None:
        """Return how long a job that waits has to wait yet, by Redis' clock; None: it does not wait."""
        record = self._keys(job_id).record
        time, (state, due_ms) = self._together([(record, ("TIME",)), (record, ("HMGET", record, "state", "due_ms"))])
        if state != b"waiting":
            return None
        now_ms = int(time[0]) * 1000 + int(time[1]) // 1000
        return max((_whole(due_ms) or 0) - now_ms, 0) / 1000

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _together(self, commands: Sequence[tuple[str, Command]]) -> list[Any]:
        with reaching(self._settings):
            answers = together(self._redis, commands)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

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
    state, result, accepted_ms, started_ms, ended_ms, attempts, reason, progress, due_ms = fields
    status = _status(state)
    if status is JobStatus.UNKNOWN:
        return Record(job_id, status)
    return Record(
        job_id,
        status,
        result=_text(result),
        accepted_ms=_whole(accepted_ms),
        started_ms=_whole(started_ms),
        ended_ms=_whole(ended_ms),
        attempts=_whole(attempts) or 0,
        reason=_text(reason),
        progress=_attempts(progress),
        due_ms=_whole(due_ms),
    )


def _status(state: bytes | None) -> JobStatus:
    try:
        return JobStatus((state or b"").decode(errors="replace"))
    except ValueError:  # nobody of us wrote that
        return JobStatus.UNKNOWN


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")


def _whole(value: bytes | None) -> int | None:
    try:
        return None if value is None else int(value)
    except ValueError:
        return None


def _attempts(progress: bytes | None) -> tuple[Attempt, ...]:
    if not progress:
        return ()
    try:
        return _ATTEMPTS.validate_json(progress)
    except ValidationError:
        return ()
