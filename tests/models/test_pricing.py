"""A call costs exactly what the price list says, and an unknown price is never zero."""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

import pytest
from genai_prices import Usage as LibraryUsage
from genai_prices import calc_price
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from attune_worker.jobs import NANO_USD, ModelTier, Usage
from attune_worker.models.pricing import cost, get_pricing, worst_case_cost
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.settings import Settings

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
CATALOG = Registry.from_settings(Settings()).all()
PUBLISHED = [
    ModelInfo(model.id, provider.id, ModelTier.CHEAP)
    for provider in get_snapshot().providers
    for model in provider.models
    if provider.find_model(model.id) is model
]

UNUSUAL = [
    model
    for model in PUBLISHED
    if (price := get_pricing(model, NOW))
    and (
        price.valid_from
        or price.valid_until
        or price.request_cost_usd
        or price.tiers[0].reasoning != price.tiers[0].output
    )
]


def anthropic(model_id: str) -> ModelInfo:
    return ModelInfo(model_id, "anthropic", ModelTier.CHEAP)


def configured(provider: Mapping[str, Any], model_id: str, name: str = "mine", **fields: Any) -> ModelInfo:
    model = {"id": model_id, "provider": name, "tier": "cheap", **fields}
    section = {"kind": "openai", **provider}
    own = Settings.model_validate({"models": [model], "providers": {name: section}})
    return Registry.from_settings(own).find(f"{name}/{model_id}")[0]


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    parts = [draw(st.integers(0, 400_000)) for _ in range(4)]
    plain, read, write, hour = parts
    output = draw(st.integers(0, 128_000))
    return Usage(
        input_tokens=plain + read + write + hour,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=write + hour,
        cache_write_1h_tokens=hour,
        reasoning_tokens=draw(st.integers(0, output)),
    )


FIRST, LAST = datetime(2025, 1, 1), datetime(2028, 1, 1)  # noqa: DTZ001  # hypothesis adds the time zone
INSTANTS = st.datetimes(FIRST, LAST, timezones=st.just(UTC))


def by_the_library(model: ModelInfo, usage: Usage, at: datetime) -> Decimal:
    counted = LibraryUsage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        output_reasoning_tokens=usage.reasoning_tokens,
    )
    price = calc_price(counted, model.id, provider_id=model.provider, genai_request_timestamp=at)
    return price.total_price.quantize(NANO_USD)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CATALOG), usages(), INSTANTS)
def test_catalog_models_cost_what_the_price_library_says(model: ModelInfo, usage: Usage, at: datetime) -> None:
    """Our integers give the library's answer for any usage, prompt length and date."""
    assert cost(model, usage, at) == by_the_library(model, usage, at)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PUBLISHED) | st.sampled_from(UNUSUAL), usages(), INSTANTS)
def test_all_published_models_cost_what_the_price_library_says(model: ModelInfo, usage: Usage, at: datetime) -> None:
    """Also off-peak prices, fees per request and dear reasoning tokens, which no catalog model has."""
    ours = cost(model, usage, at)
    assert ours is None or ours == by_the_library(model, usage, at)


def test_published_price_that_cannot_be_read_is_one_without_text_prices() -> None:
    """Leaving a price out as unreadable is the exception, not a way round the comparison above."""
    unread = [model for model in PUBLISHED if get_pricing(model, NOW) is None]
    by_id = {provider.id: provider for provider in get_snapshot().providers}
    for model in unread:
        published = by_id[model.provider].find_model(model.id)
        assert published is not None
        prices = published.get_prices(NOW)
        assert prices.input_mtok is None or prices.output_mtok is None, model.ref


def test_model_listed_without_a_price_is_unknown_and_not_free() -> None:
    """The price library lists some models with no price at all, for which it computes zero."""
    assert cost(ModelInfo("gemma-3", "google", ModelTier.CHEAP), Usage(input_tokens=1_000), NOW) is None


def test_every_catalog_model_has_a_price() -> None:
    """A default model whose cost is unknown could not be budgeted for."""
    assert [model.ref for model in CATALOG if get_pricing(model, NOW) is None] == []


def test_cached_tokens_are_charged_at_their_own_rates() -> None:
    """Claude Haiku 4.5: 1 input, 0.10 read, 1.25 written, 2 written for an hour, 5 output, in USD per million."""
    usage = Usage(
        input_tokens=1_000,
        cache_read_tokens=600,
        cache_write_tokens=300,
        cache_write_1h_tokens=100,
        output_tokens=10,
    )
    by_hand = Decimal(100 * 1 + 10 * 5 + 100 * 2) + 600 * Decimal("0.10") + 200 * Decimal("1.25")
    assert cost(anthropic("claude-haiku-4-5"), usage, NOW) == by_hand / 1_000_000


