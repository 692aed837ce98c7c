import logging
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker import (
    AuthMode,
    AuthStrategy,
    ConfigurationError,
    InvalidJobError,
    ModelTier,
    Settings,
    SubscriptionTier,
)
from attune_worker.jobs import Usage
from attune_worker.models import learned_lines
from attune_worker.models.auth import DEFAULT_TOKENS_PER_LINE
from attune_worker.models.pricing import cost, get_pricing
from attune_worker.models.registry import Registry
from attune_worker.models.routing import estimate_tokens

SUBSCRIPTION, API, AUTO = AuthMode.SUBSCRIPTION, AuthMode.API, AuthMode.AUTO

SIZES = (0, 499, 500, 1999, 2000, 100_000)

BY_SIZE = {
    True: (SUBSCRIPTION, SUBSCRIPTION, SUBSCRIPTION, SUBSCRIPTION, API, API),
    False: (SUBSCRIPTION, SUBSCRIPTION, API, API, API, API),
}
"""What the sizes above get with a subscription, by whether it is preferred."""

TABLE = [
    (plan, mode, preferred, lines, by_size)
    for plan in SubscriptionTier
    for mode in AuthMode
    for preferred in (True, False)
    for lines, by_size in zip(SIZES, BY_SIZE[preferred], strict=True)
]


@pytest.fixture
def strategy(settings):
    """The defaults, with the models and prices of this test's settings."""
    return AuthStrategy().bound(settings)


@pytest.fixture
def registry(settings):
    return Registry.from_settings(settings)


@pytest.mark.parametrize(("plan", "mode", "preferred", "lines", "by_size"), TABLE)
def test_mode_follows_from_wish_plan_and_size(plan, mode, preferred, lines, by_size):
    """An explicit mode wins; a plan without a subscription goes by API; then size and preference say."""
    strategy = AuthStrategy(subscription_tier=plan, default_mode=mode, prefer_subscription=preferred)
    if mode is not AUTO:
        expected = mode
    elif plan in {SubscriptionTier.FREE, SubscriptionTier.API_ONLY}:
        expected = API
    else:
        expected = by_size
    assert strategy.get_recommended_mode(lines) is expected


@given(
    st.sampled_from(SubscriptionTier),
    st.sampled_from(AuthMode),
    st.booleans(),
    st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)).map(sorted),
    st.integers(0, 20_000),
)
def test_no_strategy_ever_recommends_auto(plan, mode, preferred, thresholds, lines):
    """Whatever is set, somebody has to know which credential to take."""
    small, medium = thresholds
    strategy = AuthStrategy(
        subscription_tier=plan,
        default_mode=mode,
        prefer_subscription=preferred,
        small_module_threshold=small,
        medium_module_threshold=medium,
    )
    assert strategy.get_recommended_mode(lines) in {SUBSCRIPTION, API}


@pytest.mark.parametrize(
    ("fields", "lines", "constraint"),
    [
        ({"default_mode": "api"}, 10, "default_mode is api"),
        ({"subscription_tier": "free"}, 10, "the plan free has no subscription"),
        ({}, 499, "below small_module_threshold (500)"),
        ({}, 1999, "below medium_module_threshold (2000), and prefer_subscription is on"),
        ({"prefer_subscription": False}, 500, "not below small_module_threshold (500), and prefer_subscription is off"),
        ({}, 2000, "not below medium_module_threshold (2000)"),
    ],
)
def test_one_debug_line_names_the_constraint_that_decided(caplog, fields, lines, constraint):
    """Who wonders why a job was paid for finds it in the log."""
    with caplog.at_level(logging.DEBUG, "attune_worker"):
        AuthStrategy(**fields).get_recommended_mode(lines)
    assert [constraint in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("lines", [-1, 1.5, "12", None, True, 2**31])
def test_what_is_no_number_of_lines_is_refused(lines):
    """A typed error names the argument; nothing is guessed."""
    for ask in (AuthStrategy().get_recommended_mode, AuthStrategy().estimate_cost, AuthStrategy().get_pros_cons):
        with pytest.raises(InvalidJobError, match="'module_lines': ") as refused:
            ask(lines)
        assert refused.value.field == "module_lines"


IMPOSSIBLE = [
    ("small_module_threshold", 2001),
    ("small_module_threshold", -1),
    ("medium_module_threshold", 499),
    ("medium_module_threshold", 2000.5),
    ("medium_module_threshold", True),
    ("subscription_tier", "gold"),
    ("default_mode", "sometimes"),
    ("prefer_subscription", "yes"),
    ("tokens_per_line", 0),
    ("tokens_per_line", 0.0999),
    ("tokens_per_line", 10_000.1),
    ("tokens_per_line", float("nan")),
    ("tokens_per_line", float("inf")),
    ("window_tokens", -1),
]


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE)
def test_impossible_values_are_refused_when_set(field, value):
    """At construction and on assignment, naming a field; what was there before stays."""
    with pytest.raises(ConfigurationError, match=r"^\w+: "):
        AuthStrategy(**{field: value})
    strategy = AuthStrategy()
    with pytest.raises(ConfigurationError, match=r"^\w+: "):
        setattr(strategy, field, value)
    assert strategy == AuthStrategy()


