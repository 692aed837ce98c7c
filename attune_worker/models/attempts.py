"""What is kept of one call to a provider: how it went, what it cost, and an error that gives nothing away?"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from attune_worker.budget import usd_of
from attune_worker.errors import ProviderError, StoppedError
from attune_worker.jobs import Attempt, AuthMode, Decision, Job
from attune_worker.models.credentials import Credential
from attune_worker.models.intent import Fields
from attune_worker.models.pricing import cost
from attune_worker.models.registry import ModelInfo
from attune_worker.providers.base import Answer, Endpoint
from attune_worker.sections import DEFAULT_CREDENTIAL

REPEATED_CHARACTERS = 16
"""A provider's error message that shares this much with the prompt is taken to quote it."""

TELLING_CHARACTERS = 5
"""A prompt shorter than this gives nothing away."""


def attempt_of(
    model: ModelInfo,
    credential: Credential,
    outcome: Answer | ProviderError | StoppedError,
    latency_ms: int,
    call_id: str | None = None,
    decision: Decision | None = None,
) -> Attempt:
    """Return the record of a call that ended so, after ``latency_ms``."""
    error = None if isinstance(outcome, Answer) else outcome
    return Attempt(
        model_id=model.id,
        provider=model.provider,
        tier=model.tier,
        outcome="failed" if error else "succeeded",
        error_type=error.type if error else None,
        latency_ms=latency_ms,
        cost_usd=Decimal(0) if credential.subscription else _cost(model, outcome),
        status=outcome.status if isinstance(outcome, ProviderError) else None,
        request_id=None if isinstance(outcome, StoppedError) else outcome.request_id,
        call_id=call_id,
        auth_mode=credential.mode,
        credential=credential.name,
        decision=decision,
    )


def _cost(model: ModelInfo, outcome: Answer | ProviderError | StoppedError) -> Decimal | None:
    """Return what a call cost that was paid for by the token; None: nobody knows."""
    if isinstance(outcome, Answer):
        return cost(model, outcome.usage) if outcome.usage is not None else None
    charged = isinstance(outcome, StoppedError) or outcome.may_have_cost
    return None if charged else Decimal(0)


def attempt_in(call_id: str, call: Fields) -> Attempt | None:
    """Return the record of a call that another process made; None: it was not made, or nothing is known of it.

    A call of which nobody has said how it went is orphaned here, whether it was settled as that or not.
    """
    known = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in call.items() if value}
    said = known.get("state") == "settled"
    if said and known.get("outcome") == "released":
        return None
    try:
        return Attempt.model_validate(
            {
                "model_id": known.get("model"),
                "provider": known.get("provider"),
                "tier": known.get("tier"),
                "outcome": known.get("outcome") if said else "orphaned",
                "error_type": known.get("error"),
                "latency_ms": int(known.get("latency_ms", 0)),
                "cost_usd": usd_of(int(known["cost_nano"])) if "cost_nano" in known else None,
                "status": int(known["status"]) if "status" in known else None,
                "request_id": known.get("request_id"),
                "call_id": call_id,
                "auth_mode": known.get("mode", AuthMode.API),
                "credential": known.get("credential", DEFAULT_CREDENTIAL),
            }
        )
    except ValueError:  # gone, or not ours
        return None


def located(error: ProviderError, job: Job, endpoint: Endpoint, model: ModelInfo) -> ProviderError:
    """Have the error say where it happened, without the provider's words when they repeat our key or the job's text."""
    error.provider, error.model_id = model.provider, model.id
    message = error.message.replace(endpoint.api_key, "***") if endpoint.api_key else error.message
    ours, colon, words = message.partition(": ")
    if colon and _repeats(words, [*(turn.content for turn in job.turns), job.system or ""]):
        message = f"{ours}: (the provider's words repeat the job's text)"
    error.message = f"{model.ref}: {message}"
    error.args = (error.message,)
    return error


def _repeats(words: str, texts: Iterable[str]) -> bool:
    """Whether ``words`` hold a stretch of a text, or all of a short one."""
    for text in texts:
        length = min(len(text), REPEATED_CHARACTERS)
        if length >= TELLING_CHARACTERS and any(
            words[at : at + length] in text for at in range(len(words) - length + 1)
        ):
            return True
    return False
