from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import InvalidJobError, NoCandidateError
from attune_worker.jobs import Job, ModelTier
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import (
    Candidates,
    candidates,
    check,
    estimate_tokens,
    must_serve,
    output_limit,
)

CHEAP, CAPABLE, PREMIUM = ModelTier.CHEAP, ModelTier.CAPABLE, ModelTier.PREMIUM
DEFAULT_MAX_TOKENS = 100


def model(ref: str, tier: ModelTier, **fields: Any) -> ModelInfo:
    provider, _, name = ref.partition("/")
    return ModelInfo(name, provider, tier, **fields)


REGISTRY = Registry(
    [
        model("a/small", CHEAP),
        model("a/small-too", CHEAP),
        model("a/middle", CAPABLE),
        model("a/large", PREMIUM),
        model("b/small", CHEAP),
        model("b/middle", CAPABLE),
        model("b/large", PREMIUM),
        model("c/meta/llama", CHEAP),
    ],
    ["empty"],
)


def job(**fields: Any) -> Job:
    return Job.parse({"task_type": "summarize", "prompt": "?"} | fields)


def found(registry: Registry = REGISTRY, **fields: Any) -> Candidates:
    return candidates(job(**fields), registry, DEFAULT_MAX_TOKENS)


def refs(kept: Candidates) -> list[str]:
    return [info.ref for info in kept.models]


def reasons(kept: Candidates) -> Mapping[str, str]:
    return {info.ref: reason for info, reason in kept.dropped}


@pytest.mark.parametrize(
    ("task_type", "order"),
    [
        ("summarize", [CHEAP, CAPABLE, PREMIUM]),
        ("fix_bug", [CAPABLE, PREMIUM, CHEAP]),
        ("final_review", [PREMIUM, CAPABLE, CHEAP]),
        ("something new", [CAPABLE, PREMIUM, CHEAP]),
    ],
)
def test_tier_of_the_task_comes_first_then_stronger_then_weaker(task_type: str, order: list[ModelTier]) -> None:
    """A stronger model can do the work; a weaker one is better than none."""
    tiers = [info.tier for info in found(task_type=task_type).models]
    assert list(dict.fromkeys(tiers)) == order


def test_fallback_leaves_the_provider_first() -> None:
    """The second choice of a provider in trouble comes after the first choice of the others."""
    assert refs(found())[:4] == ["a/small", "b/small", "c/meta/llama", "a/small-too"]


def test_every_model_is_a_candidate() -> None:
    """Nothing is lost on the way."""
    assert sorted(refs(found())) == sorted(info.ref for info in REGISTRY.all())


def test_tier_hint_wins_over_the_task() -> None:
    """The caller knows this job better than its type does."""
    assert refs(found(tier_hint="premium"))[:2] == ["a/large", "b/large"]


def test_preferred_provider_comes_first_in_each_tier_and_others_stay() -> None:
    """A hint is a wish; the job must not fail because one provider is away."""
    ordered = refs(found(provider_hint="b"))
    assert ordered[:4] == ["b/small", "a/small", "c/meta/llama", "a/small-too"]
    assert ordered.index("b/middle") < ordered.index("a/middle")
    assert len(ordered) == len(REGISTRY.all())


def test_preferred_provider_without_models_changes_nothing() -> None:
    """It is configured, so wishing for it is no error."""
    assert refs(found(provider_hint="empty")) == refs(found())


@pytest.mark.parametrize(
    ("name", "served_by"),
    [
        ("small", ["a/small", "b/small"]),
        ("b/small", ["b/small"]),
        ("meta/llama", ["c/meta/llama"]),
        ("c/meta/llama", ["c/meta/llama"]),
    ],
)
def test_pinned_model_is_the_only_one(name: str, served_by: list[str]) -> None:
    """A bare id means that model at every provider that serves it, ``provider/id`` one of them."""
    assert refs(found(model=name)) == served_by


def test_pinned_model_is_asked_of_the_preferred_provider_first() -> None:
    """Both wishes are kept."""
    assert refs(found(model="small", provider_hint="b")) == ["b/small", "a/small"]


