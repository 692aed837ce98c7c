"""Why is there no leave for a call, and from when on may there be? ADMIT's refusals, in words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from attune_worker.budget import BudgetKey, usd_of
from attune_worker.models.calls import Charged, Quote, Refusal, Request

OF_CIRCUITS = {b"open", b"probing", b"forced_open"}
"""Refusals that this process goes by, too, when Redis goes away."""

WHY = {
    b"lease": "the lease of its worker is lost",
    b"open": "its circuit is open",
    b"probing": "its circuit is half-open, and another call probes it",
    b"forced_open": "an operator has opened its circuit",
    b"cooldown": "its provider asked to be left alone",
    b"provider_limit": "its provider's rate limit is used up",
    b"requests_per_minute": "requests_per_minute is used up",
    b"tokens_per_minute": "tokens_per_minute is used up",
    b"concurrency": "all of its provider's slots are taken",
    b"credential_refused": "its provider does not accept this key at the moment; it is tried again from time to time",
    b"quota_used_up": "the subscription's quota is used up",
    b"quota_paced": "the subscription's quota is spread evenly until it is back",
    b"quota_reserved": "calls under way hold what the subscription's quota has left",
    b"quota_unknown": "another call finds out what the subscription's quota has left",
    b"budget_reserved": "calls under way have reserved what a hard budget has left",
}


def refusal_of(request: Request, charged: Charged, now_ms: int, refusals: Sequence[Sequence[Any]]) -> Refusal:
    """Return the soonest wait among the refusals; where money is what every candidate lacks, the first one's."""
    waits = [
        (at, f"{quote.name}: {WHY.get(why, why.decode())}")
        for quote, (kind, at, why, *_) in zip(request.quotes, refusals, strict=True)
        if kind == b"wait"
    ]
    if waits:
        at, reason = min(waits, key=lambda wait: wait[0])
        return Refusal(reason, max(0.001, (int(at) - now_ms) / 1000))
    quote, refusal = request.quotes[0], refusals[0]
    at, place = int(refusal[1]), refusal[4]
    reason = without_money(quote, charged[0][place], refusal)
    after_seconds = 0.0 if refusal[2] == b"unknown_price" else max(0.001, (at - now_ms) / 1000)
    return Refusal(reason, after_seconds, for_budget=True)


def without_money(quote: Quote, budget: BudgetKey, refusal: Sequence[Any]) -> str:
    """Say why a hard budget has no room for a call, by ADMIT's refusal."""
    _, at, why, left_nano, _ = refusal
    if why == b"unknown_price":
        return f"the price of {quote.model.ref} is unknown, and the hard budget {_scope(budget)} allows no such call"
    resets_at = datetime.fromtimestamp(int(at) / 1000, UTC)
    left_usd = max(usd_of(int(left_nano)), Decimal(0))
    hint = ", too small even then: a smaller max_tokens helps" if why == b"budget_too_small" else ""
    return (
        f"the hard budget {_scope(budget)} has ${left_usd:f} left and this job needs up to "
        f"${quote.worst_usd:f} on {quote.model.ref}; it starts anew at {resets_at:%Y-%m-%d %H:%M} UTC{hint}"
    )


def _scope(budget: BudgetKey) -> str:
    scope = [
        f"of {kind} {name!r}"
        for kind, name in (("tenant", budget.tenant), ("workflow", budget.workflow), ("provider", budget.provider))
        if name is not None
    ]
    return " ".join([f"per {budget.per}", *scope])
