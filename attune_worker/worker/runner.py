"""What does a worker do with a wake-up? Claim the job, run it, and write down how it ended or why it waits."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import JsonValue

from attune_worker.errors import (
    AttuneError,
    JobNotFoundError,
    NotNowError,
    ResultTimeoutError,
    ServiceUnavailableError,
    StoppedError,
)
from attune_worker.inbox import Inbox
from attune_worker.jobs import Job, JobResult, JobStatus
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.models.learned_lines import LearnedLines
from attune_worker.models.orphans import Orphans
from attune_worker.results import wait_for
from attune_worker.settings import Settings
from attune_worker.store.records import Claim, Finish, Record, Records
from attune_worker.submission import Submission
from attune_worker.worker.ends import Ends
from attune_worker.worker.liveness import Lease
from attune_worker.worker.outcomes import Pause, calls_of, cancelled, failed, succeeded, withdrawn
from attune_worker.worker.starts import STRAY_SECONDS, Start, Starts

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""How long a job waits for Redis to come back before its call."""

CLOSE_SECONDS = 5.0
"""How long the end of a process may be put off by ends of jobs that wait for Redis."""

SHORTEST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 32 * 86_400.0
"""Of a job that is put back: a month, as long as any budget's window."""

LONGEST_POLL_SECONDS = 20.0
"""How far the pauses of a job grow that finds its models taken each time it comes back."""

JITTER = 0.1
"""Jobs that wait for the same thing come back spread over this part of their wait."""

RECHECK_SECONDS = 5.0
"""How often ``submit`` looks whether a job that was taken elsewhere still runs there."""

NOTICE_SECONDS = 1.0
"""How soon ``submit``, waiting for a job, notices that its process ends."""

SHUT_DOWN = "its worker was shut down"
LEASE_LOST = "its worker's lease was lost"


