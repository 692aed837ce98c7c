"""Which model gets a job, going by what the fleet has learned in its stage?

One of those that compete (``contest``) is drawn; all others stay behind it as fallbacks, in static order. It all
comes from the snapshot in memory, and what does not depend on the draw is kept until the snapshot is refreshed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from attune_worker.errors import NoCandidateError
from attune_worker.jobs import NANO_USD, Decision, Job, ModelTier
from attune_worker.models.choice import Scored
from attune_worker.models.contest import MAX_ARMS, Question, Weighed, bare, expected_usd, mean_input, rounded, weigh
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import FALLBACK, Candidates, candidates, estimate_tokens, must_serve
from attune_worker.models.task_types import get_tier_for_task, is_known_task
from attune_worker.settings import Settings, get_settings
from attune_worker.telemetry.snapshot import Snapshot
from attune_worker.telemetry.store import RETENTION_DAYS, Telemetry
from attune_worker.telemetry.views import Place, StageView, Traffic

MIN_OUTCOMES = 10
MAX_FAILED = 0.2
"""A stronger tier is recommended when more than this share of at least ``MIN_OUTCOMES`` newest outcomes failed."""

NEWEST = 20


@dataclass(frozen=True, slots=True)
class Ranking:
    """The models in the order in which they are to be asked, how the first one was chosen, and what was known then."""

    models: tuple[ModelInfo, ...]
    decision: Decision
    view: StageView = field(default_factory=StageView)


class AdaptiveModelRouter:
    """Chooses models by what the fleet has learned; safe for use from many threads.

    Nothing is asked of Redis for a stage that is in use: its view is kept fresh in the background.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        registry: Registry | None = None,
        telemetry: Telemetry | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        self._settings = settings or get_settings()
        self._registry = registry or Registry.from_settings(self._settings)
        self._telemetry = telemetry or Telemetry(self._settings)
        self._snapshot = snapshot or Snapshot(self._telemetry, self._settings.routing.refresh_seconds)

    def rank(
        self,
        job: Job,
        found: Candidates,
        random: Callable[[], float] | None = None,
        view: StageView | None = None,
    ) -> Ranking:
        """Return the models for one job, the one to ask first in front.

        ``random`` returns a number from 0 up to 1, and is asked once where there is something to draw; without it the
        best one is chosen. ``view`` is what is known of the job's stage (default: what this process has in memory).
        Raises ``NoCandidateError`` when ``found`` holds no model, or none that meets what the job asks for and the job
        wants no best effort.
        """
        models = must_serve(found)
        question = self._question(job, models)
        view = view or self._snapshot.view(question.workflow, question.stage)
        if job.model is not None:
            return Ranking(models, _unweighed("pinned", question), view)
        if not self._settings.routing.adaptive or view.empty:
            return Ranking(models, _unweighed("static", question), view)
        weighed = weigh(view, question)
        if weighed.best_effort and not job.best_effort:
            raise NoCandidateError(_nobody_meets(question, weighed))
        ordered, decision = weighed.chosen(_draw(weighed.choice.scored, weighed.choice.best, random))
        return Ranking(ordered if job.best_effort else _without(weighed.slow, ordered), decision, view)

    def get_best_model(
        self,
        workflow: str,
        stage: str,
        max_cost: Decimal | float | None = None,
        max_latency_ms: int | None = None,
        min_success_rate: float = 0.8,
    ) -> str:
        """Return the id of the model that the rule holds best; nothing is drawn, so it never explores.

        ``max_cost`` is in USD for one call of the stage's usual length, ``max_latency_ms`` bounds the 95th
        percentile, ``min_success_rate`` runs from 0 to 1. Where no model meets all of it, the best effort is
        returned; ``explain`` says what is missing. Raises ``NoCandidateError`` when there is no model at all.
        """
        decision = self.explain(workflow, stage, max_cost, max_latency_ms, min_success_rate)
        return decision.candidates[decision.chosen].model_id

    def explain(
        self,
        workflow: str,
        stage: str,
        max_cost: Decimal | float | None = None,
        max_latency_ms: int | None = None,
        min_success_rate: float | None = None,
    ) -> Decision:
        """Return the decision for a job of this stage, with every model and why it was not chosen.

        Read afresh from Redis, without a draw: ``chosen`` is the best one, and each candidate has the probability
        that a job's draw would give it. ``min_success_rate`` defaults to the configured one. Raises
        ``NoCandidateError`` when no model may serve at all.
        """
        view = self._telemetry.view(workflow, stage)
        tier = self._tier_in_use(view, stage)
        found = self._found(workflow, stage, tier)
        all_models, tokens = must_serve(found), mean_input(view)
        affordable, dear = _by_cost(view, all_models, tokens, None if max_cost is None else float(max_cost))
        if fits := bool(affordable):
            considered = affordable
        else:  # the one that comes closest
            costs = {model: _usual_usd(view, model, tokens) for model in all_models}
            known = {model: usd for model, usd in costs.items() if usd is not None}
            considered = (min(known, key=known.__getitem__),) if known else all_models[:1]
        question = Question(
            workflow=workflow,
            stage=stage,
            models=considered,
            tier=tier,
            only_tier=None,
            only_provider=None,
            floor=self._floor(min_success_rate),
            max_latency_ms=max_latency_ms,
            input_tokens=tokens,
            exploration=self._settings.routing.exploration,
        )
        decision = self._best(view, question)
        dropped = [*found.dropped, *((model, reason) for model, reason in dear if model not in considered)]
        seen = (*decision.candidates, *(bare(model, reason) for model, reason in dropped))
        best_effort = decision.best_effort or not fits
        return decision.model_copy(update={"candidates": seen, "best_effort": best_effort})

    def _best(self, view: StageView, question: Question) -> Decision:
        """Return the decision without a draw; those that do not compete are candidates too."""
        if view.empty or not self._settings.routing.adaptive:
            return _unweighed("static", question, most=None)
        weighed = weigh(view, question)
        _, decision = weighed.chosen(weighed.choice.best)
        outside = _without((*weighed.arms, *weighed.slow), question.models)
        named = (bare(model, "a fallback only: no history here") for model in outside)
        return decision.model_copy(update={"candidates": (*decision.candidates, *named)})

    def get_routing_stats(self, workflow: str, stage: str | None = None, days: int = 7) -> dict[str, Any]:
        """Return how a workflow's calls went in the last ``days`` (1 to 35), in total and for each model.

        The keys are ``workflow``, ``stage``, ``days_analyzed``, ``models_used``, ``performance_by_model``,
        ``total_calls``, ``avg_cost`` (USD, of the calls whose cost is known; None: of none it is) and
        ``avg_success_rate``. Raises ``ValueError`` for any other ``days``, ``ServiceUnavailableError`` when Redis is
        away.
        """
        if not 1 <= days <= RETENTION_DAYS:
            raise ValueError(f"days: {days} is not allowed; it should be 1 to {RETENTION_DAYS}")
        traffic = self._telemetry.stats(workflow, stage, days)
        names = _names(traffic)
        total = Traffic.total(traffic.values())
        return {
            "workflow": workflow,
            "stage": stage,
            "days_analyzed": days,
            "models_used": sorted(names.values()),
            "performance_by_model": {names[ref]: _performance(traffic[ref]) for ref in sorted(names)},
            "total_calls": total.calls,
            "avg_cost": total.avg_cost_usd if total.calls else Decimal(0),
            "avg_success_rate": total.success_rate or 0.0,
        }

    def recommend_tier_upgrade(self, workflow: str, stage: str) -> tuple[bool, str]:
        """Return whether the stage should use a stronger tier than it does now, and why.

        It should when more than 20 % of its newest 20 outcomes failed, of at least 10.
        """
        view = self._telemetry.view(workflow, stage)
        tier = self._tier_in_use(view, stage)
        outcomes = self._newest(view.stage, tier)
        if len(outcomes) < MIN_OUTCOMES:
            return False, (
                f"only {len(outcomes)} outcomes of {tier} models are known in {workflow}/{stage}; "
                f"{MIN_OUTCOMES} are needed"
            )
        failed = outcomes.count("0")
        said = (
            f"{failed} of the newest {len(outcomes)} outcomes of {tier} models failed ({failed / len(outcomes):.0%}; "
            f"up to {MAX_FAILED:.0%} is fine)"
        )
        if failed <= MAX_FAILED * len(outcomes):
            return False, said
        if tier is ModelTier.PREMIUM:
            return False, f"{said}, but there is no stronger tier than {tier}"
        return True, f"{said}: use {FALLBACK[tier][1]}"

    def close(self) -> None:
        """End the background thread and give connections back."""
        self._snapshot.close()
        self._telemetry.close()

    def _question(self, job: Job, models: tuple[ModelInfo, ...]) -> Question:
        workflow, stage = place_of(job)
        return Question(
            workflow=workflow,
            stage=stage,
            models=models,
            tier=job.tier_hint or get_tier_for_task(job.task_type),
            only_tier=job.tier_hint,
            only_provider=job.provider_hint,
            floor=self._floor(job.min_success_rate),
            max_latency_ms=job.max_latency_ms,
            input_tokens=rounded(estimate_tokens(job.text_bytes)),
            exploration=self._settings.routing.exploration,
        )

    def _floor(self, given: float | None) -> float:
        return self._settings.routing.min_success_rate if given is None else given

    def _found(self, workflow: str, stage: str, tier: ModelTier) -> Candidates:
        """Return who may serve a job of a stage; without any key here, the workers are taken to have them."""
        job = Job.parse({"task_type": stage, "prompt": "?", "workflow": workflow, "tier_hint": tier})
        usable = {name for name, provider in self._settings.providers.items() if provider.usable()}

        def obstacle(model: ModelInfo) -> str | None:
            return None if not usable or model.provider in usable else "has no API key"

        return candidates(job, self._registry, self._settings.default_max_tokens, obstacle)

    def _tier_in_use(self, view: StageView, stage: str) -> ModelTier:
        """Return the tier of most of the stage's outcomes; without any, the one that its name stands for."""
        weights: dict[ModelTier, float] = {}
        for model in self._registry.all():
            weights[model.tier] = weights.get(model.tier, 0.0) + view.stage.of(model.ref).weight
        tier = max(weights, key=lambda one: weights[one], default=ModelTier.CAPABLE)
        if weights.get(tier):
            return tier
        return get_tier_for_task(stage) if is_known_task(stage) else ModelTier.CAPABLE

    def _newest(self, place: Place, tier: ModelTier) -> str:
        """Return the newest outcomes of a tier's models, in turns where several models share its jobs."""
        found = [place.of(model.ref) for model in self._registry.of_tier(tier)]
        rings = [one.recent[::-1] for one in found if one.weight >= 0.5] or [one.recent[::-1] for one in found]
        turns = [ring[place] for place in range(NEWEST) for ring in rings if place < len(ring)]
        return "".join(turns[:NEWEST])


