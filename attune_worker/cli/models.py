"""``attune-worker models``: which models are there, what do they cost, who says so, and can they be used from here?"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import click

from attune_worker.cli.names import complete_providers
from attune_worker.cli.output import Column, Rows, console, json_option, print_fitting, print_json
from attune_worker.errors import ConfigurationError
from attune_worker.jobs import ModelTier
from attune_worker.models.price_list import get_pricing
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.settings import get_settings

COLUMNS = (
    Column("model"),
    Column("tier"),
    Column("window", 2, right=True),
    Column("max output", 3, right=True),
    Column("USD/M in", right=True),
    Column("USD/M out", right=True),
    Column("since", 5),
    Column("source", 6),
    Column("can", 4),
    Column("key", 1),
)


@click.group()
def models() -> None:
    """See which models there are.

    Example: attune-worker models list --tier cheap
    """


@models.command("list")
@click.option("--tier", type=click.Choice([tier.value for tier in ModelTier]), help="Only models of this tier.")
@click.option("--provider", metavar="NAME", shell_complete=complete_providers, help="Only models of this provider.")
@json_option
def list_models(tier: str | None, provider: str | None, as_json: bool) -> None:
    """List the models in order of preference, with their prices, who says so, and whether there is a key for them.

    Prices are those of now, in USD per million tokens, for short prompts; ? where none is known.

    Example: attune-worker models list --provider anthropic --json
    """
    settings = get_settings()
    if provider is not None and provider not in settings.providers:
        known = ", ".join(sorted(settings.providers))
        raise ConfigurationError(f"{provider!r} is not a provider; configured: {known}")
    found = [
        _described(model, usable=settings.providers[model.provider].usable())
        for model in Registry.from_settings(settings).all()
        if tier in {None, model.tier.value} and provider in {None, model.provider}
    ]
    if as_json:
        print_json(found)
    elif not found:
        click.echo("no such model")
    else:
        dim = {row: "dim" for row, one in enumerate(found) if not one["usable"]}
        print_fitting(console(), Rows(COLUMNS, [_cells(one) for one in found], styles=dim))


def _described(model: ModelInfo, *, usable: bool) -> dict[str, Any]:
    """Return what ``--json`` says of a model."""
    price = get_pricing(model)
    return {
        "model_id": model.id,
        "provider": model.provider,
        "tier": model.tier.value,
        "context_window": model.context_window,
        "max_output_tokens": model.max_output_tokens,
        "input_cost_per_million": price and price.input_cost_per_million,
        "output_cost_per_million": price and price.output_cost_per_million,
        "cache_read_cost_per_million": price and price.cache_read_cost_per_million,
        "cache_write_cost_per_million": price and price.cache_write_cost_per_million,
        "price_valid_from": price and price.valid_from,
        "price_valid_until": price and price.valid_until,
        "price_source": price and price.source,
        "capabilities": sorted(model.capabilities),
        "usable": usable,
    }


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    since, source = one["price_valid_from"], one["price_source"]
    return (
        f"{one['provider']}/{one['model_id']}",
        one["tier"],
        _count(one["context_window"]),
        _count(one["max_output_tokens"]),
        _price(one["input_cost_per_million"]),
        _price(one["output_cost_per_million"]),
        f"{since:%Y-%m-%d}" if since else "",
        source or "",
        " ".join(one["capabilities"]),
        "yes" if one["usable"] else "no",
    )


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _price(amount: Decimal | None) -> str:
    if amount is None:
        return "?"
    text = f"{amount:f}"
    whole, _, part = text.partition(".")
    return f"{whole}.{part.rstrip('0').ljust(2, '0')}"
