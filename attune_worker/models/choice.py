"""Which of these models should a job get, and with what probability, given what was seen of each?

The floor is a promise about the average of a stage, so the rule steers the average. In four steps:

1. How good is each model here? Its outcomes in the stage, with what it did elsewhere as a prior that a few
   outcomes outweigh. A cheaper tier is presumed to be no better here than a dearer one until it shows otherwise.
2. What is the stage owed? The target is the floor, lowered by what the stage's jobs so far achieved beyond it, and
   raised by what they lack: a bank of surplus that pays for saving and for learning, as conservative bandits have
   (Wu et al., ICML 2016, arXiv 1602.04282).
3. What is the cheapest way to the target? A model, or a mixture of two, whose expected success meets it (the best
   point of a linear program with one constraint has two nonzero entries at most, as in bandits with knapsacks,
   Badanidiyuru et al., arXiv 1305.2545). Nothing meets it: the best model.
4. Which other model could change that? Those share ``exploration``.

Age is in the evidence (discounted, as in arXiv 2305.10718); a sudden drop shows in a model's newest outcomes first.
Constants were chosen on other orders of the requests than ``benchmarks/routing.py`` reports on; around each is a
wide range that does about as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from attune_worker.telemetry.evidence import RING, Evidence

NO_EVIDENCE = Evidence()

PRESUMED = (0.7, 0.8, 0.85)
"""Success of a cheap, a capable and a premium model of which nothing is known at all."""

FLEET_WEIGHT = 4.0
"""How many of the fleet's outcomes outweigh what is presumed: hardly any."""

WORKFLOW_WEIGHT = 10.0
"""How many of a workflow's outcomes outweigh the fleet's: workflows differ, but not as stages do."""

STAGE_WEIGHT = 8.0
"""How many of a stage's outcomes outweigh the workflow's.

The variance of one outcome over that of a model's success between stages: .2 / .16 ** 2 in MMLU's subjects.
"""

ENOUGH = 5
"""A model with fewer outcomes, in the stage and in its workflow, is explored only, unless it is of a dearer tier."""

HORIZON = 50.0
"""Over how many jobs a stage's surplus is spent, or its deficit made up; half or twice as many do as well."""

SLACK = 0.1
"""How far below the floor a model may be, and the target go, when the stage has a surplus. 0: never below."""

SURPRISE = 0.3
"""By how much less than elsewhere a dearer model may do here before that is held against it, not the stage."""

DROP_SIGMAS = 3.0
"""Newest outcomes that are worse than usual by so many standard errors replace all: once in some thousand by chance."""

CERTAIN = 1.645
"""Standard errors on either side of a 90 % interval."""

CONCEIVABLE = 1.0
"""A model is worth exploring while it could be better than it seems by so many standard errors.

More keeps paying for models that lost; fewer drops a good one after a bad start.
"""

TRIES = 4.0
"""How many outcomes of a cheaper model a stage wants to see, whatever it did elsewhere.

Without them the stages that look hopeless decide what is known of it, and it is never seen where it does well.
"""


@dataclass(frozen=True, slots=True)
class Arm:
    """A model that may serve the job; ``cost`` is the expected cost of this call, in any unit shared by the arms.

    ``tier_rank`` runs from 0 (cheap) to 2 (premium); the evidence is discounted to now. ``is_static``: it is what
    the job would get if nothing were known.
    """

    ref: str
    cost: float
    tier_rank: int
    is_static: bool
    stage: Evidence = NO_EVIDENCE
    workflow: Evidence = NO_EVIDENCE
    fleet: Evidence = NO_EVIDENCE
    may_explore: bool = True


