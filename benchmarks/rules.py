"""By what rules could models be chosen? attune-worker's own, and those it is held against.

All see the same evidence. A rule takes the arms, the floor, the exploration and a source of randomness, and
returns the probability of each arm.
"""

# ruff: noqa: ARG001 - all rules have one signature

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from attune_worker.models.choice import Arm, choose

Rule = Callable[[Sequence[Arm], float, float, Random], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Contender:
    """A rule under test; ``starts`` is what is static, ``warm``: half of the requests are known before, of all models.

    A rule of None is the oracle, which knows how each stage will end.
    """

    name: str
    rule: Rule | None
    starts: str = "premium"
    warm: bool = False


def attune_worker(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Ask the rule that ships."""
    return [scored.probability for scored in choose(arms, floor, exploration).scored]


def cheapest(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Take the lowest tier always."""
    return _only(arms, min(range(len(arms)), key=lambda place: arms[place].tier_rank))


def premium(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Take the highest tier always."""
    return _only(arms, max(range(len(arms)), key=lambda place: arms[place].tier_rank))


def shuffle(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Take any."""
    return [1 / len(arms)] * len(arms)


def argmax(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Take the best of 100 x success rate - 10 x USD among those seen in the stage, as upstream does."""
    seen = [place for place, arm in enumerate(arms) if arm.stage.calls]
    seen = seen or [place for place, arm in enumerate(arms) if arm.is_static]
    return _only(arms, max(seen, key=lambda place: 100 * _rate(arms[place]) - 10 * arms[place].cost))


def epsilon_greedy(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Take the cheapest whose rate in the stage meets the floor, else the best; explore evenly."""
    return _explored(_cheapest_meeting([_rate(arm) for arm in arms], arms, floor), exploration)


def thompson(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Draw each success rate from its posterior; take the cheapest that meets the floor, else the best."""
    rates = [random.betavariate(arm.stage.successes + 1, arm.stage.failures + 1) for arm in arms]
    return _cheapest_meeting(rates, arms, floor)


def posterior_mean(arms: Sequence[Arm], floor: float, exploration: float, random: Random) -> Sequence[float]:
    """Do as epsilon-greedy does, with the workflow's rate as a prior worth ten outcomes."""
    rates = []
    for arm in arms:
        prior = (arm.workflow.successes + 8) / (arm.workflow.weight + 10)
        rates.append((arm.stage.successes + 10 * prior) / (arm.stage.weight + 10))
    return _explored(_cheapest_meeting(rates, arms, floor), exploration)


def _rate(arm: Arm) -> float:
    return (arm.stage.successes + 1) / (arm.stage.weight + 2)


def _only(arms: Sequence[Arm], place: int) -> list[float]:
    return [float(place == other) for other in range(len(arms))]


def _cheapest_meeting(rates: Sequence[float], arms: Sequence[Arm], floor: float) -> list[float]:
    meeting = [place for place, rate in enumerate(rates) if rate >= floor]
    if meeting:
        return _only(arms, min(meeting, key=lambda place: arms[place].cost))
    return _only(arms, max(range(len(arms)), key=lambda place: rates[place]))


def _explored(probabilities: Sequence[float], exploration: float) -> list[float]:
    return [(1 - exploration) * one + exploration / len(probabilities) for one in probabilities]


CONTENDERS = (
    Contender("always cheap", cheapest),
    Contender("always premium", premium),
    Contender("shuffle", shuffle),
    Contender("argmax, cold, from cheap", argmax, starts="cheap"),
    Contender("argmax, warm", argmax, warm=True),
    Contender("epsilon-greedy", epsilon_greedy),
    Contender("constrained Thompson", thompson),
    Contender("posterior mean", posterior_mean),
    Contender("attune-worker, from premium", attune_worker),
    Contender("attune-worker, from cheap", attune_worker, starts="cheap"),
    Contender("attune-worker, warm", attune_worker, warm=True),
    Contender("oracle", None),
)
