"""How does a rule do in a world: what does it achieve, what does it spend, and by how much does it miss the floor?

**Shortfall** of a stage is ``max(0, min(floor, best) - achieved)``: ``achieved`` is the mean score of its requests in
the run, ``best`` the mean score that the best single model would have had on the same requests. The shortfall of
a run is the mean over stages, weighted by their requests. In a world that changes, each phase of a stage counts
as a stage of its own: what was achieved before a model broke does not make up for what came after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from rules import Contender
from worlds import Request, World

from attune_worker.models.choice import Arm
from attune_worker.telemetry.evidence import HALF_LIFE, Evidence

NOTHING = Evidence()
NANO = 1e9


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to; ``cost`` is a share of always-premium's, ``trace`` the (score, cost) of each request."""

    success: float
    cost: float
    shortfall: float
    trace: tuple[tuple[float, float], ...] = field(default=(), repr=False)


class _Place:
    """A stage, the workflow or the fleet, with the evidence of each model."""

    def __init__(self, level: str, models: int) -> None:
        self._half_life = HALF_LIFE[level]
        self._seen = 0
        self._evidence = [NOTHING] * models

    def of(self, model: int) -> Evidence:
        return self._evidence[model].at(self._seen, self._half_life)

    def observe(self, model: int, score: float, usd: float) -> None:
        self._seen += 1
        before = self._evidence[model]
        self._evidence[model] = before.observed(self._seen, self._half_life, score, usd * NANO)


class _Fleet:
    """Everything that is known, as the workers would know it."""

    def __init__(self, world: World) -> None:
        self._models = len(world.models)
        self._stages: dict[str, _Place] = {}
        self._workflow = _Place("workflow", self._models)
        self._fleet = _Place("fleet", self._models)

    def arms(self, world: World, request: Request, static: int) -> tuple[list[int], list[Arm]]:
        stage = self._stage(request.stage)
        there = [place for place in range(self._models) if request.cost[place] is not None]
        return there, [
            Arm(
                ref=world.models[place].name,
                cost=request.expected_cost[place],
                tier_rank=world.models[place].tier,
                is_static=place == static,
                stage=stage.of(place),
                workflow=self._workflow.of(place),
                fleet=self._fleet.of(place),
            )
            for place in there
        ]

    def observe(self, request: Request, model: int) -> None:
        for place in (self._stage(request.stage), self._workflow, self._fleet):
            place.observe(model, request.scores[model], request.cost[model] or 0.0)

    def _stage(self, name: str) -> _Place:
        if name not in self._stages:
            self._stages[name] = _Place("stage", self._models)
        return self._stages[name]


def simulate(world: World, contender: Contender, exploration: float, seed: int) -> Outcome:
    """Run one rule over one order of the requests; a warm one is measured on the second half."""
    requests, random, fleet = world.requests(seed), Random(f"rule {seed}"), _Fleet(world)
    if contender.warm:
        half = len(requests) // 2
        for request in requests[:half]:
            for model, cost in enumerate(request.cost):
                if cost is not None:
                    fleet.observe(request, model)
        requests = requests[half:]
    if contender.rule is None:
        return outcome(world, requests, _oracle(world, requests))
    static, chosen = (world.premium if contender.starts == "premium" else world.cheap), []
    for request in requests:
        there, arms = fleet.arms(world, request, static if request.cost[static] is not None else world.premium)
        model = _draw(there, contender.rule(arms, world.floor, exploration, random), random.random())
        fleet.observe(request, model)
        chosen.append(model)
    return outcome(world, requests, chosen)


def _draw(models: Sequence[int], probabilities: Sequence[float], number: float) -> int:
    for model, probability in zip(models, probabilities, strict=True):
        number -= probability
        if number < 0:
            return model
    return max(zip(probabilities, models, strict=True))[1]  # the probabilities add up to a hair less than 1


def outcome(world: World, requests: Sequence[Request], chosen: Sequence[int]) -> Outcome:
    """Return what was achieved and spent when these models answered these requests."""
    trace = [
        (request.scores[model], request.cost[model] or 0.0) for request, model in zip(requests, chosen, strict=True)
    ]
    lacking = 0.0
    for group in _grouped(requests).values():
        achieved = sum(trace[number][0] for number in group)
        best = max(_total_scores(world, [requests[number] for number in group]).values())
        lacking += max(0.0, min(world.floor * len(group), best) - achieved)
    dear = sum(request.cost[world.premium] or 0.0 for request in requests)
    spent = sum(cost for _, cost in trace)
    return Outcome(sum(score for score, _ in trace) / len(trace), spent / dear, lacking / len(trace), tuple(trace))


def _oracle(world: World, requests: Sequence[Request]) -> list[int]:
    """Return the best single model of each stage in hindsight: the cheapest that meets the floor, else the best."""
    chosen = [0] * len(requests)
    for group in _grouped(requests).values():
        scores = _total_scores(world, [requests[number] for number in group])
        meeting = [model for model, total in scores.items() if total >= world.floor * len(group)]
        cost = {model: sum(requests[number].cost[model] or 0.0 for number in group) for model in scores}
        best = min(meeting, key=lambda model: cost[model]) if meeting else max(scores, key=lambda model: scores[model])
        for number in group:
            chosen[number] = best
    return chosen


def _grouped(requests: Sequence[Request]) -> dict[tuple[str, int], list[int]]:
    groups: dict[tuple[str, int], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault((request.stage, request.phase), []).append(number)
    return groups


def _total_scores(world: World, requests: Sequence[Request]) -> dict[int, float]:
    there = [model for model in range(len(world.models)) if requests[0].cost[model] is not None]
    return {model: sum(request.scores[model] for request in requests) for model in there}
