import json
from decimal import Decimal

from attune_worker.models.price_list import get_pricing
from attune_worker.models.registry import Registry


def test_list_has_every_model_with_its_price_and_who_says_so(invoke, settings):
    """In the registry's order, with the same prices that calls are charged at."""
    said = json.loads(invoke("models", "list", "--json").output)
    models = Registry.from_settings(settings).all()
    assert [(one["provider"], one["model_id"]) for one in said] == [(model.provider, model.id) for model in models]
    for one, model in zip(said, models, strict=True):
        price = get_pricing(model)
        assert Decimal(one["input_cost_per_million"]) == price.input_cost_per_million
        assert Decimal(one["output_cost_per_million"]) == price.output_cost_per_million
        assert one["price_source"] == price.source
        assert (one["context_window"], one["capabilities"]) == (model.context_window, sorted(model.capabilities))
    assert any(one["price_valid_from"] for one in said)


def test_list_says_which_models_can_be_used_from_here(invoke):
    """Google has no key in this fleet."""
    usable = {one["provider"]: one["usable"] for one in json.loads(invoke("models", "list", "--json").output)}
    assert usable == {"anthropic": True, "openai": True, "google": False}


def test_list_narrows_by_tier_and_provider(invoke):
    """Both together, for a reader and a program."""
    said = json.loads(invoke("models", "list", "--tier", "cheap", "--provider", "openai", "--json").output)
    assert said
    assert {(one["tier"], one["provider"]) for one in said} == {("cheap", "openai")}
    shown = invoke("models", "list", "--tier", "cheap").output
    assert f"openai/{said[0]['model_id']}" in shown
    assert "genai-prices" in shown
    assert "configured: anthropic, google, openai" in invoke("models", "list", "--provider", "x", code=2).output


def test_price_that_is_not_known_is_none_and_not_0(invoke):
    """And a price from the settings says that it is."""
    models = [
        {"id": "mystery", "provider": "openai", "tier": "cheap"},
        {"id": "own", "provider": "openai", "tier": "cheap", "input_cost_per_million": 3, "output_cost_per_million": 4},
    ]
    options = ("models", "list", "--tier", "cheap", "--provider", "openai")
    said = {one["model_id"]: one for one in json.loads(invoke(*options, "--json", MODELS=json.dumps(models)).output)}
    assert (said["mystery"]["input_cost_per_million"], said["mystery"]["price_source"]) == (None, None)
    assert (said["own"]["input_cost_per_million"], said["own"]["price_source"]) == ("3", "settings")
    lines = invoke(*options, MODELS=json.dumps(models)).output.splitlines()
    assert next(line for line in lines if "mystery" in line).count("?") == 4
