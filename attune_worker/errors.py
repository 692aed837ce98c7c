"""Which errors can happen, and what does each one mean for the job, the breaker and the shell?

    AttuneError
    ├── ConfigurationError            a setting is wrong; nothing was started
    ├── InvalidJobError               a job was refused at submission; nothing was written
    │   └── IdempotencyConflictError  the idempotency key already belongs to a different job
    ├── JobNotFoundError              no such job, or its retention time has passed
    ├── ResultTimeoutError            the job had not ended when the caller stopped waiting
    ├── ServiceUnavailableError       Redis or the broker cannot be reached
    └── ExecutionError                a job ended without an answer
        ├── NoCandidateError          no configured model may serve the job
        ├── DeadlineExceededError     the deadline passed before an answer came
        ├── NotNowError               nothing that may serve the job can be called before some time
        ├── BudgetExceededError       a hard budget has no room for the call
        ├── StoppedError              it was cancelled, or its worker ends, while it ran
        └── ProviderError             one call to a provider failed
            ├── RateLimitedError         429: wait, or use another model
            ├── CredentialError          401, 402, 403, spend limit: this key is out
            ├── OverloadedError          500, 502, 503, 504, 529: the provider is struggling
            ├── ProviderTimeoutError     no answer in time
            ├── ProviderConnectionError  no connection, or it broke
            ├── MalformedAnswerError     an answer that is not what the wire format promises
            ├── BadRequestError          400, 404, 413, 422: the request itself is wrong
            └── ContextTooLongError      the prompt does not fit this model's window

Every class carries three facts: ``retryable`` (the same call may succeed later),
``counts_against_breaker`` (the failure says something about the provider's health) and
``exit_code`` (what the command line returns). Errors are told apart by class, never by text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attune_worker.jobs import Attempt


class AttuneError(Exception):
    """Base of every error that attune-worker raises on purpose."""

    retryable: ClassVar[bool] = False
    counts_against_breaker: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    type: ClassVar[str] = "error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigurationError(AttuneError):
    """Raised when settings cannot be used: the message names the source, the key and what is allowed."""

    exit_code = 2
    type = "configuration"


class InvalidJobError(AttuneError):
    """Raised at submission when a job cannot be accepted; nothing was written.

    ``field`` names the offending field, ``index`` its place in a batch (None for a single job).
    """

    exit_code = 2
    type = "invalid_job"

    def __init__(self, message: str, *, field: str | None = None, index: int | None = None) -> None:
        super().__init__(message if index is None else f"job {index}: {message}")
        self.reason = message
        self.field = field
        self.index = index


class IdempotencyConflictError(InvalidJobError):
    """Raised when an idempotency key is used again with a different job.

    ``index`` is the first such job's place in its batch, ``conflicts`` are the places of all of them,
    and ``job_ids`` the ids of the whole batch: the other jobs were submitted.
    """

    type = "idempotency_conflict"

    def __init__(
        self,
        message: str,
        *,
        index: int | None = None,
        conflicts: Sequence[int] = (),
        job_ids: Sequence[str] = (),
    ) -> None:
        super().__init__(message, field="idempotency_key", index=index)
        self.conflicts = tuple(conflicts)
        self.job_ids = tuple(job_ids)


class JobNotFoundError(AttuneError):
    """Raised when no record of the job exists: never accepted here, or retention has passed."""

    type = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id!r}: it was never accepted here, or its retention time has passed")
        self.args = (job_id,)  # what pickle and Celery make the error again from
        self.job_id = job_id


class ResultTimeoutError(AttuneError, TimeoutError):
    """Raised when a job had not ended within the caller's timeout; the job itself goes on."""

    type = "result_timeout"

    def __init__(self, job_id: str, timeout_seconds: float) -> None:
        super().__init__(f"job {job_id} had not ended after {timeout_seconds:g} s; it goes on, ask again later")
        self.args = (job_id, timeout_seconds)
        self.job_id = job_id


