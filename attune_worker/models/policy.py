"""After a failed call: try again, try another model, or give up?

Pure: the decision is a value, and the executor acts on it. There is one budget of attempts per job,
over all models; no other layer repeats a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attune_worker.errors import (
    BadRequestError,
    ContextTooLongError,
    CredentialError,
    ProviderError,
    RateLimitedError,
    StoppedError,
)
from attune_worker.jobs import Attempt
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.sections import RetrySettings


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed: on which model, how, and when (seconds of some clock that only goes forward).

    ``interrupted``: it was its worker that ended, which says nothing of the call and counts as no try.
    """

    model: ModelInfo
    error: ProviderError
    at_seconds: float = 0.0
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class NextCall:
    """Call ``model``, after waiting ``wait_seconds``; where the fleet leaves it alone then, one ``instead`` of it."""

    model: ModelInfo
    wait_seconds: float = 0.0
    instead: tuple[ModelInfo, ...] = ()


def next_call(
    candidates: Sequence[ModelInfo],
    failures: Sequence[Failure],
    settings: RetrySettings,
    remaining_seconds: float,
    random: Callable[[], float],
    now_seconds: float = 0.0,
) -> NextCall | None:
    """Return the next call to make, or None to give up.

    ``candidates`` come in order of preference, ``failures`` in order of time; ``random`` returns a
    number from 0 to 1. A model is not called before the time that its provider asked for has passed,
    and a wait that would outlast ``remaining_seconds`` is never begun. How often a job's worker may end in the middle
    of it is not decided here.
    """
    failures = [failure for failure in failures if not failure.interrupted]
    if not failures:
        return NextCall(candidates[0], instead=tuple(candidates[1:])) if candidates else None
    last = failures[-1]
    if len(failures) >= settings.max_attempts or isinstance(last.error, BadRequestError):
        return None
    left = [model for model in candidates if _may_serve(model, failures, settings)]
    waits = {model: _wait(model, failures, settings, random, now_seconds) for model in left}
    in_time = [model for model in left if waits[model] < remaining_seconds]
    if not in_time:
        return None
    if last.model in in_time and not isinstance(last.error, RateLimitedError):
        chosen = last.model
    else:
        chosen = min(in_time, key=lambda model: (waits[model], _tries(model, failures)))
    others = (model for model in in_time if model != chosen and waits[model] <= waits[chosen])
    return NextCall(chosen, waits[chosen], tuple(others))


def seen_before(attempt: Attempt, registry: Registry) -> Failure:
    """Return the failure that an attempt of an earlier start was; what had to be waited for it has been waited."""
    interrupted = attempt.outcome == "orphaned" or attempt.error_type == StoppedError.type
    kind = _ERRORS.get(attempt.error_type or "", ProviderError)
    how = "its worker was lost" if attempt.outcome == "orphaned" else attempt.error_type
    error = kind(
        f"{attempt.provider}/{attempt.model_id}: failed in an earlier start ({how})",
        provider=attempt.provider,
        model_id=attempt.model_id,
        status=attempt.status,
    )
    known = registry.find(f"{attempt.provider}/{attempt.model_id}")
    model = known[0] if known else ModelInfo(attempt.model_id, attempt.provider, attempt.tier)
    return Failure(model, error, at_seconds=-math.inf, interrupted=interrupted)


_ERRORS: dict[str, type[ProviderError]] = {kind.type: kind for kind in ProviderError.__subclasses__()}


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


def _tries(model: ModelInfo, failures: Sequence[Failure]) -> int:
    return sum(failure.model == model for failure in failures)


def _wait(
    model: ModelInfo,
    failures: Sequence[Failure],
    settings: RetrySettings,
    random: Callable[[], float],
    now_seconds: float,
) -> float:
    """Return the seconds until a model may be called: none if it has not failed yet.

    Otherwise what its provider asked for, else exponential backoff, counted from its last failure.
    Half of the backoff is fixed and half random ("equal jitter"), so that workers that failed
    together do not come back together.
    """
    last = next((failure for failure in reversed(failures) if failure.model == model), None)
    if last is None:
        return 0.0
    pause = last.error.retry_after
    if pause is None:
        doubled = settings.backoff_seconds * 2.0 ** (_tries(model, failures) - 1)
        pause = min(settings.backoff_cap_seconds, doubled) * (0.5 + random() / 2)
    return max(0.0, last.at_seconds + pause - now_seconds)
