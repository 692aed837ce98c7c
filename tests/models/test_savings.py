from __future__ import annotations

from decimal import Decimal

import pytest

from attune_worker.jobs import ModelTier
from attune_worker.ledger import CostRow
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.savings import premium_model, savings
from attune_worker.settings import Settings


def model(name: str, tier: ModelTier, price: int | None) -> ModelInfo:
    usd = None if price is None else Decimal(price)
    return ModelInfo(name, "mine", tier, input_cost_per_million=usd, output_cost_per_million=usd)


SMALL, LARGE = model("small", ModelTier.CHEAP, 1), model("large", ModelTier.PREMIUM, 10)
UNPRICED = model("unpriced", ModelTier.PREMIUM, None)
REGISTRY = Registry([SMALL, UNPRICED, LARGE])


def row(name: str, usd: str, mode: str = "api", unknown: int = 0, tokens: int = 1_000_000) -> CostRow:
    """Return the sums of ten calls."""
    keys = {"day": "2026-11-20", "provider": "mine", "model": name, "mode": mode}
    return CostRow(keys, 10, Decimal(usd), unknown, Decimal(0), 0, Decimal(0), 0, tokens // 2, tokens // 2)


@pytest.mark.parametrize(
    ("rows", "calls", "cost", "premium", "left_out", "subscription"),
    [
        ([], 0, "0", "0", 0, (0, "0", 0)),
        ([row("small", "1")], 10, "1", "10", 0, (0, "0", 0)),
        ([row("small", "1"), row("large", "10")], 20, "11", "20", 0, (0, "0", 0)),
        ([row("gone", "3")], 10, "3", "10", 0, (0, "0", 0)),
        ([row("free", "0")], 10, "0", "10", 0, (0, "0", 0)),
        ([row("unpriced", "0", unknown=10)], 0, "0", "0", 10, (0, "0", 0)),
        ([row("small", "0", unknown=10, tokens=0)], 10, "0", "0", 0, (0, "0", 0)),
        ([row("small", "0", "subscription"), row("small", "1")], 10, "1", "10", 0, (10, "1", 0)),
        ([row("unpriced", "0", "subscription"), row("gone", "0", "subscription")], 0, "0", "0", 0, (20, "0", 20)),
    ],
)
def test_the_same_tokens_at_the_premium_price(
    rows: list[CostRow],
    calls: int,
    cost: str,
    premium: str,
    left_out: int,
    subscription: tuple[int, str, int],
) -> None:
    """What has no price is in no amount, and is counted; subscription calls stand beside."""
    found = savings(rows, LARGE, REGISTRY)
    assert (found.calls, found.cost_usd, found.premium_usd) == (calls, Decimal(cost), Decimal(premium))
    assert (found.saved_usd, found.left_out_calls) == (Decimal(premium) - Decimal(cost), left_out)
    counted = (found.subscription_calls, found.subscription_api_usd, found.subscription_unpriced_calls)
    assert counted == (subscription[0], Decimal(subscription[1]), subscription[2])


def test_the_price_tier_is_that_of_the_mean_prompt() -> None:
    """A day's tokens are not one long prompt."""
    settings = Settings.load(environ={"ATTUNE_PROVIDERS__ANTHROPIC__API_KEY": "x"})
    registry = Registry.from_settings(settings)
    premium = premium_model(settings, registry)
    assert premium is not None
    assert (premium.provider, premium.tier) == ("anthropic", ModelTier.PREMIUM)
    one = savings([row("small", "1", tokens=10_000)], premium, REGISTRY).premium_usd
    assert savings([row("small", "1", tokens=1_000_000)], premium, REGISTRY).premium_usd == 100 * one


def test_the_premium_model_is_one_that_can_be_called() -> None:
    """Of the providers with a key, the preferred one; without any key, the preferred one of all."""
    with_google = Settings.load(environ={"ATTUNE_PROVIDERS__GOOGLE__API_KEY": "x"})
    assert premium_model(with_google, Registry.from_settings(with_google)).provider == "google"  # type: ignore[union-attr]
    without = Settings.load(environ={})
    assert premium_model(without, Registry.from_settings(without)).provider == "anthropic"  # type: ignore[union-attr]
