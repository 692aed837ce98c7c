"""What would the same tokens have cost, all of them at one premium model?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from attune_worker.jobs import AuthMode, ModelTier
from attune_worker.ledger import CostRow
from attune_worker.models.pricing import get_pricing, plain_cost
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.settings import Settings

BY = ("day", "provider", "model", "mode")
"""What the rows are to be grouped by: prices change with the day."""


@dataclass(frozen=True, slots=True)
class Savings:
    """What calls paid by the token cost, held against the price of ``model_id``; amounts in USD.

    ``left_out_calls`` have no known price on one side or the other, and are in no amount. The calls that went by a
    subscription stand beside, in no other number: by the token they would have cost ``subscription_api_usd`` (without
    ``subscription_unpriced_calls``).
    """

    provider: str
    model_id: str
    calls: int
    cost_usd: Decimal
    premium_usd: Decimal
    saved_usd: Decimal
    saved_percent: float | None
    left_out_calls: int
    subscription_calls: int
    subscription_api_usd: Decimal
    subscription_unpriced_calls: int


def premium_model(settings: Settings, registry: Registry) -> ModelInfo | None:
    """Return the preferred premium model that has a price; of providers with a key, where any has one here."""
    priced = [model for model in registry.of_tier(ModelTier.PREMIUM) if get_pricing(model) is not None]
    usable = [model for model in priced if settings.providers[model.provider].usable()]
    return next(iter(usable or priced), None)


def savings(rows: Iterable[CostRow], premium: ModelInfo, registry: Registry) -> Savings:
    """Return what was saved over rows grouped by ``BY``.

    The tokens are those that each model's own tokenizer counted, at the price of their day; caches are not assumed.
    """
    calls = left_out = by_subscription = unpriced = 0
    spent = dear = by_token = Decimal(0)
    for row in rows:
        if row.keys["mode"] == AuthMode.SUBSCRIPTION:
            by_subscription += row.calls
            own = registry.find(f"{row.keys['provider']}/{row.keys['model']}")
            price = _price(own[0], row) if own else None
            by_token += price or 0
            unpriced += row.calls if price is None else 0
            continue
        price = _price(premium, row)
        if price is None or _unpriced(row):
            left_out += row.calls
            continue
        calls, spent, dear = calls + row.calls, spent + row.cost_usd, dear + price
    return Savings(
        provider=premium.provider,
        model_id=premium.id,
        calls=calls,
        cost_usd=spent,
        premium_usd=dear,
        saved_usd=dear - spent,
        saved_percent=round(float(100 * (dear - spent) / dear), 1) if dear else None,
        left_out_calls=left_out,
        subscription_calls=by_subscription,
        subscription_api_usd=by_token,
        subscription_unpriced_calls=unpriced,
    )


def _price(model: ModelInfo, row: CostRow) -> Decimal | None:
    day = datetime.fromisoformat(row.keys["day"] or "").replace(hour=12, tzinfo=UTC)
    return plain_cost(model, row.input_tokens, row.output_tokens, day, row.calls)


def _unpriced(row: CostRow) -> bool:
    """Whether there were answers, and nothing is known of what they cost."""
    return row.unknown_calls > 0 and not row.cost_usd and row.input_tokens + row.output_tokens > 0