LONGEST_PROMPT_BYTES = 512 * 2**20
"""What Redis takes as one text (proto-max-bulk-len), so that no job has more."""


@pytest.mark.parametrize(
    "tokens_per_line", [0.1, learned_lines.MIN_TOKENS_PER_LINE, learned_lines.MAX_TOKENS_PER_LINE, 10_000]
)
def test_the_longest_prompt_has_a_mode_whatever_a_line_is_taken_for(tokens_per_line):
    """At the borders of what can be set and of what can be learned: its job says no module_lines of its own."""
    strategy = AuthStrategy(tokens_per_line=tokens_per_line)
    lines = int(estimate_tokens(LONGEST_PROMPT_BYTES) / strategy.multiplier().tokens_per_line)
    assert strategy.get_recommended_mode(lines) is API


def test_misspelt_fields_are_refused_with_a_hint():
    """A threshold that nobody reads is worse than none."""
    with pytest.raises(ConfigurationError, match="unknown key; did you mean 'small_module_threshold'"):
        AuthStrategy(smal_module_threshold=1)
    with pytest.raises(ConfigurationError, match="unknown key; did you mean 'prefer_subscription'"):
        AuthStrategy().prefer_subscriptions = True


def test_fields_can_be_assigned():
    """What is assigned decides from then on."""
    strategy = AuthStrategy()
    strategy.medium_module_threshold = 5000
    strategy.subscription_tier = "max"
    assert strategy.get_recommended_mode(4999) is SUBSCRIPTION
    assert strategy.subscription_tier is SubscriptionTier.MAX
    assert strategy != AuthStrategy()


@pytest.mark.parametrize("lines", [0, 1, 500, 2000, 50_000])
def test_estimate_by_api_is_price_times_tokens(strategy, registry, lines):
    """To the nano-dollar, and with the price that the ledger would charge."""
    found = strategy.estimate_cost(lines, API)
    model = registry.of_tier(ModelTier.CAPABLE)[0]
    rates = get_pricing(model).tiers[0]
    million = Decimal(1_000_000)
    assert found["model"] == model.ref
    assert found["input_tokens"] == lines * DEFAULT_TOKENS_PER_LINE
    assert found["tokens_used"] == found["input_tokens"] + found["output_tokens"]
    assert found["monetary_cost"] == (
        found["input_tokens"] * rates.input / million + found["output_tokens"] * rates.output / million
    )
    used = Usage(input_tokens=found["input_tokens"], output_tokens=found["output_tokens"])
    assert found["monetary_cost"] == cost(model, used)
    assert found["quota_cost"] == 0


@pytest.mark.parametrize("mode", [SUBSCRIPTION, API])
def test_estimates_grow_with_lines(strategy, mode):
    """More lines never cost less, in money or in quota."""
    found = [strategy.estimate_cost(lines, mode) for lines in range(0, 60_000, 997)]
    key = "quota_cost" if mode is SUBSCRIPTION else "monetary_cost"
    for before, after in pairwise(found):
        assert before[key] < after[key]
        assert before["tokens_used"] < after["tokens_used"]


def test_estimate_by_subscription_is_a_share_of_the_quota(strategy):
    """No money, and the share of five hours' tokens: of those assumed for the plan, or of those that are set."""
    strategy.subscription_tier = SubscriptionTier.MAX
    found = strategy.estimate_cost(1000, SUBSCRIPTION)
    assert (found["monetary_cost"], found["window_tokens"]) == (0, 88_000)
    assert found["quota_cost"] == (Decimal(found["tokens_used"]) / 88_000).quantize(Decimal("1e-6"))
    strategy.window_tokens = found["tokens_used"]
    assert strategy.estimate_cost(1000, SUBSCRIPTION)["quota_cost"] == 1


