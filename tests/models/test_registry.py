"""The registry lays a user's models over the catalog and keeps them in order of preference."""

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import attune_worker
from attune_worker.errors import ConfigurationError
from attune_worker.jobs import ModelTier
from attune_worker.models import registry as module
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.settings import Settings

LOCAL = {"local": {"kind": "openai", "base_url": "http://127.0.0.1:8000/v1"}}
ROUTER = {"openrouter": {"kind": "openai", "base_url": "https://openrouter.ai/api/v1"}}


def registry(*models: Mapping[str, Any], providers: Mapping[str, Any] = LOCAL, **settings: Any) -> Registry:
    return Registry.from_settings(Settings.model_validate({"models": models, "providers": providers, **settings}))


def names(models: tuple[ModelInfo, ...]) -> list[str]:
    return [model.ref for model in models]


@pytest.mark.parametrize("provider", ["anthropic", "openai", "google"])
@pytest.mark.parametrize("tier", ModelTier)
def test_every_default_provider_serves_every_tier(provider: str, tier: ModelTier) -> None:
    """One key in the environment is enough to run any job, so each provider's tiers are filled."""
    model = registry().get(provider, tier)
    assert (model.provider, model.tier) == (provider, tier)


def test_catalog_says_when_and_where_its_numbers_are_from() -> None:
    """Numbers without a date and a source cannot be checked or updated."""
    catalog = tomllib.loads(Path(module.__file__).with_name("catalog.toml").read_text())
    assert isinstance(catalog["as_of"], date)
    assert {row["provider"] for row in catalog["models"]} == set(catalog["sources"])
    assert all(row["source"].startswith("https://") for row in catalog["models"])


def test_catalog_models_leave_room_for_a_prompt() -> None:
    """The answer's bound is part of the window, so it must not fill it."""
    for model in registry().all():
        assert model.context_window is not None
        assert model.max_output_tokens is not None
        assert model.max_output_tokens < model.context_window
        assert "text" in model.capabilities


def test_own_fields_replace_only_those_fields() -> None:
    """Changing one number of a catalog model keeps all the others."""
    before = registry().find("anthropic/claude-haiku-4-5")[0]
    after = registry({"id": "claude-haiku-4-5", "provider": "anthropic", "max_output_tokens": 8192}).find(before.ref)[0]
    assert after.max_output_tokens == 8192
    assert (after.tier, after.context_window, after.capabilities) == (
        before.tier,
        before.context_window,
        before.capabilities,
    )


def test_own_prices_are_kept_as_exact_decimals() -> None:
    """A price written as 0.1 is a tenth, not the nearest binary fraction."""
    model = registry(
        {
            "id": "qwen",
            "provider": "local",
            "tier": "cheap",
            "input_cost_per_million": "0.1",
            "output_cost_per_million": "0.3",
        },
    ).find("qwen")[0]
    assert (model.input_cost_per_million, model.output_cost_per_million) == (Decimal("0.1"), Decimal("0.3"))


def test_disabled_model_is_gone() -> None:
    """``enabled = false`` takes a catalog model out of every list."""
    without = registry({"id": "claude-haiku-5-5", "provider": "anthropic", "enabled": False})
    assert without.find("claude-haiku-5-5") == ()
    assert without.get("anthropic", "cheap").id == "claude-haiku-4-5"


def test_new_model_without_tier_is_refused_naming_the_key() -> None:
    """The message leads to the line to change, and says what is allowed there."""
    with pytest.raises(ConfigurationError, match=r"^models\.1\.tier: .*'llama'.*cheap, capable, premium$"):
        registry({"id": "qwen", "provider": "local", "tier": "cheap"}, {"id": "llama", "provider": "local"})


def test_model_given_twice_is_refused() -> None:
    """Two entries for one model contradict each other; which one was meant is not guessed."""
    twice = {"id": "qwen", "provider": "local", "tier": "cheap"}
    with pytest.raises(ConfigurationError, match=r"models\.1\.id: 'qwen' of 'local' is given twice"):
        registry(twice, twice)


def test_same_id_at_two_providers_is_two_models() -> None:
    """A gateway and the maker may serve the same id at different prices."""
    both = registry({"id": "gpt-6-luna", "provider": "local", "tier": "capable"})
    assert names(both.find("gpt-6-luna")) == ["openai/gpt-6-luna", "local/gpt-6-luna"]
    assert [model.tier for model in both.find("gpt-6-luna")] == [ModelTier.CHEAP, ModelTier.CAPABLE]