@pytest.mark.parametrize(("tokens", "per_million"), [(100_000, "0.10"), (100_001, "0.50")])
def test_long_prompt_price_begins_one_token_past_the_threshold(tokens: int, per_million: str) -> None:
    """Beyond 100,000 prompt tokens Claude Haiku 5.5 charges every token at five times the price."""
    charged = cost(anthropic("claude-haiku-5-5"), Usage(input_tokens=tokens), NOW)
    assert charged == tokens * Decimal(per_million) / 1_000_000


def test_threshold_counts_cached_tokens_too() -> None:
    """Reading most of a long prompt from the cache does not make it a short prompt."""
    usage = Usage(input_tokens=150_000, cache_read_tokens=150_000)
    assert cost(anthropic("claude-haiku-5-5"), usage, NOW) == 150_000 * Decimal("0.05") / 1_000_000


def test_price_changes_on_its_date_and_old_calls_keep_the_old_price() -> None:
    """Gemini 4 Argon doubles at midnight UTC on 1 December 2026, whichever date is asked for first."""
    argon = ModelInfo("gemini-4-argon", "google", ModelTier.PREMIUM)
    change = datetime(2026, 12, 1, tzinfo=UTC)
    usage = Usage(input_tokens=1_000_000)
    before, after = change - timedelta(microseconds=1), change
    assert [cost(argon, usage, at) for at in (after, before, after, before)] == [4, 2, 4, 2]


def test_fee_per_request_is_charged_beside_the_tokens() -> None:
    """Perplexity's sonar takes 12 USD per thousand requests and 1 USD per million tokens either way."""
    sonar = ModelInfo("sonar", "perplexity", ModelTier.CHEAP)
    assert cost(sonar, Usage(input_tokens=1_000, output_tokens=1_000), NOW) == Decimal("0.014")
    assert worst_case_cost(sonar, 1_000, 1_000, NOW) == Decimal("0.014")


def test_zone_of_the_time_is_respected() -> None:
    """Half past one in Berlin on 1 December is still November in UTC; without a zone UTC is meant."""
    argon = ModelInfo("gemini-4-argon", "google", ModelTier.PREMIUM)
    berlin = datetime.fromisoformat("2026-12-01T00:30:00+01:00")
    assert cost(argon, Usage(input_tokens=1_000_000), berlin) == 2
    assert cost(argon, Usage(input_tokens=1_000_000), berlin.replace(tzinfo=None)) == 4


def test_reasoning_tokens_are_not_charged_twice() -> None:
    """They are part of the output tokens, as the providers count them."""
    plain, thinking = Usage(output_tokens=1_000), Usage(output_tokens=1_000, reasoning_tokens=900)
    haiku = anthropic("claude-haiku-4-5")
    assert cost(haiku, plain, NOW) == cost(haiku, thinking, NOW) == Decimal("0.005")


def test_more_cached_tokens_than_input_tokens_are_charged_and_do_not_fail() -> None:
    """A provider that counts cached tokens apart must neither get a call for free nor stop its settlement."""
    usage = Usage(input_tokens=10, cache_read_tokens=1_000_000)
    assert cost(anthropic("claude-haiku-4-5"), usage, NOW) == Decimal("0.1")


def test_unknown_price_is_none_and_said_once_per_model(caplog: pytest.LogCaptureFixture) -> None:
    """None keeps an unknown cost visible; the log says how to set the price, and does not repeat itself."""
    secret = configured({"base_url": "http://127.0.0.1:8000/v1"}, "house-model")
    with caplog.at_level(logging.WARNING):
        costs = [cost(secret, Usage(input_tokens=5), NOW), cost(secret, Usage(), NOW), worst_case_cost(secret, 1, 1)]
    assert costs == [None, None, None]
    assert [record.getMessage().startswith("no price is known for mine/house-model") for record in caplog.records] == [
        True
    ]


@pytest.mark.parametrize("name", ["local", "local-openai", "my-openai-proxy"])
def test_own_server_is_not_billed_at_the_makers_price(name: str) -> None:
    """gpt-oss on one's own machine costs nobody's list price, whatever the section is called."""
    assert (
        cost(configured({"base_url": "http://127.0.0.1:8000/v1"}, "gpt-oss-20b", name), Usage(input_tokens=9)) is None
    )


def test_address_of_a_known_provider_brings_its_prices() -> None:
    """A second section for the same provider, say with another key, needs no prices of its own."""
    model = configured({"kind": "anthropic", "base_url": "https://api.anthropic.com"}, "claude-haiku-4-5", "second-key")
    assert cost(model, Usage(input_tokens=1_000_000), NOW) == 1


