"""Who competes for a job, at what cost and with what evidence, and what does the rule make of them?

Pure: from what is known of a stage and what the job asks for to the arms that ``choice`` weighs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache

from attune_worker.jobs import Candidate, Decision, ModelTier
from attune_worker.models.choice import Arm, Choice, Scored, choose
from attune_worker.models.pricing import plain_cost
from attune_worker.models.registry import ModelInfo
from attune_worker.models.routing import estimate_tokens
from attune_worker.models.sizing import basis
from attune_worker.telemetry.sizes import Sizes
from attune_worker.telemetry.views import NOTHING, StageView

MAX_ARMS = 8
"""How many models are weighed for a job: those with a history in its stage first."""

MIN_ANSWERS = 10
"""From how many answers on their 95th percentile says something about a model's latency."""

_TIER_RANK = {tier: rank for rank, tier in enumerate(ModelTier)}
_MAX_KEPT = 256
_PRICE_SECONDS = 60
_TYPICAL_PROMPT_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Question:
    """What a decision depends on, apart from what is known and the draw."""

    workflow: str
    stage: str
    models: tuple[ModelInfo, ...] = field(compare=False)
    tier: ModelTier
    only_tier: ModelTier | None
    only_provider: str | None
    floor: float
    max_latency_ms: int | None
    input_tokens: int
    exploration: float
    identity: tuple[int, ...] = field(init=False)
    """Stands for ``models`` when questions are compared: hashing twenty of them would take longer than the draw."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", tuple(map(id, self.models)))


@dataclass(frozen=True, slots=True)
class Weighed:
    """The arms with what the rule makes of them; ``candidates`` are the arms, then those that were too slow.

    ``decisions`` keeps, for each arm that was drawn so far, the order of the models and the decision.
    """

    question: Question
    arms: tuple[ModelInfo, ...]
    choice: Choice
    slow: tuple[ModelInfo, ...]
    candidates: tuple[Candidate, ...]
    best_effort: bool
    decisions: dict[int, tuple[tuple[ModelInfo, ...], Decision]] = field(default_factory=dict)

    def chosen(self, place: int) -> tuple[tuple[ModelInfo, ...], Decision]:
        """Return the order of the models when the arm at ``place`` was drawn, and the decision.

        Behind it come the best one, then the others in static order, then those that are too slow.
        """
        found = self.decisions.get(place)
        if found is None:
            found = self.decisions[place] = self._order(place), self._decision(place)
        return found

    def _order(self, place: int) -> tuple[ModelInfo, ...]:
        first = self.arms[place], self.arms[self.choice.best]
        others = [model for model in self.question.models if model not in self.slow]
        return tuple(dict.fromkeys([*first, *others, *self.slow]))

    def _decision(self, place: int) -> Decision:
        probability = self.choice.scored[place].probability
        return Decision(
            rule="adaptive",
            workflow=self.question.workflow,
            stage=self.question.stage,
            floor=self.question.floor,
            candidates=self.candidates,
            chosen=place,
            propensity=probability,
            explored=place != self.choice.best and probability <= self.question.exploration,  # more is a share
            best_effort=self.best_effort,
        )


def weigh(view: StageView, question: Question) -> Weighed:
    """Weigh, or remember what was weighed for the same question since the view was read."""
    weighed: Weighed | None = view.derived.get(question)
    if weighed is None:
        if len(view.derived) >= _MAX_KEPT:
            view.derived.clear()
        weighed = view.derived[question] = _weigh_afresh(view, question)
    return weighed


def _weigh_afresh(view: StageView, question: Question) -> Weighed:
    contenders = _contenders(view, question)
    slow = {model.ref: said for model in contenders if (said := _too_slow(view, model, question.max_latency_ms))}
    fast = [model for model in contenders if model.ref not in slow]
    competing = fast or contenders
    arms = _arms(view, question, competing)
    choice = choose(arms, question.floor, question.exploration)
    left_out = [model for model in contenders if model.ref in slow] if fast else []
    shown = [_candidate(view, *pair) for pair in zip(competing, choice.scored, strict=True)]
    shown += [bare(model, slow[model.ref], view.stage.of(model.ref).calls) for model in left_out]
    best_effort = not (fast and choice.meets_floor)
    return Weighed(question, tuple(competing), choice, tuple(left_out), tuple(shown), best_effort)


def _contenders(view: StageView, question: Question) -> list[ModelInfo]:
    """Return the models that compete, in static order.

    A hint narrows the field where it leaves one. A model below the job's tier is there only if it has a history
    in this stage, or if somebody judges the answers: else nothing would say that it is not good enough.
    """
    models: Sequence[ModelInfo] = question.models
    if question.only_tier is not None:
        models = [model for model in models if model.tier is question.only_tier] or models
    if question.only_provider is not None:
        models = [model for model in models if model.provider == question.only_provider] or models
    judged = view.judged
    known = [model for model in models if judged or _has_a_place(view, question, model)] or models
    first = set(sorted(known, key=lambda model: view.stage.of(model.ref).calls == 0)[:MAX_ARMS])
    return [model for model in known if model in first]


def _has_a_place(view: StageView, question: Question, model: ModelInfo) -> bool:
    return not _below(question, model) or view.stage.of(model.ref).calls > 0


def _below(question: Question, model: ModelInfo) -> bool:
    return _TIER_RANK[model.tier] < _TIER_RANK[question.tier]


def _too_slow(view: StageView, model: ModelInfo, max_latency_ms: int | None) -> str | None:
    p95, answers = view.p95_ms.get(model.ref, (0, 0))
    if max_latency_ms is None or answers < MIN_ANSWERS or p95 <= max_latency_ms:
        return None
    return f"too slow: 95 of 100 answers take up to {p95} ms, over max_latency_ms"


def _arms(view: StageView, question: Question, models: Sequence[ModelInfo]) -> list[Arm]:
    usd = [expected_usd(view, model, question.input_tokens) for model in models]
    known = [one for one in usd if one is not None]
    static = next((model for model in question.models if model in models), None)
    arms = []
    for model, price in zip(models, usd, strict=True):
        stage = view.stage.of(model.ref)
        below = _below(question, model)
        elsewhere = not below or stage.calls > 0  # what a weak model did elsewhere says nothing about this stage
        arms.append(
            Arm(
                ref=model.ref,
                cost=_stand_in(known, model) if price is None else price,
                tier_rank=_TIER_RANK[model.tier],
                is_static=model is static,
                stage=stage,
                workflow=view.workflow.of(model.ref) if elsewhere else NOTHING,
                fleet=view.fleet.of(model.ref) if elsewhere else NOTHING,
                may_explore=view.judged or not below,
            )
        )
    return arms


def _stand_in(known: Sequence[float], model: ModelInfo) -> float:
    """Return a cost to rank a model by whose price is unknown: that of the dearest, else one that its tier suggests."""
    return max(known, default=0.0001 * 10.0 ** _TIER_RANK[model.tier])


def expected_usd(view: StageView, model: ModelInfo, input_tokens: int) -> float | None:
    """Return what a call should cost in USD, its answer being as long as those before it; None: price unknown.

    A float is enough to compare models by.
    """
    output_tokens = round(basis(view, model.ref).output_tokens)
    return _usd(model, input_tokens, output_tokens, int(time.time() // _PRICE_SECONDS))


@lru_cache(maxsize=1024)
def _usd(model: ModelInfo, input_tokens: int, output_tokens: int, minute: int) -> float | None:  # noqa: ARG001
    """Return the price of such a call, looked up again every minute: prices change with the date and the hour."""
    price = plain_cost(model, input_tokens, output_tokens)
    return None if price is None else float(price)


def mean_input(view: StageView) -> int:
    """Return the usual length of the stage's prompts, in tokens."""
    seen = Sizes.total(view.stage.sizes.values())
    return rounded(round(seen.mean_input) if seen.usable else estimate_tokens(_TYPICAL_PROMPT_BYTES))


def rounded(tokens: int) -> int:
    """Return ``tokens`` to three binary digits, so that prompts of about one length are one question."""
    shift = max(0, tokens.bit_length() - 3)
    return tokens >> shift << shift


def _candidate(view: StageView, model: ModelInfo, scored: Scored) -> Candidate:
    return Candidate(
        model_id=model.id,
        provider=model.provider,
        tier=model.tier,
        probability=round(scored.probability, 4),
        expected_success=round(scored.mean, 4),
        lower=round(scored.lower, 4),
        upper=round(scored.upper, 4),
        expected_cost_usd=Decimal(f"{scored.arm.cost:.9f}"),
        calls=view.stage.of(model.ref).calls,
        verdict=scored.verdict,
    )


def bare(model: ModelInfo, verdict: str, calls: int = 0) -> Candidate:
    """Return a candidate that was not weighed."""
    return Candidate(model_id=model.id, provider=model.provider, tier=model.tier, calls=calls, verdict=verdict)
