"""Which fields of an auth strategy did somebody set, with options or asked at the terminal?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from attune_worker.errors import ConfigurationError
from attune_worker.jobs import AuthMode
from attune_worker.models.auth import AuthStrategy, SubscriptionTier

PLANS = [plan.value for plan in SubscriptionTier]
MODES = [mode.value for mode in AuthMode]

LEARNED = "learned"
ASSUMED = "assumed"


def fields_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a strategy's fields for the options that were given."""
    names = {
        "tier": "subscription_tier",
        "mode": "default_mode",
        "small": "small_module_threshold",
        "medium": "medium_module_threshold",
    }
    fields = {names.get(name, name): value for name, value in given.items()}
    for name, word, number in (("tokens_per_line", LEARNED, float), ("window_tokens", ASSUMED, int)):
        if isinstance(value := fields.get(name), str):
            try:
                fields[name] = None if value == word else number(value)
            except ValueError:
                raise ConfigurationError(f"{name}: {value!r} is neither a number nor {word!r}") from None
    return fields


def asked(strategy: AuthStrategy) -> dict[str, Any]:
    """Ask at the terminal for what decides, and return those fields."""
    plans, modes = click.Choice(PLANS), click.Choice(MODES)
    fields: dict[str, Any] = {
        "subscription_tier": click.prompt("Plan", type=plans, default=strategy.subscription_tier.value, err=True),
        "default_mode": click.prompt("Mode", type=modes, default=strategy.default_mode.value, err=True),
    }
    small, medium = strategy.small_module_threshold, strategy.medium_module_threshold
    fields["small_module_threshold"] = click.prompt(
        "Fewer lines than this go by the subscription", type=int, default=small, err=True
    )
    fields["medium_module_threshold"] = click.prompt(
        "As many lines as this and more go by the token",
        type=int,
        default=max(medium, fields["small_module_threshold"]),
        err=True,
    )
    fields["prefer_subscription"] = click.confirm(
        "Do those in between go by the subscription?", default=strategy.prefer_subscription, err=True
    )
    return fields
