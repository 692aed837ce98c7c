"""What does a worker do with a wake-up? Claim the job, run it, and write down how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import JsonValue

from attune_worker.errors import (
    AttuneError,
    DeadlineExceededError,
    ExecutionError,
    JobNotFoundError,
    ServiceUnavailableError,
)
from attune_worker.inbox import Inbox
from attune_worker.jobs import Job, JobError, JobResult, JobStatus, total_cost
from attune_worker.models.executor import EmpathyLLMExecutor, LLMResponse
from attune_worker.results import wait_for
from attune_worker.settings import Settings
from attune_worker.store.records import Claim, Records
from attune_worker.submission import Submission

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""How long a job waits for Redis to come back, before its call, and after it with an answer that has been paid for."""

LEASE_MARGIN_SECONDS = PATIENCE_SECONDS + 60.0
"""How much longer than a job may run its claim is held: its end may have to wait for Redis."""


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

        Raises ``JobNotFoundError`` for an id without a record, ``ServiceUnavailableError`` when Redis is away.
        """
        lease_seconds = self._settings.timeout_seconds + LEASE_MARGIN_SECONDS
        owner = uuid4().hex
        claim = self._patiently(lambda: self._records.claim(job_id, owner, lease_seconds))
        if not isinstance(claim, Claim):
            if claim is JobStatus.UNKNOWN:
                raise JobNotFoundError(job_id)
            return self._records.read([job_id])[0].to_result()
        result = self._execute(job_id, claim)
        if not self._patiently(lambda: self._records.finish(claim.fence, result)):
            logger.warning("job %s ended here as %s, but its end was already written", job_id, result.status)
            return self._records.read([job_id])[0].to_result()
        return result

    def submit(self, fields: Mapping[str, Any], task_id: str) -> JobResult:
        """Accept a job and run it here; one that runs elsewhere already is waited for.

        Raises ``InvalidJobError`` for a job that cannot be accepted.
        """
        [accepted] = self._submission.prepare([fields], task_id)
        self._submission.refuse_conflicts([accepted], self._records.accept([accepted]))
        result = self.run(accepted[0])
        if result.status.ended:
            return result
        return wait_for(self._records, self._inbox, accepted[0], self._settings.timeout_seconds).to_result()

    def _execute(self, job_id: str, claim: Claim) -> JobResult:
        metadata: dict[str, JsonValue] = {}
        try:
            job = Job.from_json(claim.job)
            metadata = job.metadata
            response = self._executor.execute(job, claim.remaining_seconds)
        except AttuneError as error:
            return _failed(job_id, claim, error, metadata)
        except Exception as error:  # the edge: whatever happened, the job gets an end and the log the traceback
            logger.exception("job %s met an error of attune-worker's own", job_id)
            return _failed(job_id, claim, AttuneError(f"internal error: {type(error).__name__}"), metadata)
        return _succeeded(job_id, claim, response)

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
    attempts = error.attempts if isinstance(error, ExecutionError) else ()
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
