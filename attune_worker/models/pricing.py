"""What does a call cost, to the nano-dollar?

genai-prices takes 0.15 ms for a calculation, so it is asked once per model and price date; after that a cost is a
few integer multiplications. What it would answer is what is answered here: a property test says so.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, ROUND_UP, Context, Decimal
from functools import lru_cache
from typing import NamedTuple

from attune_worker.jobs import NANO_USD, Usage
from attune_worker.models.price_list import Pricing, Rates, get_pricing, get_pricing_for_model, in_utc
from attune_worker.models.registry import ModelInfo

__all__ = ["Pricing", "Rates", "cost", "get_pricing", "get_pricing_for_model", "plain_cost", "worst_case_cost"]

logger = logging.getLogger(__name__)

_EXACT = Context(prec=100)  # not the caller's: a context with fewer digits would change what things cost
_ALWAYS = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


def cost(model: ModelInfo, usage: Usage, at: datetime | None = None) -> Decimal | None:
    """Return what a call cost in USD, or None (and one warning per model) when the price is not known.

    ``at`` is when the call was made (default: now; without a time zone: UTC). Reasoning tokens are part of
    the output tokens, cached ones of the input tokens. Should a provider report more of a part than of the
    whole, every part is charged as reported.

    The sum is exact and rounded once, to the nearest nano-dollar, half to even: rounding up, or half up, would
    add the same small error to every call and let the ledger drift away from the provider's invoice.
    """
    tariff = _tariff(model, at)
    if tariff is None:
        return None
    write = max(usage.cache_write_tokens, usage.cache_write_1h_tokens)
    cached = usage.cache_read_tokens + write
    prompt = max(usage.input_tokens, cached)
    rates = tariff.rates(prompt)
    amount = (
        tariff.request
        + (prompt - cached) * rates.input
        + usage.cache_read_tokens * rates.cache_read
        + (write - usage.cache_write_1h_tokens) * rates.cache_write
        + usage.cache_write_1h_tokens * rates.cache_write_1h
        + max(usage.output_tokens - usage.reasoning_tokens, 0) * rates.output
        + usage.reasoning_tokens * rates.reasoning
    )
    return _usd(amount, tariff.digits, ROUND_HALF_EVEN)


def worst_case_cost(
    model: ModelInfo, input_tokens: int, max_output_tokens: int, at: datetime | None = None
) -> Decimal | None:
    """Return the most that a call can cost in USD, rounded up to a nano-dollar; None when the price is not known.

    Nothing of the prompt is assumed to be cached yet, and all of it to be written to the cache where that costs
    more than reading it plainly (some providers do so unasked). Writes kept for an hour are not assumed.
    """
    tariff = _tariff(model, at)
    if tariff is None:
        return None
    rates = tariff.rates(input_tokens)
    prompt = input_tokens * max(rates.input, rates.cache_write)
    answer = max_output_tokens * max(rates.output, rates.reasoning)
    return _usd(tariff.request + prompt + answer, tariff.digits, ROUND_UP)


def plain_cost(
    model: ModelInfo, input_tokens: int, output_tokens: int, at: datetime | None = None, calls: int = 1
) -> Decimal | None:
    """Return what ``calls`` calls of so many tokens together cost in USD, with no cache and no reasoning.

    ``None`` and ``at`` are as with ``cost``. Where the price depends on a prompt's length, their mean decides.
    """
    tariff = _tariff(model, at)
    if tariff is None:
        return None
    rates = tariff.rates(input_tokens // max(calls, 1))
    amount = calls * tariff.request + input_tokens * rates.input + output_tokens * rates.output
    return _usd(amount, tariff.digits, ROUND_HALF_EVEN)


class _IntegerRates(NamedTuple):
    above_input_tokens: int
    input: int
    output: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    reasoning: int


class _Tariff(NamedTuple):
    """A price in whole units of 10**-digits USD, per token and per request; ``tiers`` descend."""

    tiers: tuple[_IntegerRates, ...]
    request: int
    digits: int
    valid_from: datetime
    valid_until: datetime

    def rates(self, input_tokens: int) -> _IntegerRates:
        for rates in self.tiers:
            if input_tokens > rates.above_input_tokens:
                return rates
        return self.tiers[-1]


_tariffs: dict[ModelInfo, _Tariff | None] = {}
_MAX_TARIFFS = 4096
_OUT_OF_DATE = _Tariff((), 0, 0, valid_from=_ALWAYS[1], valid_until=_ALWAYS[0])


def _tariff(model: ModelInfo, at: datetime | None) -> _Tariff | None:
    """Return the price as integers, from memory while its dates cover ``at``."""
    at = in_utc(at)
    tariff = _tariffs.get(model, _OUT_OF_DATE)
    if tariff is None or tariff.valid_from <= at < tariff.valid_until:
        return tariff
    pricing = get_pricing(model, at)
    if pricing is None:
        _say_unknown(model.ref)
    if len(_tariffs) >= _MAX_TARIFFS:
        _tariffs.clear()
    tariff = _tariffs[model] = None if pricing is None else _as_integers(pricing)
    return tariff


@lru_cache(maxsize=1024)  # remembers what was said
def _say_unknown(ref: str) -> None:
    logger.warning(
        "no price is known for %s: its calls are recorded with an unknown cost; set input_cost_per_million and "
        "output_cost_per_million in [[models]], or price_list in its provider's section",
        ref,
    )


def _as_integers(pricing: Pricing) -> _Tariff:
    amounts = [pricing.request_cost_usd, *(amount for rates in pricing.tiers for amount in _amounts(rates))]
    digits = 6 + max(9, *(-int(amount.as_tuple().exponent) for amount in amounts))
    tiers = [
        _IntegerRates(rates.above_input_tokens, *(_whole(amount, digits - 6) for amount in _amounts(rates)))
        for rates in pricing.tiers
    ]
    return _Tariff(
        tiers=tuple(reversed(tiers)),
        request=_whole(pricing.request_cost_usd, digits),
        digits=digits,
        valid_from=pricing.valid_from or _ALWAYS[0],
        valid_until=pricing.valid_until or _ALWAYS[1],
    )


def _amounts(rates: Rates) -> tuple[Decimal, ...]:
    return rates.input, rates.output, rates.cache_read, rates.cache_write, rates.cache_write_1h, rates.reasoning


def _whole(amount: Decimal, digits: int) -> int:
    return int(amount.scaleb(digits, _EXACT))


def _usd(amount: int, digits: int, rounding: str) -> Decimal:
    return Decimal(amount).scaleb(-digits, _EXACT).quantize(NANO_USD, rounding, _EXACT)