def place_of(job: Job) -> tuple[str, str]:
    """Return the workflow and stage that a job's calls count for; without a stage, its task type is one."""
    return job.workflow, job.stage or job.task_type


@lru_cache(maxsize=1024)
def _unweighed(rule: Literal["pinned", "static"], question: Question, most: int | None = MAX_ARMS) -> Decision:
    """Return the decision for the first model, as nothing was weighed; it names ``most`` models, None: all."""
    shown = [bare(model, f"comes later in the {rule} order") for model in question.models[:most]]
    shown[0] = shown[0].model_copy(update={"probability": 1.0, "verdict": "chosen"})
    return Decision(
        rule=rule, workflow=question.workflow, stage=question.stage, floor=question.floor, candidates=tuple(shown)
    )


def _by_cost(
    view: StageView, models: tuple[ModelInfo, ...], tokens: int, limit_usd: float | None
) -> tuple[tuple[ModelInfo, ...], list[tuple[ModelInfo, str]]]:
    """Part the models whose calls cost up to ``limit_usd`` from the others, with the reason for those."""
    kept, dear = [], []
    for model in models:
        usd = _usual_usd(view, model, tokens)
        if limit_usd is None or (usd is not None and usd <= limit_usd):
            kept.append(model)
        else:
            reason = "its price is unknown" if usd is None else f"a call costs about ${usd:.6f}"
            dear.append((model, f"{reason}; max_cost is ${limit_usd:g}"))
    return tuple(kept), dear