@pytest.mark.parametrize("plan", ["enterprise", "free", "api_only"])
def test_share_of_a_quota_that_nobody_knows_is_unknown(strategy, plan):
    """None, and neither 0 nor a number that looks exact."""
    strategy.subscription_tier = plan
    assert strategy.estimate_cost(1000, SUBSCRIPTION)["quota_cost"] is None


@pytest.mark.parametrize("mode", [None, "auto", AUTO])
def test_auto_is_resolved_first(strategy, mode):
    """The estimate is of what would be done."""
    assert [strategy.estimate_cost(lines, mode)["mode"] for lines in (1999, 2000)] == [SUBSCRIPTION, API]


def test_estimate_has_the_tokens_that_are_set(strategy):
    """Per line and of the answer; without them the answer's length is capped by ``default_max_tokens``."""
    strategy.tokens_per_line = 7.5
    found = strategy.estimate_cost(1000, API, output_tokens=33)
    assert (found["input_tokens"], found["output_tokens"], found["tokens_used"]) == (7500, 33, 7533)
    assert (found["tokens_per_line"], found["tokens_source"]) == (7.5, "set")
    assert strategy.estimate_cost(1_000_000, API)["output_tokens"] == 4096


def test_fits_in_context_is_the_models_real_window(environ):
    """At the border: tokens equal to the window fit, one more does not, and of no window nobody knows."""
    models = (
        '[{"id": "small", "provider": "openai", "tier": "capable", "context_window": 1000},'
        ' {"id": "odd", "provider": "openai", "tier": "capable"}]'
    )
    strategy = AuthStrategy(tokens_per_line=1).bound(Settings.load(environ={**environ, "ATTUNE_MODELS": models}))
    fits = [strategy.estimate_cost(lines, model="small", output_tokens=10)["fits_in_context"] for lines in (990, 991)]
    assert fits == [True, False]
    assert strategy.estimate_cost(990, model="odd", output_tokens=10)["fits_in_context"] is None
    against = strategy.get_pros_cons(991, model="small")["api"]["cons"]
    assert any("do not fit the window of openai/small, 1,000" in one for one in against)


def test_unknown_price_is_unknown(environ):
    """None, never 0, which is what a subscription costs; and the comparison says so."""
    models = '[{"id": "own", "provider": "openai", "tier": "capable"}]'
    strategy = AuthStrategy().bound(Settings.load(environ={**environ, "ATTUNE_MODELS": models}))
    assert strategy.estimate_cost(10, API, model="own")["monetary_cost"] is None
    compared = strategy.get_pros_cons(10, model="own")
    assert "costs money; how much is not known" in compared["api"]["cons"]


def test_estimate_is_for_the_model_or_tier_that_is_named(strategy, registry):
    """Else for the preferred capable one; a name that is none is answered with the right ones."""
    premium = registry.of_tier(ModelTier.PREMIUM)[0]
    assert strategy.estimate_cost(10, API, tier="premium")["model"] == premium.ref
    assert strategy.estimate_cost(10, API, model=premium.id)["model"] == premium.ref
    for wrong, said in ({"model": "claude-hiku-5-5"}, "did you mean"), ({"tier": "gold"}, "allowed: cheap"):
        with pytest.raises(ConfigurationError, match=said):
            strategy.estimate_cost(10, API, **wrong)
    with pytest.raises(ConfigurationError, match="mode: 'cash' is not allowed; allowed: subscription, api, auto"):
        strategy.estimate_cost(10, "cash")


def test_pros_and_cons_are_those_of_the_estimates(strategy):
    """Both modes with their numbers, and the one that is recommended, with the reason."""
    compared = strategy.get_pros_cons(1000)
    for name, mode in ("subscription", SUBSCRIPTION), ("api", API):
        one = compared[name]
        assert one["cost"] == strategy.estimate_cost(1000, mode)
        assert one["name"].lower() == name
        assert one["pros"]
        assert one["cons"]
    price, share = compared["api"]["cost"]["monetary_cost"], compared["subscription"]["cost"]["quota_cost"]
    assert f"costs ${price:f}" in compared["api"]["cons"]
    assert f"saves the ${price:f} of the call by API" in compared["subscription"]["pros"]
    assert f"{share:.1%}" in compared["subscription"]["cons"][0]
    assert (compared["recommendation"], compared["reason"]) == strategy.recommend(1000)
    strategy.subscription_tier = "api_only"
    assert "the plan has no subscription" in strategy.get_pros_cons(1000)["subscription"]["cons"]
    strategy.window_tokens = 10
    assert "is more than one window has" in strategy.get_pros_cons(1000)["subscription"]["cons"]
