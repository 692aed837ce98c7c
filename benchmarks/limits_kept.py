"""Do fifty callers at once go over a hard budget, or over a rate limit, and by how much?"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any
from uuid import uuid4

import httpx
from crew import Crew

from attune_worker.budget import Budgets
from attune_worker.jobs import NANO_USD, Job
from attune_worker.models.admission import Admission
from attune_worker.models.calls import Outcome, Permit, Quote, Refusal, Request
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.providers.base import HttpRequest
from attune_worker.providers.http import HttpSender
from attune_worker.sections import HttpSettings
from attune_worker.settings import Settings

CALLERS = 50
WORST_NANO = 10_000_000
"""The most that a call can cost in the race for the budget, one cent."""

REFUSALS = 5
"""After so many refusals in a row, with a moment between, a spender takes the budget to be used up."""

JOB = Job(task_type="summarize", prompt="word " * 100, max_tokens=256)
MINUTE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What the callers spent together of a hard budget, as they and as Redis counted it, in USD."""

    callers: int
    calls: int
    limit_usd: Decimal
    spent_usd: Decimal
    counted_usd: Decimal

    @property
    def overshoot_usd(self) -> Decimal:
        """What was spent beyond the limit."""
        return max(self.spent_usd - self.limit_usd, Decimal(0))


@dataclass(frozen=True, slots=True)
class Rate:
    """The most calls that any window saw, by the time of their admission and of their arrival at the provider."""

    callers: int
    calls: int
    requests_per_minute: int
    window_seconds: float
    allowed: int
    most_admitted: int
    most_arrived: int

    @property
    def overshoot(self) -> int:
        """Calls admitted beyond what a window may see."""
        return max(self.most_admitted - self.allowed, 0)


def fields(redis_url: str, namespace: str, provider_url: str, **provider: Any) -> dict[str, Any]:
    """Return settings with two models of one provider; ``provider`` holds its limits."""
    place = {"kind": "openai", "base_url": f"{provider_url}/v1", "api_key": "a-key-of-the-benchmark", **provider}
    return {
        "redis_url": redis_url,
        "namespace": namespace,
        "providers": {"sim": place},
        "provider_order": ["sim"],
        "models": [{"id": name, "provider": "sim", "tier": "cheap"} for name in ("small", "large")],
    }


def models(settings: Settings) -> list[ModelInfo]:
    """Return the models that these settings add."""
    return [model for model in Registry.from_settings(settings).all() if model.provider == "sim"]


def request(candidates: Sequence[ModelInfo], worst_usd: Decimal | None) -> Request:
    """Return a call that is wanted to any of the candidates."""
    quotes = tuple(Quote(model, 400, worst_usd) for model in candidates)
    return Request(uuid4().hex, "", JOB, quotes)


def spend(admission: Admission, settings: Settings, ends: float) -> list[int]:
    """Call until the budget has no room; return what each call cost in nano-USD, at worst where it is not known."""
    candidates, spent, refused = models(settings), list[int](), 0
    while refused < REFUSALS and time.monotonic() < ends:
        verdict = admission.admit(request(candidates, WORST_NANO * NANO_USD))
        if isinstance(verdict, Refusal):
            refused += 1
            time.sleep(0.005)
            continue
        refused = 0
        if random.random() < 0.05:
            admission.settle(verdict, Outcome.released())
            continue
        cost_nano = random.randint(0, WORST_NANO) if random.random() < 0.9 else None
        cost_usd = None if cost_nano is None else cost_nano * NANO_USD
        admission.settle(verdict, Outcome("succeeded", "success", 10, cost_usd, 100, 100))
        spent.append(WORST_NANO if cost_nano is None else cost_nano)
    return spent


def race_for_budget(crew: Crew, redis_url: str, limit_usd: Decimal, seconds: float) -> Spent:
    """Let the callers spend until the budget is used up, or the time is."""
    given = fields(redis_url, "budget", "http://127.0.0.1:9")
    given["budgets"] = [{"per": "month", "limit_usd": str(limit_usd), "hard": True}]
    shift = crew.work(spend, given, CALLERS, seconds)
    budgets = Budgets(Settings(**given))
    [status] = budgets.status()
    spent_usd = sum(shift.seen) * NANO_USD
    return Spent(CALLERS, len(shift.seen), limit_usd, spent_usd, status.spent_usd + status.reserved_usd)


def keep_calling(admission: Admission, settings: Settings, ends: float) -> list[int]:
    """Call the provider as often as it is allowed; return when each call was admitted (ms, Redis' time)."""
    candidates, admitted = models(settings)[:1], []
    base_url = settings.providers["sim"].base_url
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "a few words"}], "max_tokens": 5})
    headers = {"content-type": "application/json", "authorization": "Bearer a-key-of-the-benchmark"}
    while (left_seconds := ends - time.monotonic()) > 0:
        verdict = admission.admit(request(candidates, None))
        if isinstance(verdict, Permit):
            response = _sender(settings.http).send(
                HttpRequest(f"{base_url}/chat/completions", headers, body.encode()), 60
            )
            assert response.status == 200, response.body
            admission.settle(verdict, Outcome("succeeded", "success", 10, None, 10, 10))
            admitted.append(verdict.admitted_ms)
        else:
            time.sleep(min(verdict.retry_after_seconds, left_seconds))
    return admitted


def hold_the_rate(crew: Crew, redis_url: str, provider_url: str, per_minute: int, seconds: float) -> Rate:
    """Let the callers call for a while; a window is a minute where the time allows that, else a third of it."""
    given = fields(redis_url, "rate", provider_url, requests_per_minute=per_minute)
    shift = crew.work(keep_calling, given, CALLERS, seconds)
    arrived = httpx.get(f"{provider_url}/_sim/requests", timeout=60).raise_for_status().json()["requests"]
    window_seconds = MINUTE_SECONDS if seconds > MINUTE_SECONDS else seconds / 3
    return Rate(
        CALLERS,
        len(shift.seen),
        per_minute,
        window_seconds,
        allowed_in(window_seconds, per_minute, Settings(**given).limits.burst_seconds),
        most_in([at_ms / 1000 for at_ms in shift.seen], window_seconds),
        most_in([one["time"] for one in arrived], window_seconds),
    )


def allowed_in(window_seconds: float, per_minute: int, burst_seconds: float) -> int:
    """Return the most that any window may see: the full bucket, and what comes back meanwhile (see limits.lua)."""
    unit_seconds = (MINUTE_SECONDS + burst_seconds) / per_minute
    return int((max(burst_seconds, unit_seconds) + window_seconds) / unit_seconds + 1e-9)


def most_in(times: Sequence[float], window_seconds: float) -> int:
    """Return the most events that lie within less than ``window_seconds``."""
    ordered = sorted(times)
    most, first = 0, 0
    for last, at in enumerate(ordered):
        while at - ordered[first] >= window_seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


@cache
def _sender(settings: HttpSettings) -> HttpSender:
    return HttpSender(settings)
