"""What did the calls cost, according to the provider? The other side's account, to hold ours against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from threading import Lock
from typing import Any

import genai_prices

from attune_worker.simulator.profile import Price
from attune_worker.simulator.wire import Tokens

NANO_USD = Decimal("1e-9")
TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True, slots=True)
class BilledCall:
    """A call whose model ran.

    ``outcome`` is ``succeeded``, ``abandoned`` (the caller left before the answer), or the fault that
    kept the answer from arriving. ``requested_model`` is what the caller named, ``model`` what
    answered; ``price`` is the profile's own, if any. ``client_request_id`` is the caller's own id of the call,
    from its ``x-client-request-id``. ``key`` names the key, not in full; a ``subscription`` has paid with its quota,
    so that the call costs nothing.
    """

    id: str
    request_id: str
    time: float
    wire: str
    requested_model: str
    model: str
    outcome: str
    tokens: Tokens
    price: Price | None = None
    client_request_id: str | None = None
    key: str | None = None
    subscription: bool = False


class Invoice:
    """All billed calls since the start or the last reset.

    Adding a call only appends it. Pricing takes about 150 µs a call, so it waits until somebody
    reads, and each call is priced once. Reading is safe from any thread.
    """

    def __init__(self) -> None:
        self._calls: list[BilledCall] = []
        self._costs: list[Decimal | None] = []
        self._lock = Lock()

    def add(self, call: BilledCall) -> None:
        """Bill a call."""
        self._calls.append(call)

    def report(self, *, summary: bool = False) -> dict[str, Any]:
        """Return count and exact total, of all and by key, and the calls (not in the ``summary``), as JSON values.

        Calls without a known price are counted as ``unpriced`` and add nothing to the total.
        """
        with self._lock:
            for call in self._calls[len(self._costs) :]:
                self._costs.append(cost_of(call))
            costs = tuple(self._costs)
        billed = list(zip(self._calls, costs, strict=False))
        keys: dict[tuple[str | None, bool], list[Decimal | None]] = defaultdict(list)
        for call, cost in billed:
            keys[call.key, call.subscription].append(cost)
        report = {
            **_totals(costs),
            "by_key": [
                {"key": key, "auth_mode": _mode(subscription), **_totals(own)}
                for (key, subscription), own in keys.items()
            ],
        }
        if not summary:
            report["calls"] = [_line(call, cost) for call, cost in billed]
        return report


def _totals(costs: Sequence[Decimal | None]) -> dict[str, Any]:
    known = [cost for cost in costs if cost is not None]
    total = sum(known, Decimal(0)).quantize(NANO_USD)
    return {"count": len(costs), "total_usd": format(total, "f"), "unpriced": len(costs) - len(known)}


def _mode(subscription: bool) -> str:
    return "subscription" if subscription else "api"


def cost_of(call: BilledCall) -> Decimal | None:
    """Return what the provider charges for a call, in USD to the nano-dollar; None where no price is known."""
    if call.subscription:
        return Decimal(0).quantize(NANO_USD)
    exact = _own_cost(call.tokens, call.price) if call.price else _listed_cost(call)
    return None if exact is None else exact.quantize(NANO_USD, ROUND_HALF_EVEN)


def _own_cost(tokens: Tokens, price: Price) -> Decimal:
    read_usd = price.input_usd if price.cache_read_usd is None else price.cache_read_usd
    write_usd = price.input_usd if price.cache_write_usd is None else price.cache_write_usd
    fresh = tokens.input - tokens.cache_read - tokens.cache_write
    millionths = (
        fresh * price.input_usd
        + tokens.cache_read * read_usd
        + tokens.cache_write * write_usd
        + tokens.output * price.output_usd
    )
    return millionths / TOKENS_PER_PRICE


def _listed_cost(call: BilledCall) -> Decimal | None:
    """Price a call from the library alone, which finds the provider by the model, as of the call's time."""
    tokens = call.tokens
    usage = genai_prices.Usage(
        input_tokens=tokens.input,
        output_tokens=tokens.output,
        cache_read_tokens=tokens.cache_read or None,
        cache_write_tokens=tokens.cache_write or None,
        cache_write_1h_tokens=tokens.cache_write_1h or None,
    )
    moment = datetime.fromtimestamp(call.time, UTC)
    try:
        return genai_prices.calc_price(usage, call.model, genai_request_timestamp=moment).total_price
    except LookupError:
        return None


def _line(call: BilledCall, cost: Decimal | None) -> dict[str, Any]:
    tokens = call.tokens
    return {
        "id": call.id,
        "request_id": call.request_id,
        "client_request_id": call.client_request_id,
        "time": call.time,
        "wire": call.wire,
        "key": call.key,
        "auth_mode": _mode(call.subscription),
        "requested_model": call.requested_model,
        "model": call.model,
        "outcome": call.outcome,
        "usage": {
            "input_tokens": tokens.input,
            "output_tokens": tokens.output,
            "cache_read_tokens": tokens.cache_read,
            "cache_write_tokens": tokens.cache_write,
            "cache_write_1h_tokens": tokens.cache_write_1h,
        },
        "cost_usd": None if cost is None else format(cost, "f"),
    }
