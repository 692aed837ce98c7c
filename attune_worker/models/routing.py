"""Which models may serve a job, and in what order?

Pure: from the job, the registry and what is known of credentials to an ordered tuple of candidates.
The order is static: the tier of the task type, then the tiers above it, then those below; within a
tier the first choice of each provider, then their second choices, so that a fallback leaves a
provider in trouble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from attune_worker.errors import InvalidJobError, NoCandidateError
from attune_worker.jobs import Job, ModelTier
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.task_types import get_tier_for_task

BYTES_PER_TOKEN = 4
"""Rule of thumb for English text, see https://platform.openai.com/tokenizer; used to compare with windows."""

TOKENS_AROUND_A_MESSAGE = 16
"""What a chat format adds to a message at most; OpenAI's and Anthropic's formats add 3 to 8."""

FALLBACK = {
    ModelTier.CHEAP: (ModelTier.CHEAP, ModelTier.CAPABLE, ModelTier.PREMIUM),
    ModelTier.CAPABLE: (ModelTier.CAPABLE, ModelTier.PREMIUM, ModelTier.CHEAP),
    ModelTier.PREMIUM: (ModelTier.PREMIUM, ModelTier.CAPABLE, ModelTier.CHEAP),
}
"""Tiers in the order in which they may serve a job: upwards first, as a stronger model can do the work."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The models that may serve a job, best first, and why each other one may not."""

    models: tuple[ModelInfo, ...]
    dropped: tuple[tuple[ModelInfo, str], ...]


def estimate_tokens(text_bytes: int) -> int:
    """Return about how many tokens that many bytes of text are."""
    return -(-text_bytes // BYTES_PER_TOKEN)


def most_tokens(job: Job) -> int:
    """Return more tokens than the prompt can be: none is shorter than a byte, and each message adds a few."""
    return job.text_bytes + TOKENS_AROUND_A_MESSAGE * (len(job.turns) + 1)


def output_limit(job: Job, model: ModelInfo, default_max_tokens: int) -> int:
    """Return the ``max_tokens`` to send: the job's own, else the default as far as the model goes."""
    if job.max_tokens is not None:
        return job.max_tokens
    return min(default_max_tokens, model.max_output_tokens or default_max_tokens)


def candidates(
    job: Job, registry: Registry, default_max_tokens: int, obstacle: Callable[[ModelInfo], str | None] | None = None
) -> Candidates:
    """Return the models that may serve ``job``, in order.

    ``obstacle`` may name a further reason why a model cannot serve, such as a missing credential.
    Raises ``InvalidJobError`` for a model or provider that is not configured.
    """
    kept: list[ModelInfo] = []
    dropped: list[tuple[ModelInfo, str]] = []
    for model in _in_order(job, registry):
        reason = _misfit(job, model, default_max_tokens) or (obstacle(model) if obstacle else None)
        if reason is None:
            kept.append(model)
        else:
            dropped.append((model, reason))
    return Candidates(tuple(kept), tuple(dropped))


def must_serve(found: Candidates) -> tuple[ModelInfo, ...]:
    """Return the candidates' models, or raise ``NoCandidateError`` with the reason for each that was dropped."""
    if found.models:
        return found.models
    reasons = Counter(f"{model.provider}: {reason}" for model, reason in found.dropped)
    said = "; ".join(f"{reason} ({count} models)" if count > 1 else reason for reason, count in reasons.items())
    raise NoCandidateError(f"no model may serve this job: {said or 'none is configured'}")


def check(job: Job, registry: Registry, default_max_tokens: int) -> None:
    """Raise ``InvalidJobError`` for a job that no configured model could ever serve, whoever runs it."""
    models = _in_order(job, registry)
    if any(_misfit(job, model, default_max_tokens) is None for model in models):
        return
    reasons = dict.fromkeys(_misfit(job, model, default_max_tokens) for model in models)
    raise InvalidJobError(
        f"none of the {len(models)} models that could serve this job of about {estimate_tokens(job.text_bytes)} tokens "
        f"fits: {'; '.join(reason for reason in reasons if reason)}"
    )


def _in_order(job: Job, registry: Registry) -> Sequence[ModelInfo]:
    if job.provider_hint is not None and job.provider_hint not in registry.providers:
        raise InvalidJobError(
            f"'provider_hint': no models of {job.provider_hint!r}; allowed: {', '.join(registry.providers)}",
            field="provider_hint",
        )
    if job.model is not None:
        models = list(registry.find(job.model))
        if not models:
            raise _unknown_model(job.model, registry)
        return sorted(models, key=lambda model: model.provider != job.provider_hint)
    return _by_tier(registry, job.tier_hint or get_tier_for_task(job.task_type), job.provider_hint)


@lru_cache(maxsize=256)
def _by_tier(registry: Registry, tier: ModelTier, preferred: str | None) -> tuple[ModelInfo, ...]:
    return tuple(model for step in FALLBACK[tier] for model in _by_provider(registry.of_tier(step), preferred))


def _by_provider(models: tuple[ModelInfo, ...], preferred: str | None) -> list[ModelInfo]:
    seen: Counter[str] = Counter()
    ranked = []
    for position, model in enumerate(models):
        ranked.append((seen[model.provider], model.provider != preferred, position, model))
        seen[model.provider] += 1
    return [model for *_, model in sorted(ranked, key=lambda entry: entry[:3])]


def _misfit(job: Job, model: ModelInfo, default_max_tokens: int) -> str | None:
    """Say why a model cannot serve a job whatever its credentials, or None."""
    if job.temperature is not None and "temperature" not in model.capabilities:
        return "takes no temperature"
    if model.max_output_tokens is not None and (job.max_tokens or 0) > model.max_output_tokens:
        return f"writes at most {model.max_output_tokens} tokens, fewer than max_tokens"
    needed = estimate_tokens(job.text_bytes) + output_limit(job, model, default_max_tokens)
    if model.context_window is not None and needed > model.context_window:
        return f"the prompt does not fit its window of {model.context_window} tokens"
    return None


def _unknown_model(name: str, registry: Registry) -> InvalidJobError:
    known = sorted({model.id for model in registry.all()})
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"configured: {', '.join(known)}"
    return InvalidJobError(f"'model': no model {name!r} is configured; {hint}", field="model")