class ServiceUnavailableError(AttuneError):
    """Raised when Redis or the broker cannot be reached; ``url`` has no password in it.

    ``job_ids`` lists the jobs of a batch that were accepted before; ``Client.wake`` sends the wake-ups
    that may be missing.
    """

    exit_code = 3
    retryable = True
    type = "service_unavailable"

    def __init__(self, message: str, *, url: str = "", job_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.url = url
        self.job_ids = tuple(job_ids)

    def with_jobs(self, job_ids: Sequence[str]) -> ServiceUnavailableError:
        """Return this error with the jobs that had been accepted when it happened."""
        return ServiceUnavailableError(self.message, url=self.url, job_ids=job_ids)


class ExecutionError(AttuneError):
    """Base of the ways a job can end without an answer; ``attempts`` tells what was tried before."""

    type = "execution"

    def __init__(self, message: str, *, attempts: Sequence[Attempt] = (), retry_after: float | None = None) -> None:
        super().__init__(message)
        self.attempts = tuple(attempts)
        self.retry_after = retry_after


class NoCandidateError(ExecutionError):
    """Raised when no configured model may serve the job; the message says why each was dropped."""

    type = "no_candidate"


class DeadlineExceededError(ExecutionError):
    """Raised when the job's deadline passed before an answer came."""

    type = "deadline_exceeded"


class NotNowError(ExecutionError):
    """Raised when every model that may serve the job has to be left alone for a while: ``retry_after`` seconds."""

    retryable = True
    type = "not_now"


class BudgetExceededError(ExecutionError):
    """Raised when a hard budget has no room for the call; ``retry_after`` is in seconds, when its window ends."""

    type = "budget_exceeded"


class StoppedError(ExecutionError):
    """Raised when a job is broken off from outside while it runs; a call under way may have cost money."""

    type = "stopped"


class ProviderError(ExecutionError):
    """Base of everything a single provider call can end with, other than an answer.

    ``status`` is the HTTP status (None when there was none), ``code`` the provider's own error
    code, ``request_id`` the provider's id for support, ``retry_after`` seconds the provider asked
    us to wait. ``may_have_cost``: the provider may charge for the call although no answer came.
    """

    type = "provider_error"
    may_have_cost: bool = False

    def __init__(
        self,
        message: str,
        *,
        provider: str = "",
        model_id: str = "",
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.provider = provider
        self.model_id = model_id
        self.status = status
        self.code = code
        self.request_id = request_id


class RateLimitedError(ProviderError):
    """Raised on 429: this key or model has used up its quota for now."""

    retryable = True
    type = "rate_limited"


class CredentialError(ProviderError):
    """Raised on 401, 402, 403 or a reached spend limit: another key or provider is needed."""

    type = "credential"


class OverloadedError(ProviderError):
    """Raised on 500, 502, 503, 504 and 529: the provider cannot answer at the moment."""

    retryable = True
    counts_against_breaker = True
    type = "overloaded"


class ProviderTimeoutError(ProviderError):
    """Raised when the provider did not answer within the time the call had."""

    retryable = True
    counts_against_breaker = True
    may_have_cost = True
    type = "timeout"


class ProviderConnectionError(ProviderError):
    """Raised when no connection could be made, or it broke before the answer was complete."""

    retryable = True
    counts_against_breaker = True
    may_have_cost = True
    type = "connection"


class MalformedAnswerError(ProviderError):
    """Raised when a 2xx answer cannot be read as the wire format it should be."""

    retryable = True
    counts_against_breaker = True
    may_have_cost = True
    type = "malformed_answer"


class BadRequestError(ProviderError):
    """Raised on 400, 404, 413, 422: sending the same request again cannot help."""

    type = "bad_request"


class ContextTooLongError(ProviderError):
    """Raised when the provider says that the prompt does not fit; a larger window may."""

    type = "context_too_long"
