"""After a failed call: try again, try another model, or give up?

Pure: the decision is a value, and the executor acts on it. There is one budget of attempts per job,
over all models; no other layer repeats a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from attune_worker.models.credentials import DEFAULT, Credential, Ways
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.sections import DEFAULT_CREDENTIAL, RetrySettings


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed: on which model, how, and when (seconds of some clock that only goes forward).

    ``interrupted``: it was its worker that ended, which says nothing of the model and counts as no try of it.
    ``answered``: it ended after the answer, which is paid for, so that it is one of the job's calls. ``credential`` is
    the name of the one by which it was made.
    """

    model: ModelInfo
    error: ProviderError
    at_seconds: float = 0.0
    interrupted: bool = False
    answered: bool = False
    credential: str = DEFAULT_CREDENTIAL


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
    ways: Ways | None = None,
) -> NextCall | None:
    """Return the next call to make, or None to give up.

    ``candidates`` come in order of preference, ``failures`` in order of time; ``random`` returns a
    number from 0 to 1. A model is not called before the time that its provider asked for has passed,
    and a wait that would outlast ``remaining_seconds`` is never begun. How often a job's worker may end in the middle
    of it is not decided here.

    A credential that its provider does not accept is out for all its models, and a model is once it has no other: a
    call by it counts as no try. A credential that is rate limited is so by itself. Without ``ways`` there is only the
    default one.
    """
    calls_left = settings.max_attempts - sum(failure.answered for failure in failures)
    failures = [failure for failure in failures if not failure.interrupted]
    if calls_left <= 0:
        return None
    if not failures:
        return NextCall(candidates[0], instead=tuple(candidates[1:])) if candidates else None
    last = (_tries(failures) or failures)[-1]  # a key that is refused says nothing of the call before
    if len(_tries(failures)) >= calls_left or isinstance(last.error, BadRequestError):
        return None
    left = [model for model in candidates if _may_serve(model, failures, settings, ways)]
    waits = {model: _wait(model, failures, settings, random, now_seconds, ways) for model in left}
    in_time = [model for model in left if waits[model] < remaining_seconds]
    if not in_time:
        return None
    another = waits.get(last.model) == 0 and len(_usable(last.model, failures, ways)) > 1
    if last.model in in_time and (another or not isinstance(last.error, RateLimitedError)):
        chosen = last.model
    else:
        chosen = min(in_time, key=lambda model: (waits[model], len(_tries(failures, model))))
    others = (model for model in in_time if model != chosen and waits[model] <= waits[chosen])
    return NextCall(chosen, waits[chosen], tuple(others))


def seen_before(attempt: Attempt, registry: Registry) -> Failure:
    """Return the failure that an attempt of an earlier start was; what had to be waited for it has been waited."""
    answered = attempt.outcome == "succeeded"
    interrupted = answered or attempt.outcome == "orphaned" or attempt.error_type == StoppedError.type
    kind = _ERRORS.get(attempt.error_type or "", ProviderError)
    how = {
        "succeeded": "answered in an earlier start, whose worker was lost before it could write that down",
        "orphaned": "failed in an earlier start (its worker was lost)",
    }.get(attempt.outcome, f"failed in an earlier start ({attempt.error_type})")
    error = kind(
        f"{attempt.provider}/{attempt.model_id}: {how}",
        provider=attempt.provider,
        model_id=attempt.model_id,
        status=attempt.status,
    )
    known = registry.find(f"{attempt.provider}/{attempt.model_id}")
    model = known[0] if known else ModelInfo(attempt.model_id, attempt.provider, attempt.tier)
    credential = attempt.credential or DEFAULT_CREDENTIAL
    return Failure(model, error, -math.inf, interrupted, answered, credential)


def in_turn(
    models: Sequence[ModelInfo], ways: Ways, failures: Sequence[Failure]
) -> Iterator[tuple[ModelInfo, Credential]]:
    """Yield the ways to call the models, in order: of each model, credentials that were rate limited come last."""
    for model in models:
        if not failures:
            yield from ((model, one) for one in ways.of(model))
            continue
        limited = {
            failure.credential
            for failure in failures
            if failure.model == model and isinstance(failure.error, RateLimitedError)
        }
        usable = _usable(model, failures, ways)
        usable.sort(key=lambda one: one.name in limited)
        yield from ((model, one) for one in usable)


def _usable(model: ModelInfo, failures: Sequence[Failure], ways: Ways | None) -> list[Credential]:
    """Return the credentials by which a model may be called and that were not refused."""
    refused = {
        failure.credential
        for failure in failures
        if isinstance(failure.error, CredentialError) and failure.model.provider == model.provider
    }
    found = (DEFAULT,) if ways is None else ways.of(model)
    return [one for one in found if one.name not in refused]


_ERRORS: dict[str, type[ProviderError]] = {kind.type: kind for kind in ProviderError.__subclasses__()}


def _may_serve(model: ModelInfo, failures: Sequence[Failure], settings: RetrySettings, ways: Ways | None) -> bool:
    """Whether nothing that happened so far rules this model out."""
    if not _usable(model, failures, ways):
        return False
    for failure in failures:
        if isinstance(failure.error, ContextTooLongError) and not _larger_window(model, failure.model):
            return False
    tries = _tries(failures, model)
    return len(tries) < settings.max_attempts_per_model and all(failure.error.retryable for failure in tries)


def _larger_window(model: ModelInfo, than: ModelInfo) -> bool:
    return (model.context_window or 0) > (than.context_window or 0)


def _tries(failures: Sequence[Failure], model: ModelInfo | None = None) -> list[Failure]:
    """Return the failures that say something of the call, not only of the credential: all, or those of one model."""
    tries = [failure for failure in failures if not isinstance(failure.error, CredentialError)]
    return tries if model is None else [failure for failure in tries if failure.model == model]


def _wait(
    model: ModelInfo,
    failures: Sequence[Failure],
    settings: RetrySettings,
    random: Callable[[], float],
    now_seconds: float,
    ways: Ways | None,
) -> float:
    """Return the seconds until a model may be called: none if it has not failed yet, but for a refused credential.

    Otherwise what its provider asked for, else exponential backoff, counted from its last failure; a limit of one
    credential's rate holds up none of the others.
    Half of the backoff is fixed and half random ("equal jitter"), so that workers that failed
    together do not come back together.
    """
    waits = []
    for one in _usable(model, failures, ways):
        last = next((failure for failure in reversed(failures) if _holds_up(model, one.name, failure)), None)
        if last is None:
            return 0.0
        pause = last.error.retry_after
        if pause is None:
            doubled = settings.backoff_seconds * 2.0 ** (len(_tries(failures, model)) - 1)
            pause = min(settings.backoff_cap_seconds, doubled) * (0.5 + random() / 2)
        waits.append(max(0.0, last.at_seconds + pause - now_seconds))
    return min(waits)


def _holds_up(model: ModelInfo, credential: str, failure: Failure) -> bool:
    if failure.model != model or isinstance(failure.error, CredentialError):
        return False
    return failure.credential == credential or not isinstance(failure.error, RateLimitedError)
