"""What is written down of a start of a job: how it ended, or why it has to wait?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from attune_worker.errors import AttuneError, DeadlineExceededError, ExecutionError
from attune_worker.jobs import Attempt, JobError, JobResult, JobStatus, total_cost
from attune_worker.models.executor import LLMResponse
from attune_worker.store.records import Claim

CANCELLED = JobError(type="cancelled", message="cancelled while it ran")


@dataclass(frozen=True, slots=True)
class Pause:
    """The start came to no end: the job waits for so many seconds, with all calls so far."""

    seconds: float
    reason: str
    attempts: Sequence[Attempt]


def succeeded(job_id: str, claim: Claim, response: LLMResponse) -> JobResult:
    """Return the end of a job that was answered."""
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


def failed(job_id: str, claim: Claim, error: AttuneError, metadata: dict[str, JsonValue]) -> JobResult:
    """Return the end of a job that has no answer: it failed, or its deadline passed."""
    return _unanswered(
        job_id,
        claim,
        calls_of(error, claim),
        JobStatus.EXPIRED if isinstance(error, DeadlineExceededError) else JobStatus.FAILED,
        JobError(
            type=error.type,
            message=error.message,
            retry_after=error.retry_after if isinstance(error, ExecutionError) else None,
        ),
        metadata,
    )


def cancelled(job_id: str, claim: Claim, error: AttuneError, metadata: dict[str, JsonValue]) -> JobResult:
    """Return the end of a job that was stopped because it had been cancelled."""
    return _unanswered(job_id, claim, calls_of(error, claim), JobStatus.CANCELLED, CANCELLED, metadata)


def withdrawn(result: JobResult) -> JobResult:
    """Return the end of a job that was cancelled in the moment in which it ended otherwise: what it cost stays."""
    changes = {"status": JobStatus.CANCELLED, "content": None, "finish_reason": None, "error": CANCELLED}
    return result.model_copy(update=changes)


def calls_of(error: AttuneError, claim: Claim) -> tuple[Attempt, ...]:
    """Return all calls of a job whose start ended with ``error``."""
    return (tuple(error.attempts) if isinstance(error, ExecutionError) else ()) or claim.attempts


def _unanswered(
    job_id: str,
    claim: Claim,
    attempts: tuple[Attempt, ...],
    status: JobStatus,
    error: JobError,
    metadata: dict[str, JsonValue],
) -> JobResult:
    last = attempts[-1] if attempts else None
    return JobResult(
        job_id=job_id,
        status=status,
        model_id=last.model_id if last else None,
        provider=last.provider if last else None,
        tier=last.tier if last else None,
        cost_usd=total_cost(attempts),
        latency_ms=last.latency_ms if last else None,
        queue_ms=claim.queue_ms,
        attempts=attempts,
        error=error,
        metadata=metadata,
    )
