"""Who may change what is known of a job, and how? The scripts on its record, from ACCEPT to its end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from math import ceil
from typing import Any
from uuid import uuid4

from attune_worker.errors import InvalidJobError
from attune_worker.jobs import Attempt, Job, JobResult, JobStatus
from attune_worker.settings import Settings
from attune_worker.store.connection import Command, RedisClient, close_idle, connect, reaching, together
from attune_worker.store.keys import FleetKeys, JobKeys
from attune_worker.store.listing import Listing
from attune_worker.store.record import (
    FIELDS,
    Acceptance,
    Claim,
    Finish,
    Record,
    attempts_of,
    progress_of,
    status_of,
    whole,
)
from attune_worker.store.scripts import Argument, Script

__all__ = ["Acceptance", "Claim", "Finish", "Record", "Records"]

ACCEPT = Script("accept", "values", "places")
CLAIM = Script("claim", "values", "places", "ending")
PUT_BACK = Script("put_back", "values", "places", "ending")
FINISH = Script("finish", "values", "places", "ending")
CANCEL = Script("cancel", "values", "places", "ending")
TAKE_OVER = Script("take_over", "values", "places", "ending")
RETRY = Script("retry", "values", "places")
WATCH = Script("watch")

WAITER_SECONDS = 3600
"""How long a waiting client is remembered; one that waits longer says so again."""

LOST = "its worker was lost"
"""Why a job waits that was taken over."""

BATCH = 500
"""Most records that are read in one round trip where there may be many."""


class Records:
    """The job records of one namespace. Every method raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._redis = redis or connect(settings)
        self._listing = Listing(settings, self._redis)

    def accept(self, jobs: Sequence[tuple[str, Job, str]]) -> list[Acceptance]:
        """Write the records of ``(job id, job, its JSON)`` in one round trip, and return what became of each."""
        with reaching(self._settings):
            answers = ACCEPT.many(self._redis, [self._accept_call(*job) for job in jobs])
        return [Acceptance(conflict=verdict == b"conflict", wake=bool(due)) for verdict, due in answers]

    def _accept_call(self, job_id: str, job: Job, text: str) -> tuple[Sequence[str], Sequence[Argument]]:
        digest = hashlib.sha256(text.encode()).hexdigest()
        deadline_ms = ceil((job.deadline_seconds or 0) * 1000)
        return self._keys(job_id).all, (job_id, text, digest, job.priority, deadline_ms)

    def claim(self, job_id: str, owner: str, lease: str, channel: str = "") -> Claim | JobStatus:
        """Take a job that is queued or waits, or return the status that forbids it.

        ``owner`` is unique to the delivery: the same one may ask again, should the answer have been lost, and gets the
        same claim, though no second one after that. ``lease`` is that of the worker, and ``channel`` the one on which
        it is told the job's id when that is cancelled.
        """
        answer = self._run(CLAIM, job_id, owner, lease, channel, self._settings.retention_seconds)
        if answer[0] != b"claimed":
            return status_of(answer[0])
        _, fence, job, accepted_ms, claimed_ms, deadline_ms, started_ms, progress, crashes, starts = answer
        text = (job or b"").decode(errors="replace")
        attempts = attempts_of(progress)
        return Claim(fence, text, accepted_ms, claimed_ms, deadline_ms, started_ms, attempts, crashes, starts)

    def put_back(
        self, job_id: str, fence: int | bytes, wait_seconds: float, reason: str, attempts: Sequence[Attempt]
    ) -> bool:
        """Have a claimed job wait before it goes on, though not past its deadline; False when it does not wait.

        That is so when another worker holds it by now, or it has ended; one that was cancelled while it ran ends
        here. ``reason`` says why it waits, in one line for whoever watches; ``attempts`` are all calls so far.
        """
        wait_ms = ceil(wait_seconds * 1000)
        retention_seconds = self._settings.retention_seconds
        return bool(self._run(PUT_BACK, job_id, fence, wait_ms, reason, progress_of(attempts), retention_seconds))

    def finish(self, fence: int, result: JobResult) -> Finish:
        """Write how a job ended, and return whether it was taken."""
        text = result.model_dump_json(exclude_defaults=True)
        retention_seconds = self._settings.retention_seconds
        return Finish(self._run(FINISH, result.job_id, fence, result.status.value, text, retention_seconds).decode())

    def cancel(self, job_id: str) -> JobStatus:
        """Cancel a job; return ``cancelled`` when it has ended so, or will because it runs, else where it is."""
        return status_of(self._run(CANCEL, job_id, self._settings.retention_seconds))

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        """Return which of these jobs, that the caller runs, were cancelled."""
        keys = [self._keys(job_id).record for job_id in job_ids]
        answers = self._together([(key, ("HMGET", key, "state", "cancelled_ms")) for key in keys])
        return {
            job_id
            for job_id, (state, cancelled_ms) in zip(job_ids, answers, strict=True)
            if state == b"cancelled" or (state == b"running" and cancelled_ms is not None)
        }

    def fences(self, job_ids: Sequence[str], lease: str) -> dict[str, bytes]:
        """Return the fences of those of these jobs that run under ``lease``, as they stand in their records."""
        keys = [self._keys(job_id).record for job_id in job_ids]
        answers = self._together([(key, ("HMGET", key, "state", "worker", "fence")) for key in keys])
        return {
            job_id: fence
            for job_id, (state, worker, fence) in zip(job_ids, answers, strict=True)
            if state == b"running" and worker == lease.encode() and fence is not None
        }

    def take_over(self, job_id: str, lease: str, attempts: Sequence[Attempt], evidence: str) -> JobStatus | None:
        """Take one job over, as ``take_over_all`` does."""
        [status] = self.take_over_all([(job_id, lease, attempts, evidence)])
        return status

    def take_over_all(self, lost: Sequence[tuple[str, str, Sequence[Attempt], str]]) -> list[JobStatus | None]:
        """Take jobs away from workers that are dead, and return where each is; None: that worker had it no more.

        A job waits and is due at once. One that ``recovery.max_crashes`` workers were lost with is ``dead``; one that
        was cancelled while it ran is ``cancelled``. ``lost`` names for each the job, the lease that it ran under, all
        its calls so far, and in one line how the worker was lost.
        """
        limit, retention_seconds = self._settings.recovery.max_crashes, self._settings.retention_seconds
        calls: list[tuple[Sequence[str], Sequence[Argument]]] = []
        for job_id, lease, attempts, evidence in lost:
            line = " ".join(evidence.split())
            arguments = (job_id, lease, progress_of(attempts), line, limit, LOST, retention_seconds)
            calls.append((self._keys(job_id).all, arguments))
        with reaching(self._settings):
            states = TAKE_OVER.many(self._redis, calls)
        return [None if state is None else status_of(state) for state in states]

    def retry(self, job_id: str) -> JobStatus | None:
        """Put a job that is dead, failed, expired or cancelled back in line as new, and return what it was.

        None when that cannot be: it is under way, has succeeded, is unknown, or its prompt is gone. Its deadline is
        as long as it was, from now. The wake-up is for the caller to send.
        """
        record, calls = self._keys(job_id).record, FleetKeys(self._settings.namespace).job_calls(job_id)
        [before] = self._together([(record, ("HGET", record, "state"))])
        if not status_of(before).ended:
            return None  # the calls of one that runs are needed, should its worker be lost
        self._together([(calls, ("UNLINK", calls))])  # they are in the ledger, and no part of what begins anew
        state = self._run(RETRY, job_id, uuid4().hex)
        return None if state is None else status_of(state)

    def read(self, job_ids: Sequence[str]) -> list[Record]:
        """Read where jobs are, in one round trip."""
        keys = [self._keys(job_id).record for job_id in job_ids]
        answers = self._together([(key, ("HMGET", key, *FIELDS)) for key in keys])
        return [self._record(*pair) for pair in zip(job_ids, answers, strict=True)]

    def read_job(self, job_id: str) -> Job | None:
        """Return the job as it was submitted; None when it is unknown, or has succeeded and so its prompt is gone.

        Raises ``InvalidJobError`` for a record that cannot be read.
        """
        key = self._keys(job_id).record
        [text] = self._together([(key, ("HGET", key, "job"))])
        return None if text is None else Job.from_json(text)

    def watch(self, job_ids: Sequence[str], channel: str) -> list[Record]:
        """Read where jobs are, and have ``channel`` told the id of each that has not ended yet, when it does."""
        calls: list[tuple[Sequence[str], Sequence[Argument]]] = []
        for job_id in job_ids:
            keys = self._keys(job_id)
            calls.append(((keys.record, keys.waiters), (channel, WAITER_SECONDS, *FIELDS)))
        with reaching(self._settings):
            return [self._record(*pair) for pair in zip(job_ids, WATCH.many(self._redis, calls), strict=True)]

    def due_in_seconds(self, job_id: str) -> float | None:
        """Return how long a job that waits has to wait yet, by Redis' clock; None: it does not wait."""
        record = self._keys(job_id).record
        time, (state, due_ms) = self._together([(record, ("TIME",)), (record, ("HMGET", record, "state", "due_ms"))])
        if state != b"waiting":
            return None
        now_ms = int(time[0]) * 1000 + int(time[1]) // 1000
        return max((whole(due_ms) or 0) - now_ms, 0) / 1000

    def running(self) -> Iterator[tuple[str, str]]:
        """Go through the running jobs: job id, and lease of the worker that runs it.

        A job that starts or ends meanwhile may be missed, and one may be seen twice.
        """
        return self._listing.running()

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs are queued, running, waiting and dead."""
        return self._listing.counts()

    def listed(self, status: JobStatus | None, limit: int) -> list[Record]:
        """Return the records of up to ``limit`` jobs that are in this state, the latest first.

        None: those that run, wait and are queued, then those that ended. Of these, the latest are kept in the list:
        1,000 for each of the sixteen shards; of the dead, all.
        """
        found: list[Record] = []
        ids = iter(dict.fromkeys(self._listing.newest(status, limit)))
        while len(found) < limit and (batch := list(islice(ids, min(limit, BATCH)))):
            known = [record for record in self.read(batch) if record.status is not JobStatus.UNKNOWN]
            found += [record for record in known if status in {None, record.status}]
        return found[:limit]

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _run(self, script: Script, job_id: str, *args: Argument) -> Any:
        with reaching(self._settings):
            return script(self._redis, self._keys(job_id).all, (job_id, *args))

    def _together(self, commands: Sequence[tuple[str, Command]]) -> list[Any]:
        with reaching(self._settings):
            answers = together(self._redis, commands)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

    def _record(self, job_id: str, values: Sequence[bytes | None]) -> Record:
        record = Record.of(job_id, values)
        if record.status.ended and record.result is None:  # it ended without a call: the job itself tells the rest
            with suppress(InvalidJobError):
                job = self.read_job(job_id)
                return replace(record, metadata=job.metadata if job else {})
        return record

    def _keys(self, job_id: str) -> JobKeys:
        return JobKeys.of(self._settings.namespace, job_id)