def test_reference_with_provider_means_that_one() -> None:
    """``provider/id`` picks one of several providers that serve the id."""
    both = registry({"id": "gpt-6-luna", "provider": "local", "tier": "capable"})
    assert names(both.find("local/gpt-6-luna")) == ["local/gpt-6-luna"]
    assert both.find("nowhere/gpt-6-luna") == ()


def test_ids_with_slashes_are_found_bare_and_with_provider() -> None:
    """OpenRouter's ids hold slashes of their own."""
    routed = registry({"id": "meta/llama-4", "provider": "openrouter", "tier": "cheap"}, providers=ROUTER)
    assert names(routed.find("meta/llama-4")) == ["openrouter/meta/llama-4"]
    assert names(routed.find("openrouter/meta/llama-4")) == ["openrouter/meta/llama-4"]


def test_reference_that_can_be_read_both_ways_means_the_provider() -> None:
    """Naming a configured provider wins over another provider's id that happens to look like it."""
    routed = registry({"id": "openai/gpt-6-luna", "provider": "openrouter", "tier": "cheap"}, providers=ROUTER)
    assert names(routed.find("openai/gpt-6-luna")) == ["openai/gpt-6-luna"]
    assert names(routed.find("openrouter/openai/gpt-6-luna")) == ["openrouter/openai/gpt-6-luna"]


def test_preferred_providers_come_first_and_the_others_by_name() -> None:
    """``provider_order`` decides; what it leaves out follows in a fixed order."""
    providers = {"zeta": LOCAL["local"], "alpha": LOCAL["local"]}
    models = [{"id": "m", "provider": name, "tier": "cheap"} for name in ("zeta", "alpha")]
    ordered = registry(*models, providers=providers, provider_order=("google", "openai"))
    seen = list(dict.fromkeys(model.provider for model in ordered.of_tier(ModelTier.CHEAP)))
    assert seen == ["google", "openai", "alpha", "anthropic", "zeta"]


def test_own_models_come_before_the_catalog_of_their_provider() -> None:
    """What a user took the trouble to name is preferred, in the order it was named."""
    own = registry(
        {"id": "claude-haiku-4-5", "provider": "anthropic"},
        {"id": "claude-next", "provider": "anthropic", "tier": "cheap"},
    )
    of_anthropic = [model.id for model in own.of_tier(ModelTier.CHEAP) if model.provider == "anthropic"]
    assert of_anthropic == ["claude-haiku-4-5", "claude-next", "claude-haiku-5-5"]


def test_unknown_provider_is_refused_with_a_suggestion() -> None:
    """A typo costs one look at the message, not a search in the docs."""
    with pytest.raises(
        ConfigurationError, match=r"unknown provider 'antropic'; did you mean 'anthropic'.*google.*openai"
    ):
        registry().get("antropic", ModelTier.CHEAP)


def test_unknown_tier_is_refused_with_a_suggestion() -> None:
    """A tier given as text is checked like everything else."""
    with pytest.raises(ConfigurationError, match="unknown tier 'premum'; did you mean 'premium'"):
        registry().get("anthropic", "premum")


def test_provider_without_a_model_of_the_tier_is_an_error_that_says_what_it_has() -> None:
    """Never None, and never another tier in silence."""
    with pytest.raises(ConfigurationError, match="'local' has no model of tier 'premium'; it has: cheap"):
        registry({"id": "qwen", "provider": "local", "tier": "cheap"}).get("local", "premium")
    with pytest.raises(ConfigurationError, match="'local' has no model of tier 'premium'; it has: none"):
        registry().get("local", "premium")


def test_web_client_does_not_load_the_price_library_or_http() -> None:
    """Reading the registry stays cheap in a process that only submits jobs."""
    code = (
        "import sys; from attune_worker.models.pricing import cost; from attune_worker.models.registry import Registry;"
        "from attune_worker.settings import Settings; Registry.from_settings(Settings());"
        "print(*sorted({'httpx', 'genai_prices'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_process_has_one_registry_by_its_settings() -> None:
    """``get_model``, ``get_all_models`` and ``get_pricing_for_model`` need no settings of their own."""
    every = attune_worker.get_all_models()
    assert every == Registry.from_settings(attune_worker.get_settings()).all()
    cheap = attune_worker.get_model("anthropic", "cheap")
    assert cheap == attune_worker.get_model("anthropic", ModelTier.CHEAP)
    assert cheap in every
    price = attune_worker.get_pricing_for_model(cheap.id)
    assert price is not None
    assert price.output_cost_per_million > price.input_cost_per_million > 0