def _usual_usd(view: StageView, model: ModelInfo, tokens: int) -> float | None:
    """Return what a call costs in this stage, or should cost where it has made none; None: the price is unknown."""
    usual = view.stage.of(model.ref).mean_cost_nano
    return usual / 1e9 if usual is not None else expected_usd(view, model, tokens)


def _draw(scored: Sequence[Scored], best: int, random: Callable[[], float] | None) -> int:
    if random is None or scored[best].probability >= 1:
        return best
    left = random()
    for place, one in enumerate(scored):
        left -= one.probability
        if left < 0:
            return place
    return best  # the probabilities add up to 1 but for rounding


def _without(left_out: Sequence[ModelInfo], models: tuple[ModelInfo, ...]) -> tuple[ModelInfo, ...]:
    return models if not left_out else tuple(model for model in models if model not in left_out)


def _nobody_meets(question: Question, weighed: Weighed) -> str:
    wishes = f"min_success_rate {question.floor:g}"
    if question.max_latency_ms is not None:
        wishes += f" and max_latency_ms {question.max_latency_ms}"
    reasons = "; ".join(f"{one.provider}/{one.model_id}: {one.verdict}" for one in weighed.candidates)
    return f"no model meets {wishes} in {question.workflow}/{question.stage}: {reasons}"


def _names(refs: Iterable[str]) -> dict[str, str]:
    """Return the name to show for each ``provider/id``: the id, unless several providers serve it."""
    ids = {ref: ref.partition("/")[2] or ref for ref in refs}
    often = Counter(ids.values())
    return {ref: model_id if often[model_id] == 1 else ref for ref, model_id in ids.items()}


def _performance(traffic: Traffic) -> dict[str, Any]:
    return {
        "calls": traffic.calls,
        "success_rate": traffic.success_rate,
        "avg_cost": traffic.avg_cost_usd,
        "total_cost": traffic.cost_nano * NANO_USD,
        "unpriced_calls": traffic.unpriced,
        "avg_latency_ms": traffic.avg_latency_ms,
        "p95_latency_ms": traffic.p95_latency_ms,
        "avg_score": traffic.avg_score,
        "scored_calls": traffic.scored,
    }
