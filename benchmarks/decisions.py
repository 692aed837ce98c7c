"""How long does the router take to choose, when little and when much is known?

The history is written by SETTLE itself, once for every call, in pipelines; calls vary in model, outcome, latency and
cost. Its records of single calls expire at once, so that a million of them fit.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import median
from typing import Any

from attune_worker.jobs import Job
from attune_worker.models.adaptive import AdaptiveModelRouter
from attune_worker.models.admission import SETTLE, Admission
from attune_worker.models.calls import Outcome, Permit, Quote
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import candidates
from attune_worker.models.settle_wire import Settlement
from attune_worker.settings import Settings
from attune_worker.store.connection import connect
from attune_worker.telemetry.snapshot import Snapshot
from attune_worker.telemetry.store import Telemetry

CANDIDATES = 6
PIPELINE = 500
VARIETY = 50
"""Different calls per model; each is settled many times, under ids of its own."""

NEVER_SECONDS = 3600.0
PROMPTS = tuple("word " * length for length in range(20, 220))


@dataclass(frozen=True, slots=True)
class Decisions:
    """Time of a decision in microseconds: the median, and the median of the first ones after a refresh."""

    calls: int
    candidates: int
    kept_us: float
    fresh_us: float


def decision_fields(redis_url: str) -> dict[str, Any]:
    """Return settings with six models of one provider."""
    prices = {"output_cost_per_million": "5"}
    return {
        "redis_url": redis_url,
        "namespace": "decisions",
        "retention_seconds": 1,
        "providers": {"sim": {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "api_key": "none"}},
        "provider_order": ["sim"],
        "models": [
            {"id": f"model-{n}", "provider": "sim", "tier": "capable", "input_cost_per_million": str(n + 1), **prices}
            for n in range(CANDIDATES)
        ],
        "routing": {"refresh_seconds": NEVER_SECONDS},
    }


def learn(settings: Settings, calls: int) -> None:
    """Settle that many calls."""
    models = [model for model in Registry.from_settings(settings).all() if model.provider == "sim"]
    admission, redis = Admission(settings), connect(settings)
    templates = [_settlement(admission, model, number) for model in models for number in range(VARIETY)]
    made = 0
    while made < calls:
        share = min(PIPELINE, calls - made)
        picks = random.choices(templates, k=share)
        SETTLE.many(redis, [_renamed(*pick, f"call-{made + place}") for place, pick in enumerate(picks)])
        made += share
    admission.close()
    redis.close()


def measure_decisions(settings: Settings, calls: int, turns: int) -> Decisions:
    """Rank the candidates for ``turns`` jobs of different lengths, from a snapshot that nobody refreshes meanwhile."""
    registry = Registry.from_settings(settings)
    telemetry = Telemetry(settings)
    snapshot = Snapshot(telemetry, NEVER_SECONDS)
    router = AdaptiveModelRouter(settings, registry, telemetry, snapshot)
    kept = [_seconds_each(router, registry, settings, 100) for _ in range(max(turns // 100, 1))]
    fresh = []
    for _ in range(max(turns // 100, 1)):
        snapshot.refresh()
        fresh.append(_seconds_each(router, registry, settings, 1))
    router.close()
    return Decisions(calls, CANDIDATES, median(kept) * 1e6, median(fresh) * 1e6)


def _seconds_each(router: AdaptiveModelRouter, registry: Registry, settings: Settings, turns: int) -> float:
    """Return the mean time of so many decisions in a row, each for a job of its own."""
    asked = [(job, candidates(job, registry, settings.default_max_tokens, _elsewhere)) for job in _jobs(turns)]
    gc.disable()  # as timeit does
    began = time.perf_counter()
    for job, found in asked:
        ranking = router.rank(job, found, random.random)
    seconds = time.perf_counter() - began
    gc.enable()
    assert len(ranking.models) == CANDIDATES
    assert ranking.decision.rule == "adaptive"
    return seconds / turns


def _jobs(count: int) -> Iterator[Job]:
    for _ in range(count):
        yield Job(task_type="fix_bug", prompt=random.choice(PROMPTS))


def _elsewhere(model: ModelInfo) -> str | None:
    return None if model.provider == "sim" else "is not asked here"


def _settlement(admission: Admission, model: ModelInfo, number: int) -> Settlement:
    """Return the SETTLE of a call, as a worker would send it."""
    draw = random.Random(number)
    job = Job(task_type="fix_bug", prompt=PROMPTS[0])
    latency_ms, cost_usd = draw.randrange(200, 5000), Decimal(draw.randrange(1000, 9000)) / 10**6
    if draw.random() < 0.05:
        outcome = Outcome("failed", "failure", latency_ms, Decimal(0), 0, 0, "overloaded")
    else:
        outcome = Outcome("succeeded", "success", latency_ms, cost_usd, 200, draw.randrange(50, 800))
    permit = Permit("CALL-ID", job, Quote(model, 1000, cost_usd), (), round(time.time() * 1000))
    return admission._settle_wire.settle(permit, outcome, admission._now_ms())  # noqa: SLF001  # one round trip each: an hour


def _renamed(keys: list[str], texts: Sequence[str], call_id: str) -> tuple[list[str], list[str]]:
    return [keys[0].replace("CALL-ID", call_id), *keys[1:]], [text.replace("CALL-ID", call_id) for text in texts]
