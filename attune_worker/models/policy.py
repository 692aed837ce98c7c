"""After a failed call: try again, try another model, or give up?

Pure: the decision is a value, and the executor acts on it. There is one budget of attempts per job,
over all models; no other layer repeats a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attune_worker.errors import BadRequestError, ContextTooLongError, CredentialError, ProviderError, RateLimitedError
from attune_worker.models.registry import ModelInfo
from attune_worker.settings import RetrySettings


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed, and on which model."""

    model: ModelInfo
    error: ProviderError


@dataclass(frozen=True, slots=True)
class NextCall:
    """Call ``model``, after waiting ``wait_seconds``."""

    model: ModelInfo
    wait_seconds: float = 0.0


def next_call(
    candidates: Sequence[ModelInfo],
    failures: Sequence[Failure],
    settings: RetrySettings,
    remaining_seconds: float,
    random: Callable[[], float],
) -> NextCall | None:
    """Return the next call to make, or None to give up.

    ``candidates`` come in order of preference, ``failures`` in order of time; ``random`` returns a
    number from 0 to 1. A wait that would outlast ``remaining_seconds`` is never begun.
    """
    if not failures:
        return NextCall(candidates[0])
    last = failures[-1]
    if len(failures) >= settings.max_attempts or isinstance(last.error, BadRequestError):
        return None
    left = [model for model in candidates if _may_serve(model, failures, settings)]
    others = [model for model in left if model != last.model]
    if last.model in left and not (others and isinstance(last.error, RateLimitedError)):
        wait_seconds = _wait(last, failures, settings, random)
        if wait_seconds < remaining_seconds:
            return NextCall(last.model, wait_seconds)
    return NextCall(_least_tried(others, failures)) if others else None


def _may_serve(model: ModelInfo, failures: Sequence[Failure], settings: RetrySettings) -> bool:
    """Whether nothing that happened so far rules this model out."""
    tried = 0
    for failure in failures:
        same = failure.model == model
        tried += same
        if isinstance(failure.error, CredentialError) and failure.model.provider == model.provider:
            return False
        if isinstance(failure.error, ContextTooLongError) and not _larger_window(model, failure.model):
            return False
        if same and not failure.error.retryable:
            return False
    return tried < settings.max_attempts_per_model


def _larger_window(model: ModelInfo, than: ModelInfo) -> bool:
    return (model.context_window or 0) > (than.context_window or 0)


def _least_tried(models: Sequence[ModelInfo], failures: Sequence[Failure]) -> ModelInfo:
    return min(models, key=lambda model: sum(failure.model == model for failure in failures))


def _wait(last: Failure, failures: Sequence[Failure], settings: RetrySettings, random: Callable[[], float]) -> float:
    """Return the seconds to wait: what the provider asked for, else exponential backoff.

    Half of the backoff is fixed and half random ("equal jitter"), so that workers that failed
    together do not come back together.
    """
    if last.error.retry_after is not None:
        return last.error.retry_after
    tried = sum(failure.model == last.model for failure in failures)
    backoff_seconds: float = min(settings.backoff_cap_seconds, settings.backoff_seconds * 2.0 ** (tried - 1))
    return backoff_seconds * (0.5 + random() / 2)