def test_named_price_list_wins_over_the_address() -> None:
    """Behind a company's gateway the address says nothing; ``price_list`` does."""
    model = configured({"base_url": "https://gateway.example/v1", "price_list": "openai"}, "gpt-6-luna")
    assert cost(model, Usage(input_tokens=100_000), NOW) == Decimal("0.01")


def test_own_price_wins_and_covers_the_cache() -> None:
    """A negotiated price replaces the published one whole: what it leaves open costs as much as plain input."""
    own = ModelInfo(
        "claude-haiku-5-5",
        "anthropic",
        ModelTier.CHEAP,
        input_cost_per_million=Decimal("0.8"),
        output_cost_per_million=Decimal(2),
    )
    usage = Usage(
        input_tokens=200_000, cache_read_tokens=50_000, cache_write_tokens=20_000, cache_write_1h_tokens=5_000
    )
    assert cost(own, usage, NOW) == Decimal("0.16")


def test_own_cache_prices_are_used() -> None:
    """Each of the four prices that can be set has its effect."""
    own = ModelInfo(
        "m",
        "mine",
        ModelTier.CHEAP,
        input_cost_per_million=Decimal(10),
        output_cost_per_million=Decimal(20),
        cache_read_cost_per_million=Decimal(1),
        cache_write_cost_per_million=Decimal(15),
    )
    usage = Usage(input_tokens=300, cache_read_tokens=100, cache_write_tokens=100, output_tokens=100)
    assert cost(own, usage) == Decimal(100 * 10 + 100 * 1 + 100 * 15 + 100 * 20) / 1_000_000


def test_free_model_costs_nothing_and_is_known() -> None:
    """A price of 0 that somebody set is a price."""
    free = ModelInfo(
        "m",
        "free",
        ModelTier.CHEAP,
        input_cost_per_million=Decimal(0),
        output_cost_per_million=Decimal(0),
    )
    assert cost(free, Usage(input_tokens=10**6)) == 0


@pytest.mark.parametrize(("tokens", "nano_usd"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_half_nano_dollars_are_rounded_to_even(tokens: int, nano_usd: int) -> None:
    """At 0.0005 USD per million a token is half a nano-dollar, and rounding must not lean to one side."""
    half = ModelInfo(
        "m",
        "half",
        ModelTier.CHEAP,
        input_cost_per_million=Decimal("0.0005"),
        output_cost_per_million=Decimal(0),
    )
    assert cost(half, Usage(input_tokens=tokens)) == nano_usd * NANO_USD


def test_callers_decimal_context_does_not_change_a_cost() -> None:
    """An application that computes with few digits still gets exact costs."""
    own = ModelInfo(
        "m",
        "few-digits",
        ModelTier.CHEAP,
        input_cost_per_million=Decimal("1.23456"),
        output_cost_per_million=Decimal("5.4321"),
    )
    with localcontext(prec=3):
        charged = cost(own, Usage(input_tokens=123_456_789, output_tokens=1_000_001))
    assert charged == Decimal("157.846918860")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CATALOG), usages())
def test_no_call_costs_more_than_its_worst_case(model: ModelInfo, usage: Usage) -> None:
    """A call that was let through under a cost limit stays under it, with or without the provider's cache."""
    usage = usage.model_copy(update={"cache_write_1h_tokens": 0})
    worst, actual = worst_case_cost(model, usage.input_tokens, usage.output_tokens, NOW), cost(model, usage, NOW)
    assert worst is not None
    assert actual is not None
    assert worst >= actual


def test_worst_case_is_rounded_up() -> None:
    """A limit must hold to the last nano-dollar."""
    tiny = ModelInfo(
        "m",
        "tiny",
        ModelTier.CHEAP,
        input_cost_per_million=Decimal("0.0001"),
        output_cost_per_million=Decimal(0),
    )
    assert worst_case_cost(tiny, 1, 0) == NANO_USD


def test_pricing_says_its_source_and_tiers() -> None:
    """Who audits a bill sees which list a price is from, and from which prompt length another one applies."""
    price = get_pricing(anthropic("claude-haiku-5-5"), NOW)
    assert price is not None
    assert "genai-prices" in price.source
    assert "anthropic" in price.source
    assert [(tier.above_input_tokens, tier.input) for tier in price.tiers] == [
        (0, Decimal("0.1")),
        (100_000, Decimal("0.5")),
    ]


def test_pricing_says_how_long_it_holds() -> None:
    """Gemini 4 Argon's introductory price ends with November 2026."""
    price = get_pricing(ModelInfo("gemini-4-argon", "google", ModelTier.PREMIUM), NOW)
    assert price is not None
    assert price.valid_until == datetime(2026, 12, 1, tzinfo=UTC)