@dataclass(frozen=True, slots=True)
class Scored:
    """What the rule makes of an arm: its success rate with a 90 % interval, and how probable its choice is."""

    arm: Arm
    mean: float
    lower: float
    upper: float
    probability: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The arms in the order given.

    ``best`` is the index of the cheapest that meets the floor by itself, or of the best one when none does; others
    have a probability because the stage's surplus allows it or because they are explored.
    """

    scored: tuple[Scored, ...]
    best: int
    meets_floor: bool


def choose(arms: Sequence[Arm], floor: float, exploration: float) -> Choice:
    """Return the probability of each arm; the caller draws.

    ``floor`` is the least success rate wanted, ``exploration`` the share of jobs that may try something else.
    Raises ``ValueError`` when there are no arms.
    """
    if not arms:
        raise ValueError("there is no model to choose from")
    means, errors, hopes = _estimates(arms)
    usable = _usable(arms)
    top = max(usable, key=lambda i: (means[i], arms[i].tier_rank, -arms[i].cost))
    meeting = [i for i in usable if means[i] >= floor]
    best = min(meeting, key=lambda i: (arms[i].cost, -means[i])) if meeting else top
    target = _target(arms, floor)
    mixture = _cheapest_mixture(arms, means, usable, target, floor) or {top: 1.0}
    explored = _worth_exploring(arms, means, hopes, mixture, target, exploration)
    probabilities = [0.0] * len(arms)
    for i in explored:
        probabilities[i] = exploration / len(explored)
    for i, share in mixture.items():
        probabilities[i] += share * (1.0 - exploration) if explored else share
    scored = []
    for i, arm in enumerate(arms):
        mean, margin = means[i], CERTAIN * errors[i]
        role = "explored" if i in explored else "shares" if i in mixture else ""
        verdict = _verdict(arms, i, best, mean, floor, role)
        scored.append(Scored(arm, mean, max(0.0, mean - margin), min(1.0, mean + margin), probabilities[i], verdict))
    return Choice(tuple(scored), best, bool(meeting))


def _estimates(arms: Sequence[Arm]) -> tuple[list[float], list[float], list[float]]:
    """Return each arm's expected success in the stage, its standard error, and what one may hope for.

    The error is that of a beta distribution. A model that broke may be as good again as it usually was.
    """
    means, errors, hopes = [0.0] * len(arms), [0.0] * len(arms), [0.0] * len(arms)
    tier, bound, next_bound = len(PRESUMED), 1.0, 1.0
    for i in sorted(range(len(arms)), key=lambda i: -arms[i].tier_rank):
        arm = arms[i]
        if arm.tier_rank < tier:
            tier, bound = arm.tier_rank, next_bound
        elsewhere = _elsewhere(arm)
        successes, weight, usual = _here(arm.stage)
        mean = (successes + STAGE_WEIGHT * min(elsewhere, bound)) / (weight + STAGE_WEIGHT)
        means[i], errors[i] = mean, sqrt(mean * (1.0 - mean) / (weight + STAGE_WEIGHT))
        hopes[i] = max(mean + CONCEIVABLE * errors[i], usual)
        next_bound = min(next_bound, max(mean, elsewhere - SURPRISE))
    return means, errors, hopes


def _elsewhere(arm: Arm) -> float:
    """Return what is expected of an arm in a stage where it never was."""
    mean = PRESUMED[arm.tier_rank]
    for evidence, weight in ((arm.fleet, FLEET_WEIGHT), (arm.workflow, WORKFLOW_WEIGHT)):
        successes = evidence.successes
        mean = (successes + weight * mean) / (successes + evidence.failures + weight)
    return mean


def _here(stage: Evidence) -> tuple[float, float, float]:
    """Return successes and outcomes in the stage: all, or the newest alone when they are significantly worse.

    Then comes the usual success rate, or 0 where it still holds.
    """
    weight, newest = stage.successes + stage.failures, len(stage.recent)
    if RING // 2 <= newest < weight:
        usual, successes = stage.successes / weight, stage.recent.count("1")
        rate = successes / newest
        middle = (usual + rate) / 2.0
        if rate < usual and usual - rate > DROP_SIGMAS * sqrt(middle * (1.0 - middle) / newest):
            return float(successes), float(newest), usual
    return stage.successes, weight, 0.0


def _usable(arms: Sequence[Arm]) -> list[int]:
    """Return the arms that may be sent jobs: the static one, those of which enough is known, and dearer tiers.

    A dearer tier may help a stage out of trouble unseen; to save money a model has to be seen first.
    """
    static, usual = min([(arm.tier_rank, arm.cost) for arm in arms if arm.is_static], default=(len(PRESUMED), 0.0))
    known = [
        i
        for i, arm in enumerate(arms)
        if arm.is_static
        or arm.stage.calls >= ENOUGH
        or (arm.may_explore and ((arm.tier_rank > static and arm.cost >= usual) or arm.workflow.calls >= ENOUGH))
    ]
    return known or [i for i, arm in enumerate(arms) if arm.stage.calls] or list(range(len(arms)))


def _target(arms: Sequence[Arm], floor: float) -> float:
    """Return the success that is wanted of the next jobs, so that the stage's average comes to the floor."""
    successes = sum([arm.stage.successes for arm in arms])
    failures = sum([arm.stage.failures for arm in arms])
    lacking = floor * (successes + failures) - successes
    return floor + min(SLACK, max(-SLACK, lacking / HORIZON))


def _cheapest_mixture(
    arms: Sequence[Arm], means: Sequence[float], usable: Sequence[int], target: float, floor: float
) -> dict[int, float] | None:
    """Return the arm, or the shares of the two arms, that meet the target at the least cost; None: none does."""
    above = [i for i in usable if means[i] >= target]
    if not above:
        return None
    cheapest = min(above, key=lambda i: (arms[i].cost, -means[i]))
    mixture, least = {cheapest: 1.0}, arms[cheapest].cost
    below = [i for i in usable if floor - SLACK <= means[i] < target and arms[i].cost < least]
    for low in below:
        for high in above:
            share = (means[high] - target) / (means[high] - means[low])
            cost = share * arms[low].cost + (1.0 - share) * arms[high].cost
            if cost < least:
                mixture, least = {low: share, high: 1.0 - share}, cost
    return mixture


def _worth_exploring(
    arms: Sequence[Arm],
    means: Sequence[float],
    hopes: Sequence[float],
    mixture: dict[int, float],
    target: float,
    exploration: float,
) -> list[int]:
    """Return the arms that get few jobs or none, and that might save money or lift a stage to its target."""
    cost = sum(share * arms[i].cost for i, share in mixture.items())
    expected = sum(share * means[i] for i, share in mixture.items())
    goal, found = min(target, expected), []
    for i, arm in enumerate(arms):
        if not arm.may_explore or exploration <= 0 or mixture.get(i, 0.0) >= exploration:
            continue
        saves = arm.cost < cost and (hopes[i] >= goal or arm.stage.weight < TRIES)
        if saves or (expected < target and hopes[i] > expected):
            found.append(i)
    return found


def _verdict(arms: Sequence[Arm], i: int, best: int, mean: float, floor: float, role: str) -> str:
    """Say in a few words what became of an arm."""
    if i == best:
        return "chosen" if mean >= floor else f"the best there is: {mean:.2f} < {floor:.2f}"
    if role == "explored":
        return "explored"
    if role == "shares":
        return f"shares: {mean:.2f}, and the stage is {'above' if mean < floor else 'below'} its floor"
    if mean < floor:
        return f"below the floor: {mean:.2f} < {floor:.2f}"
    return f"dearer than {arms[best].ref}"