def test_pinned_model_ignores_the_tier() -> None:
    """Naming the model is the stronger wish."""
    assert refs(found(model="a/large", tier_hint="cheap")) == ["a/large"]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"model": "midle"}, "model", "did you mean 'middle'?"),
        ({"model": "gpt-99"}, "model", "configured: large, meta/llama, middle, small, small-too"),
        ({"model": "c/small"}, "model", "no model 'c/small'"),
        ({"provider_hint": "z"}, "provider_hint", "allowed: a, b, c, empty"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(fields: dict[str, str], field: str, words: str) -> None:
    """A typo must not silently run the job on another model."""
    with pytest.raises(InvalidJobError) as caught:
        found(**fields)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_prompt_must_fit_the_window_together_with_its_answer() -> None:
    """Providers count both; 404 bytes are 101 tokens, and the answer may take 100."""
    registry = Registry([model("a/fits", CHEAP, context_window=201), model("a/not", CHEAP, context_window=200)])
    kept = found(registry, prompt="x" * 404)
    assert refs(kept) == ["a/fits"]
    assert "window of 200 tokens" in reasons(kept)["a/not"]


def test_unknown_window_is_not_held_against_a_model() -> None:
    """Local servers rarely say; the provider's own refusal is handled."""
    assert refs(found(Registry([model("a/x", CHEAP)]), prompt="x" * 10_000)) == ["a/x"]


def test_system_prompt_and_all_messages_count() -> None:
    """All of it is sent."""
    registry = Registry([model("a/x", CHEAP, context_window=200)])
    turns = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 200}]
    with pytest.raises(NoCandidateError):
        must_serve(found(registry, prompt=None, messages=turns, system="z" * 100))


def test_temperature_goes_only_to_models_that_take_it() -> None:
    """Others answer 400, which ends the job."""
    registry = Registry([model("a/fixed", CHEAP, capabilities=frozenset({"text"})), model("a/free", CHEAP)])
    kept = found(registry, temperature=0.0)
    assert refs(kept) == ["a/free"]
    assert reasons(kept) == {"a/fixed": "takes no temperature"}
    assert refs(found(registry)) == ["a/fixed", "a/free"]


def test_answer_must_be_as_long_as_asked_for() -> None:
    """A model that writes less would cut it off."""
    registry = Registry([model("a/short", CHEAP, max_output_tokens=50), model("a/long", CHEAP, max_output_tokens=500)])
    kept = found(registry, max_tokens=51)
    assert refs(kept) == ["a/long"]
    assert "at most 50 tokens" in reasons(kept)["a/short"]


@pytest.mark.parametrize(
    ("asked", "model_limit", "sent"), [(None, 50, 50), (None, None, 100), (None, 500, 100), (30, 50, 30), (60, 50, 60)]
)
def test_output_limit_is_the_jobs_own_else_the_default_as_far_as_it_goes(
    asked: int | None, model_limit: int | None, sent: int
) -> None:
    """The default must not make a small model unusable."""
    info = model("a/x", CHEAP, max_output_tokens=model_limit)
    assert output_limit(job(max_tokens=asked), info, DEFAULT_MAX_TOKENS) == sent


def test_further_obstacles_are_reasons_like_the_others() -> None:
    """Credentials and budgets are known elsewhere, and named in the same list."""
    kept = candidates(
        job(), REGISTRY, DEFAULT_MAX_TOKENS, lambda info: "has no API key" if info.provider == "a" else None
    )
    assert {info.provider for info in kept.models} == {"b", "c"}
    assert set(reasons(kept).values()) == {"has no API key"}


def test_nobody_left_says_why_for_each_provider() -> None:
    """The operator sees at once which key to set."""
    kept = candidates(job(), REGISTRY, DEFAULT_MAX_TOKENS, lambda _: "has no API key")
    with pytest.raises(NoCandidateError, match=r"a: has no API key \(4 models\); b: .*; c: has no API key$"):
        must_serve(kept)
    with pytest.raises(NoCandidateError, match="none is configured"):
        must_serve(found(Registry([])))


def test_job_that_no_model_could_ever_serve_is_refused_at_submission() -> None:
    """Whoever runs it: so credentials, which only workers have, do not count here."""
    registry = Registry([model("a/x", CHEAP, context_window=200), model("b/x", CHEAP, context_window=300)])
    check(job(), registry, DEFAULT_MAX_TOKENS)
    with pytest.raises(InvalidJobError, match=r"none of the 2 models .* about 500 tokens fits.*200 tokens.*300 tokens"):
        check(job(prompt="x" * 2000), registry, DEFAULT_MAX_TOKENS)


@given(st.text(), st.sampled_from(ModelTier), st.sampled_from([None, "a", "b", "c", "empty"]))
def test_every_model_is_kept_or_dropped_with_a_reason(text: str, tier: ModelTier, hint: str | None) -> None:
    """Each exactly once, in the same order for the same job."""
    asked = {"prompt": f"?{text}", "tier_hint": tier, "provider_hint": hint}
    kept = found(**asked)
    assert sorted([*refs(kept), *reasons(kept)]) == sorted(info.ref for info in REGISTRY.all())
    assert found(**asked) == kept


@pytest.mark.parametrize(("text_bytes", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4000, 1000)])
def test_estimate_rounds_up(text_bytes: int, tokens: int) -> None:
    """A started token is a token."""
    assert estimate_tokens(text_bytes) == tokens