class Runner:
    """Runs jobs for one worker process, from any number of threads."""

    def __init__(self, settings: Settings, *, stray_seconds: float = STRAY_SECONDS) -> None:
        self._settings = settings
        self._records = Records(settings)
        self._submission = Submission(settings)
        self._inbox = Inbox(settings)
        self._lease = Lease(settings)
        self._executor = EmpathyLLMExecutor(settings)
        self._learned = LearnedLines(settings)
        self._orphans = Orphans(settings)
        self._ends = Ends()
        self._starts = Starts(
            self._records,
            self._inbox,
            self._lease,
            kept=self._ends.kept,
            calls=self._orphans.of_job,
            stray_seconds=stray_seconds,
        )

    def begin(self) -> None:
        """Hold the lease from now on, though there is no job yet: others see that this process lives."""
        self._lease.start()

    def run(self, job_id: str, later: Callable[[JobResult], object] | None = None) -> JobResult:
        """Run the job unless it has ended or runs elsewhere, and return where it stands then.

        Each start may take ``timeout_seconds``, and none goes past the job's deadline. A job for which nothing can
        be called soon is put back: it waits without a worker. One whose end cannot be written, because Redis is away,
        is returned as running, and ``later`` is told the end once it is written. Raises ``JobNotFoundError`` for an
        id without a record, ``ServiceUnavailableError`` when Redis is away before the job is claimed,
        ``StoppedError`` when this process begins nothing more.
        """
        with self._starts.begin(job_id) as start:
            claim = self._claim(start)
            if not isinstance(claim, Claim):
                if claim is JobStatus.UNKNOWN:
                    raise JobNotFoundError(job_id)
                return self._patiently(lambda: self._records.read([job_id])[0]).to_result()
            try:
                ended = self._execute(start, claim)
            except BaseException:  # the thread itself is to end: the job is not ours any more
                self._ends.keep(
                    lambda: self._put_back(job_id, claim, Pause(0, SHUT_DOWN, claim.attempts)), job_id=job_id
                )
                raise
            if isinstance(ended, Pause):
                written = self._ends.write(lambda: self._put_back(job_id, claim, ended), job_id=job_id)
            else:
                characters = len(ended.content or "")
                written = self._ends.write(lambda: self._finish(claim, ended), characters, later, job_id=job_id)
            return written or JobResult(job_id=job_id, status=JobStatus.RUNNING)

    def submit(self, fields: Mapping[str, Any], task_id: str) -> JobResult:
        """Accept a job and run it here until it has ended.

        While it waits, or runs elsewhere, this thread waits for it; when it is due it goes on here, so that jobs
        that wait never need a thread that another one holds. Raises ``InvalidJobError`` for a job that cannot
        be accepted, ``StoppedError`` when this process begins nothing more: the job is accepted then, and asking
        again elsewhere does no harm.
        """
        [accepted] = self._submission.prepare([fields], task_id)
        self._submission.refuse_conflicts([accepted], self._patiently(lambda: self._records.accept([accepted])))
        while not (result := self.run(accepted[0])).status.ended:
            if (record := self._wait(accepted[0])) is not None:
                return record.to_result()
        return result

    def cancel_later(self, job_id: str) -> None:
        """Cancel a job, as soon as Redis can be told; returns at once."""
        self._ends.keep(lambda: self._records.cancel(job_id))

    def wind_down(self) -> None:
        """Begin nothing more; jobs that only wait in their threads are put back, calls under way go on."""
        self._starts.wind_down(SHUT_DOWN)

    def hand_back(self) -> None:
        """Cut off the calls under way too, and put their jobs back for other workers."""
        self._starts.stop(SHUT_DOWN)

    def close(self) -> None:
        """Write down what Redis has not been told yet, for a few seconds, and give lease and connections back."""
        self._ends.hurry()
        self._executor.close()
        self._ends.close(CLOSE_SECONDS)
        self._starts.close()
        self._lease.stop()
        self._inbox.close()
        self._learned.close()
        self._orphans.close()
        self._records.close()

    def _claim(self, start: Start) -> Claim | JobStatus:
        owner = uuid4().hex
        tried = False

        def claim() -> Claim | JobStatus:
            nonlocal tried
            self._lease.start()
            start.lease, channel = self._lease.id, self._inbox.ready()
            tried = True
            return self._records.claim(start.job_id, owner, start.lease, channel)

        try:
            return self._patiently(claim)
        except (ServiceUnavailableError, StoppedError):
            if tried:  # Redis may have heard it: nobody would run what this process holds
                self._ends.keep(lambda: self._release(start, owner), job_id=start.job_id)
            raise

    def _release(self, start: Start, owner: str) -> None:
        """Give back a job that this process may have claimed without hearing of it."""
        claim = self._records.claim(start.job_id, owner, start.lease)
        if isinstance(claim, Claim):
            self._records.put_back(start.job_id, claim.fence, 0, "Redis was away when it was claimed", claim.attempts)

    def _wait(self, job_id: str) -> Record | None:
        """Return the record of a job that ends; None when it may be time to run it, or this process ends."""
        seconds = self._patiently(lambda: self._records.due_in_seconds(job_id))
        ends = time.monotonic() + (RECHECK_SECONDS if seconds is None else seconds)
        while not self._starts.ending and (left := ends - time.monotonic()) > 0:
            with suppress(ResultTimeoutError):
                notice = min(left, NOTICE_SECONDS)
                return self._patiently(lambda: wait_for(self._records, self._inbox, job_id, notice))  # noqa: B023
        return None

    def _execute(self, start: Start, claim: Claim) -> JobResult | Pause:
        job_id = start.job_id
        metadata: dict[str, JsonValue] = {}
        start.interruption.only_while(lambda: self._lease.holds(start.lease), LEASE_LOST)
        try:
            job = Job.from_json(claim.job)
            metadata = job.metadata
            response = self._executor.execute(
                job,
                claim.remaining_seconds,
                job_id=job_id,
                attempts=claim.attempts,
                patience_seconds=self._settings.retry.patience_seconds,
                lease=start.lease,
                interruption=start.interruption,
            )
        except NotNowError as error:
            chance = random.random()  # noqa: S311  # spreads load, hides nothing
            seconds = _with_jitter(error.retry_after, claim.starts, chance)
            return Pause(seconds, error.message, calls_of(error, claim))
        except StoppedError as error:
            if start.cancelled:
                return cancelled(job_id, claim, error, metadata)
            return Pause(0, error.message, calls_of(error, claim))
        except AttuneError as error:
            return failed(job_id, claim, error, metadata)
        except Exception as error:  # the edge: whatever happened, the job gets an end and the log the traceback
            logger.exception("job %s met an error of attune-worker's own", job_id)
            return failed(job_id, claim, AttuneError(f"internal error: {type(error).__name__}"), metadata)
        if job.module_lines is not None and response.usage is not None:
            self._learned.learn(job.module_lines, response.usage.input_tokens)
        return succeeded(job_id, claim, response)

    def _finish(self, claim: Claim, result: JobResult) -> JobResult:
        verdict = self._records.finish(claim.fence, result)
        if verdict is Finish.CANCELLED:
            result = withdrawn(result)
            verdict = self._records.finish(claim.fence, result)
        if verdict is Finish.WRITTEN:
            return result
        logger.warning(
            "job %s ended here as %s, but it runs elsewhere, or has ended there", result.job_id, result.status
        )
        return self._records.read([result.job_id])[0].to_result()

    def _put_back(self, job_id: str, claim: Claim, pause: Pause) -> JobResult:
        if self._records.put_back(job_id, claim.fence, pause.seconds, pause.reason, pause.attempts):
            logger.info("job %s waits for %.1f s: %s", job_id, pause.seconds, pause.reason)
        else:
            logger.warning("job %s was to wait, but another worker has it, or it has ended", job_id)
        return self._records.read([job_id])[0].to_result()

    def _patiently(self, script: Callable[[], T]) -> T:
        """Run a script of the job's record, again and again for a while if Redis is away: each may run twice."""
        gives_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            if self._starts.ending:
                raise StoppedError(SHUT_DOWN)
            try:
                return script()
            except ServiceUnavailableError as error:
                if time.monotonic() > gives_up:
                    raise
                logger.warning("waiting for Redis: %s", error)
                time.sleep(1.0)


def _with_jitter(wait_seconds: float | None, starts: int, chance: float) -> float:
    """Return how long a job waits that was told to wait for so long (None: it was not said); ``chance`` is 0 to 1.

    A job that is put back again and again comes back less and less often: thousands that wait for one provider
    would otherwise keep the workers busy with asking.
    """
    patience = min(SHORTEST_WAIT_SECONDS * 2.0 ** min(starts - 1, 30), LONGEST_POLL_SECONDS)
    seconds = min(max(wait_seconds or 0.0, patience), LONGEST_WAIT_SECONDS)
    return seconds * (1 + JITTER * chance)
