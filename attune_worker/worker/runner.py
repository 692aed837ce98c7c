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
    DeadlineExceededError,
    ExecutionError,
    JobNotFoundError,
    NotNowError,
    ResultTimeoutError,
    ServiceUnavailableError,
)
from attune_worker.inbox import Inbox
from attune_worker.jobs import Job, JobError, JobResult, JobStatus, total_cost
from attune_worker.models.executor import EmpathyLLMExecutor, LLMResponse
from attune_worker.results import wait_for
from attune_worker.settings import Settings
from attune_worker.store.records import Claim, Record, Records
from attune_worker.submission import Submission

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""How long a job waits for Redis to come back, before its call, and after it with an answer that has been paid for."""

LEASE_MARGIN_SECONDS = PATIENCE_SECONDS + 60.0
"""How much longer than a job may run its claim is held: its end may have to wait for Redis."""

SHORTEST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 32 * 86_400.0
"""Of a job that is put back: a month, as long as any budget's window."""

LONGEST_POLL_SECONDS = 20.0
"""How far the pauses of a job grow that finds its models taken each time it comes back."""

JITTER = 0.1
"""Jobs that wait for the same thing come back spread over this part of their wait."""

RECHECK_SECONDS = 5.0
"""How often ``submit`` looks whether a job that was taken elsewhere still runs there."""


class Runner:
    """Runs jobs for one worker process, from any number of threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._records = Records(settings)
        self._submission = Submission(settings)
        self._inbox = Inbox(settings)
        self._executor = EmpathyLLMExecutor(settings)

    def run(self, job_id: str) -> JobResult:
        """Run the job unless it has ended or runs elsewhere, and return where it stands then.

        Each start may take ``timeout_seconds``, and none goes past the job's deadline. A job for which nothing can
        be called soon is put back: it waits without a worker. Raises ``JobNotFoundError`` for an id without a
        record, ``ServiceUnavailableError`` when Redis is away.
        """
        lease_seconds = self._settings.timeout_seconds + LEASE_MARGIN_SECONDS
        owner = uuid4().hex
        claim = self._patiently(lambda: self._records.claim(job_id, owner, lease_seconds))
        if not isinstance(claim, Claim):
            if claim is JobStatus.UNKNOWN:
                raise JobNotFoundError(job_id)
            return self._records.read([job_id])[0].to_result()
        result = self._execute(job_id, claim)
        if isinstance(result, NotNowError):
            return self._put_back(job_id, claim, result)
        if not self._patiently(lambda: self._records.finish(claim.fence, result)):
            logger.warning("job %s ended here as %s, but its end was already written", job_id, result.status)
            return self._records.read([job_id])[0].to_result()
        return result

    def submit(self, fields: Mapping[str, Any], task_id: str) -> JobResult:
        """Accept a job and run it here until it has ended.

        While it waits, or runs elsewhere, this thread waits for it; when it is due it goes on here, so that jobs
        that wait never need a thread that another one holds. Raises ``InvalidJobError`` for a job that cannot
        be accepted.
        """
        [accepted] = self._submission.prepare([fields], task_id)
        self._submission.refuse_conflicts([accepted], self._records.accept([accepted]))
        while not (result := self.run(accepted[0])).status.ended:
            with suppress(ResultTimeoutError):
                return self._patiently(lambda: self._wait(accepted[0])).to_result()
        return result

    def close(self) -> None:
        """Write down what Redis has not been told yet, for a few seconds, and give connections back."""
        self._executor.close()
        self._inbox.close()
        self._records.close()

    def _wait(self, job_id: str) -> Record:
        """Return the record of a job that ends; raises ``ResultTimeoutError`` when it may be time to run it."""
        seconds = self._records.due_in_seconds(job_id)
        return wait_for(self._records, self._inbox, job_id, RECHECK_SECONDS if seconds is None else seconds)

    def _execute(self, job_id: str, claim: Claim) -> JobResult | NotNowError:
        metadata: dict[str, JsonValue] = {}
        try:
            job = Job.from_json(claim.job)
            metadata = job.metadata
            response = self._executor.execute(
                job,
                claim.remaining_seconds,
                job_id=job_id,
                attempts=claim.attempts,
                patience_seconds=self._settings.retry.patience_seconds,
            )
        except NotNowError as error:
            return error
        except AttuneError as error:
            return _failed(job_id, claim, error, metadata)
        except Exception as error:  # the edge: whatever happened, the job gets an end and the log the traceback
            logger.exception("job %s met an error of attune-worker's own", job_id)
            return _failed(job_id, claim, AttuneError(f"internal error: {type(error).__name__}"), metadata)
        return _succeeded(job_id, claim, response)

    def _put_back(self, job_id: str, claim: Claim, error: NotNowError) -> JobResult:
        chance = random.random()  # noqa: S311  # spreads load, hides nothing
        wait_seconds = _with_jitter(error.retry_after, claim.fence, chance)
        attempts = error.attempts or claim.attempts
        if self._patiently(lambda: self._records.put_back(job_id, claim.fence, wait_seconds, error.message, attempts)):
            logger.info("job %s waits for %.1f s: %s", job_id, wait_seconds, error.message)
        else:
            logger.warning("job %s was to wait, but another worker has it, or it has ended", job_id)
        return self._patiently(lambda: self._records.read([job_id])[0]).to_result()

    @staticmethod
    def _patiently(script: Callable[[], T]) -> T:
        """Run a script of the job's record, again and again for a while if Redis is away: each may run twice."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return script()
            except ServiceUnavailableError as error:
                if time.monotonic() > give_up:
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


def _succeeded(job_id: str, claim: Claim, response: LLMResponse) -> JobResult:
    return JobResult(
        job_id=job_id,
        status=JobStatus.SUCCEEDED,
        content=response.content,
        model_id=response.model_id,
        provider=response.provider,
        tier=response.tier,
        auth_mode=response.auth_mode,
        usage=response.usage,
        cost_usd=response.cost_usd,
        latency_ms=response.latency_ms,
        queue_ms=claim.queue_ms,
        finish_reason=response.finish_reason,
        attempts=response.attempts,
        metadata=response.metadata,
    )


def _failed(job_id: str, claim: Claim, error: AttuneError, metadata: dict[str, JsonValue]) -> JobResult:
    attempts = (error.attempts if isinstance(error, ExecutionError) else ()) or claim.attempts
    last = attempts[-1] if attempts else None
    return JobResult(
        job_id=job_id,
        status=JobStatus.EXPIRED if isinstance(error, DeadlineExceededError) else JobStatus.FAILED,
        model_id=last.model_id if last else None,
        provider=last.provider if last else None,
        tier=last.tier if last else None,
        cost_usd=total_cost(attempts),
        latency_ms=last.latency_ms if last else None,
        queue_ms=claim.queue_ms,
        attempts=attempts,
        error=JobError(
            type=error.type,
            message=error.message,
            retry_after=error.retry_after if isinstance(error, ExecutionError) else None,
        ),
        metadata=metadata,
    )
