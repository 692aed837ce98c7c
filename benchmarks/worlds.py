"""What requests are there to route, and how would each model have done on each of them?

Recorded answers of real models where ``--data`` is given, else made up; and made-up worlds that change.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

BYTES_PER_TOKEN = 4
MIXTRAL_USD, GPT4_USD = 0.24e-6, 24.7e-6
"""USD per token, as in RouteLLM (arXiv 2406.18665)."""

TIERS = {"gemini-2.5-flash": 1, "gemini-2.5-pro": 2, "llama-3.1-8b-instruct": 0, "mistral-large-2512": 1}


@dataclass(frozen=True, slots=True)
class Model:
    """A model, and its tier from 0 (cheap) to 2 (premium)."""

    name: str
    tier: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what each model would have scored (0 to 1) and cost (USD), what one would expect it to cost.

    ``cost`` is None for a model that does not exist yet. ``phase`` counts the changes of the world so far.
    """

    stage: str
    scores: tuple[float, ...]
    cost: tuple[float | None, ...]
    expected_cost: tuple[float, ...]
    phase: int = 0


@dataclass(frozen=True, slots=True)
class World:
    """Requests of one workflow; ``static`` is the model that is used while nothing is known."""

    name: str
    source: str
    models: tuple[Model, ...]
    static: int
    floor: float
    requests: Callable[[int], list[Request]]
    real: bool = True

    @property
    def cheap(self) -> int:
        """The place of the model of the lowest tier."""
        return min(range(len(self.models)), key=lambda place: self.models[place].tier)

    @property
    def premium(self) -> int:
        """The place of the model of the highest tier."""
        return max(range(len(self.models)), key=lambda place: self.models[place].tier)


def mmlu(data: Path, floor: float) -> World:
    """Return RouteLLM's MMLU answers: 57 subjects are the stages, each question is asked once."""
    with (data / "routellm" / "mmlu_by_subject.csv").open(newline="") as file:
        requests = [_question(row) for row in csv.DictReader(file)]
    source = "RouteLLM's answers to MMLU: 14,042 questions, 57 subjects, mixtral-8x7b and gpt-4-1106"
    return World("mmlu", source, (Model("mixtral-8x7b", 0), Model("gpt-4-1106", 2)), 1, floor, _shuffled(requests))


def _question(row: dict[str, str]) -> Request:
    tokens = int(row["prompt_chars"]) / BYTES_PER_TOKEN
    cost = (tokens * MIXTRAL_USD, tokens * GPT4_USD)
    scores = (float(row["mixtral_8x7b_correct"]), float(row["gpt4_1106_correct"]))
    return Request(row["subject"], scores, cost, cost)


def paretobandit(data: Path, floor: float) -> World:
    """Return ParetoBandit's judged answers; the benchmarks that the prompts come from are the stages."""
    with (data / "paretobandit" / "rewards_val.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = tuple(Model(name, tier) for name, tier in TIERS.items())
    usual = tuple(sum(float(row[f"{model.name}|cost_usd"]) for row in rows) / len(rows) for model in models)
    requests = [
        Request(
            row["source"].partition("/")[0],
            tuple(float(row[f"{model.name}|reward"]) for model in models),
            tuple(float(row[f"{model.name}|cost_usd"]) for model in models),
            usual,
        )
        for row in rows
    ]
    source = "ParetoBandit's validation prompts: 1,766 of them, judged rewards and real costs of four models"
    return World("paretobandit", source, models, 1, floor, _shuffled(requests))


def made_up(floor: float, stages: int = 40) -> World:
    """Return a world like MMLU, for when there is no data: stages of 60 to 600 requests, two models."""
    random = Random("stages")
    requests = []
    for stage in range(stages):
        difficulty, lead = random.betavariate(4, 2), max(-0.05, random.gauss(0.12, 0.07))
        rates = (difficulty, min(0.98, difficulty + lead))
        for _ in range(random.randint(60, 600)):
            tokens = random.uniform(30, 300)
            cost = (tokens * MIXTRAL_USD, tokens * GPT4_USD)
            requests.append(Request(f"stage-{stage:02}", _draw(random, rates), cost, cost))
    models = (Model("small", 0), Model("large", 2))
    return World("synthetic", "made up, like MMLU", models, 1, floor, _shuffled(requests), real=False)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time: the models' success rates and prices; a price of None: the model does not exist yet."""

    requests: int
    rates: tuple[float, ...]
    usd: tuple[float | None, ...]


CHANGES: dict[str, tuple[str, tuple[Phase, ...]]] = {
    "degrades": (
        "the cheap model falls from 90 % to 40 % and recovers",
        (
            Phase(2000, (0.90, 0.92, 0.95), (0.001, 0.005, 0.025)),
            Phase(2000, (0.40, 0.92, 0.95), (0.001, 0.005, 0.025)),
            Phase(2000, (0.90, 0.92, 0.95), (0.001, 0.005, 0.025)),
        ),
    ),
    "cheaper": (
        "the price of the best model falls to a fiftieth",
        (
            Phase(3000, (0.60, 0.88, 0.95), (0.001, 0.005, 0.025)),
            Phase(3000, (0.60, 0.88, 0.95), (0.001, 0.005, 0.0005)),
        ),
    ),
    "newcomer": (
        "a cheap model appears that is as good as the premium one",
        (
            Phase(3000, (0.90, 0.60, 0.95), (None, 0.005, 0.025)),
            Phase(3000, (0.90, 0.60, 0.95), (0.001, 0.005, 0.025)),
        ),
    ),
}
"""Name of a world that changes: what happens, and its phases."""


def changed(name: str, floor: float, *, scale: float = 1.0) -> World:
    """Return one of ``CHANGES``: three stages, one of them ten times as busy as the quietest, three models."""
    happens, phases = CHANGES[name]
    shorter = [replace(phase, requests=round(phase.requests * scale)) for phase in phases]
    models = (Model("cheap", 0), Model("capable", 1), Model("premium", 2))
    return World(name, happens, models, 2, floor, lambda seed: list(_phases(shorter, seed)), real=False)


def _phases(phases: Sequence[Phase], seed: int) -> Iterator[Request]:
    random = Random(seed)
    for number, phase in enumerate(phases):
        expected = tuple(usd or 0.0 for usd in phase.usd)
        for _ in range(phase.requests):
            [stage] = random.choices(("busy", "usual", "quiet"), (10, 4, 1))
            yield Request(stage, _draw(random, phase.rates), phase.usd, expected, number)


def _draw(random: Random, rates: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(random.random() < rate) for rate in rates)


def _shuffled(requests: list[Request]) -> Callable[[int], list[Request]]:
    def in_order_of(seed: int) -> list[Request]:
        return Random(seed).sample(requests, len(requests))

    return in_order_of
