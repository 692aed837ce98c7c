"""Which price applies to a model at a point in time, and who says so?

The user's own (``[[models]]``), else what genai-prices knows to be published, with its dates. That library takes
0.2 s to import, so it is imported when the first price is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

from attune_worker.models.registry import ModelInfo, get_registry

if TYPE_CHECKING:
    from genai_prices.types import ConditionalPrice, ModelPrice, Provider, TieredPrices


@dataclass(frozen=True, slots=True)
class Rates:
    """Prices in USD per million tokens, for calls whose whole prompt has more than ``above_input_tokens`` tokens."""

    above_input_tokens: int
    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write: Decimal
    cache_write_1h: Decimal
    reasoning: Decimal


@dataclass(frozen=True, slots=True)
class Pricing:
    """What a model costs at a point in time, and who says so.

    ``tiers`` ascend by prompt length; the one reached prices the whole call, not only the tokens beyond it.
    ``request_cost_usd`` is charged per call. The price holds from ``valid_from`` until ``valid_until``
    (None: no such limit is known).
    """

    tiers: tuple[Rates, ...]
    source: str
    request_cost_usd: Decimal = Decimal(0)
    valid_from: datetime | None = None
    valid_until: datetime | None = None

    @property
    def input_cost_per_million(self) -> Decimal:
        """USD per million prompt tokens that no cache is involved in, for short prompts."""
        return self.tiers[0].input

    @property
    def output_cost_per_million(self) -> Decimal:
        """USD per million generated tokens, for short prompts."""
        return self.tiers[0].output

    @property
    def cache_read_cost_per_million(self) -> Decimal:
        """USD per million prompt tokens read from the provider's cache, for short prompts."""
        return self.tiers[0].cache_read

    @property
    def cache_write_cost_per_million(self) -> Decimal:
        """USD per million prompt tokens written to the provider's cache, for short prompts."""
        return self.tiers[0].cache_write


def get_pricing(model: ModelInfo, at: datetime | None = None) -> Pricing | None:
    """Return the model's price at a point in time (default: now), None when it is not known.

    The user's own price wins over published ones. What it leaves open follows the input price: cache reads,
    cache writes, and writes kept for an hour, which cost as much as other writes.
    """
    if model.input_cost_per_million is not None and model.output_cost_per_million is not None:
        return _own_pricing(model, model.input_cost_per_million, model.output_cost_per_million)
    return _published_pricing(model, in_utc(at))


def get_pricing_for_model(model_id: str) -> Pricing | None:
    """Return today's price of a configured model, ``id`` or ``provider/id``; None when either is not known.

    Where several providers serve the id, it is the price of the preferred one.
    """
    found = get_registry().find(model_id)
    return get_pricing(found[0]) if found else None


def in_utc(at: datetime | None) -> datetime:
    """Return a point in time with its zone: now for None, UTC where none is given (as genai-prices reads it)."""
    if at is None:
        return datetime.now(UTC)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at


def _own_pricing(model: ModelInfo, per_input: Decimal, per_output: Decimal) -> Pricing:
    read, write = model.cache_read_cost_per_million, model.cache_write_cost_per_million
    rates = Rates(
        above_input_tokens=0,
        input=per_input,
        output=per_output,
        cache_read=per_input if read is None else read,
        cache_write=per_input if write is None else write,
        cache_write_1h=per_input if write is None else write,
        reasoning=per_output,
    )
    return Pricing(tiers=(rates,), source="settings")


def _published_pricing(model: ModelInfo, at: datetime) -> Pricing | None:
    from genai_prices import __version__, data_snapshot

    providers = data_snapshot.get_snapshot().providers
    provider = _price_list(model, providers)
    published = provider.find_model(model.id, all_providers=providers) if provider else None
    if provider is None or published is None:
        return None
    prices = published.get_prices(at)
    tiers = _published_tiers(prices)
    if tiers is None:
        return None
    dated = published.prices if isinstance(published.prices, list) else []
    changes = list(_changes(dated, at))
    per_thousand = prices.requests_kcount
    return Pricing(
        tiers=tiers,
        source=f"genai-prices {__version__}, {provider.id}: {(provider.pricing_urls or ['?'])[0]}",
        request_cost_usd=per_thousand.scaleb(-3) if isinstance(per_thousand, Decimal) else Decimal(0),
        valid_from=max((change for change in changes if change <= at), default=None),
        valid_until=min((change for change in changes if change > at), default=None),
    )


def _price_list(model: ModelInfo, providers: list[Provider]) -> Provider | None:
    """Return whose published prices apply: the named ones, else the provider's own, else those of its address.

    Names must match exactly and a model's name is never enough: gpt-oss on one's own server, in a section
    called ``local-openai``, does not cost what OpenAI asks for it.
    """
    by_id = {provider.id: provider for provider in providers}
    if model.price_list is not None:
        return by_id.get(model.price_list)
    if model.provider in by_id:
        return by_id[model.provider]
    from genai_prices import data_snapshot

    try:
        return data_snapshot.get_snapshot().find_provider(None, None, model.base_url) if model.base_url else None
    except LookupError:
        return None


def _published_tiers(prices: ModelPrice) -> tuple[Rates, ...] | None:
    """Read a published price; None when it has none for text, or splits text in ways a usage record does not."""
    # Modalities of their own (audio, images, video) and tools do not occur in text calls and are left aside.
    split = ("input_text_", "output_text_", "cache_text_", "cache_write_5m_")
    given = {name: value for name, value in vars(prices).items() if value is not None}
    base, output = given.get("input_mtok"), given.get("output_mtok")
    if base is None or output is None or any(name.startswith(split) for name in given):
        return None
    write = given.get("cache_write_mtok", base)
    columns: list[Decimal | TieredPrices] = [
        base,
        output,
        given.get("cache_read_mtok", base),
        write,
        given.get("cache_write_1h_mtok", write),
        given.get("output_reasoning_mtok", output),
    ]
    starts = {tier.start for column in columns if not isinstance(column, Decimal) for tier in column.tiers}
    return tuple(Rates(start, *(_at_length(column, start) for column in columns)) for start in sorted({0} | starts))


def _at_length(price: Decimal | TieredPrices, above_input_tokens: int) -> Decimal:
    if isinstance(price, Decimal):
        return price
    reached = [tier.price for tier in price.tiers if tier.start <= above_input_tokens]
    return reached[-1] if reached else price.base


def _changes(dated: list[ConditionalPrice], at: datetime) -> Iterator[datetime]:
    """Yield the instants around ``at`` at which another of the dated prices may begin to apply."""
    from genai_prices.types import StartDateConstraint, TimeOfDateConstraint

    for price in dated:
        limit = price.constraint
        if isinstance(limit, StartDateConstraint):
            yield datetime.combine(limit.start_date, time(tzinfo=UTC))
        elif isinstance(limit, TimeOfDateConstraint):
            for day in (-1, 0, 1):
                for moment in (limit.start_time, limit.end_time):
                    date = at.astimezone(UTC).date() + timedelta(days=day)
                    yield datetime.combine(date, moment if moment.tzinfo else moment.replace(tzinfo=UTC))
