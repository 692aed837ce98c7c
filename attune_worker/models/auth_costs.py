"""What does a call cost in each mode, and what speaks for and against the mode? Pure: from numbers that are given."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from attune_worker.errors import ConfigurationError
from attune_worker.jobs import AuthMode, ModelTier, Usage
from attune_worker.models.pricing import cost
from attune_worker.models.registry import ModelInfo, Registry

INPUT_TOKENS_PER_OUTPUT_TOKEN = 4
"""A guess: reviews, explanations and fixes of a module are shorter than the module. Rewriting it whole is not; say so
with ``output_tokens``."""

_SHARE = Decimal("0.000001")


def model_for(registry: Registry, ref: str | None, tier: ModelTier | str | None) -> ModelInfo:
    """Return the model named ``ref``, else the preferred one of a tier (default: capable).

    Raises ``ConfigurationError``, saying what is known, where there is none.
    """
    if ref is not None:
        if found := registry.find(ref):
            return found[0]
        names = sorted({model.id for model in registry.all()})
        close = get_close_matches(ref, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"configured: {', '.join(names)}"
        raise ConfigurationError(f"model: no model {ref!r} is configured; {hint}")
    try:
        wanted = ModelTier.CAPABLE if tier is None else ModelTier(tier)
    except ValueError:
        raise ConfigurationError(f"tier: {tier!r} is not allowed; allowed: {', '.join(ModelTier)}") from None
    models = registry.of_tier(wanted)
    if not models:
        raise ConfigurationError(f"no model of tier {wanted.value!r} is configured; add one under [[models]]")
    return models[0]


def estimate(
    mode: AuthMode,
    model: ModelInfo,
    *,
    input_tokens: int,
    output_tokens: int | None,
    default_max_tokens: int,
    window_tokens: int | None,
) -> dict[str, Any]:
    """Return what a call takes; ``AuthStrategy.estimate_cost`` says what the keys are."""
    if output_tokens is None:
        longest = min(default_max_tokens, model.max_output_tokens or default_max_tokens)
        output_tokens = min(-(-input_tokens // INPUT_TOKENS_PER_OUTPUT_TOKEN), longest)
    tokens = input_tokens + output_tokens
    by_quota = mode is AuthMode.SUBSCRIPTION
    return {
        "mode": mode,
        "model": model.ref,
        "monetary_cost": Decimal(0)
        if by_quota
        else cost(model, Usage(input_tokens=input_tokens, output_tokens=output_tokens)),
        "quota_cost": _share(tokens, window_tokens) if by_quota else Decimal(0),
        "tokens_used": tokens,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "fits_in_context": None if model.context_window is None else tokens <= model.context_window,
        "context_window": model.context_window,
        "window_tokens": window_tokens if by_quota else None,
    }


def pros_and_cons(subscription: Mapping[str, Any], api: Mapping[str, Any], *, has_plan: bool) -> dict[str, Any]:
    """Return both modes with what speaks for and against each, in the numbers of their estimates."""
    price, share = api["monetary_cost"], subscription["quota_cost"]
    saved = "what the call costs by API is not known" if price is None else f"saves the ${price:f} of the call by API"
    takes = "uses up quota; how much of it is not known"
    if share is not None:
        window = f"five hours' quota, taken for {subscription['window_tokens']:,} tokens"
        takes = f"uses {share:.1%} of {window}"
    ours = [takes, "when the quota is used up, calls wait for its reset"]
    if share is not None and share > 1:
        ours.insert(1, "is more than one window has")
    if not has_plan:
        ours.insert(0, "the plan has no subscription")
    charged = "costs money; how much is not known" if price is None else f"costs ${price:f}"
    theirs = ["uses no quota", "has no window to wait for"]
    return {
        "subscription": _option("Subscription", subscription, ["costs no money beyond the plan", saved], ours),
        "api": _option("API", api, theirs, [charged, "each further call costs as much again"]),
    }


def _option(name: str, cost_of: Mapping[str, Any], pros: list[str], cons: list[str]) -> dict[str, Any]:
    window = cost_of["context_window"]
    if cost_of["fits_in_context"] is False:
        cons = [*cons, f"{cost_of['tokens_used']:,} tokens do not fit the window of {cost_of['model']}, {window:,}"]
    return {"name": name, "cost": dict(cost_of), "pros": pros, "cons": cons}


def _share(tokens: int, window_tokens: int | None) -> Decimal | None:
    return None if window_tokens is None else (Decimal(tokens) / window_tokens).quantize(_SHARE)
