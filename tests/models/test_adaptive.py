import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from typing import Any

import pytest

from attune_worker.errors import NoCandidateError
from attune_worker.jobs import Job, ModelTier
from attune_worker.models.adaptive import AdaptiveModelRouter, place_of
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import Candidates, candidates
from attune_worker.settings import Settings
from attune_worker.store.keys import FleetKeys
from attune_worker.telemetry.histogram import bucket_of
from attune_worker.telemetry.snapshot import Snapshot
from attune_worker.telemetry.store import Telemetry

CHEAP, CAPABLE, PREMIUM = ModelTier.CHEAP, ModelTier.CAPABLE, ModelTier.PREMIUM


def model(ref: str, tier: ModelTier, usd_per_million: int | None) -> ModelInfo:
    provider, _, name = ref.partition("/")
    price = None if usd_per_million is None else Decimal(usd_per_million)
    return ModelInfo(name, provider, tier, input_cost_per_million=price, output_cost_per_million=price)


SMALL = model("anthropic/small", CHEAP, 1)
MIDDLE = model("anthropic/middle", CAPABLE, 10)
LARGE = model("anthropic/large", PREMIUM, 50)
SMALL_TOO = model("openai/small-too", CHEAP, 2)
MIDDLE_TOO = model("openai/middle-too", CAPABLE, 5)
REGISTRY = Registry([SMALL, MIDDLE, LARGE, SMALL_TOO, MIDDLE_TOO], ["google"])
STATIC = (MIDDLE, MIDDLE_TOO, LARGE, SMALL, SMALL_TOO)


class World:
    """A fleet with a history that nobody had to make, one call at a time."""

    def __init__(self, settings: Settings, redis: Any) -> None:
        self.settings = settings
        self.redis = redis
        self.keys = FleetKeys(settings.namespace)
        self.telemetry = Telemetry(settings)
        self.router = self.anew()

    def anew(self, **routing: Any) -> AdaptiveModelRouter:
        """Return a router that has not looked yet, and looks once."""
        settings = self.settings.model_copy(update={"routing": self.settings.routing.model_copy(update=routing)})
        self.router = AdaptiveModelRouter(settings, REGISTRY, self.telemetry, Snapshot(self.telemetry, 3600))
        return self.router

    def history(self, info: ModelInfo, good: int, bad: int, *, stage: str = "fix_bug", recent: str = "") -> None:
        """Let a model have had so many outcomes in a stage, its workflow and the fleet."""
        total = good + bad
        for key in (self.keys.evidence("w", stage), self.keys.evidence("w"), self.keys.evidence()):
            self.redis.hincrby(key, "n", total)
        for key in (self.keys.evidence("w", stage), self.keys.evidence("w"), self.keys.evidence()):
            seen = int(self.redis.hget(key, "n"))
            ring = recent or "".join("10"[(i + 1) * bad // total > i * bad // total] for i in range(total))[-20:]
            self.redis.hset(key, info.ref, json.dumps([good, bad, seen, total, 0, 0, ring]))
        self.anew()

    def judged(self) -> None:
        """Let somebody have said how good an answer in this stage was."""
        self.redis.hincrby(self.keys.evidence("w", "fix_bug"), "judged", 1)
        self.anew()

    def took(self, info: ModelInfo, latency_ms: int, answers: int, **counters: int) -> None:
        """Let a model have answered so many times in that time."""
        key = self.keys.stats("w", "fix_bug", f"{datetime.now(UTC):%Y%m%d}")
        counted = {
            "calls": answers,
            "succeeded": answers,
            "input": answers * 100,
            "output": answers * 100,
            "latency_ms": answers * latency_ms,
            f"h{bucket_of(latency_ms)}": answers,
        }
        counted |= counters
        self.redis.hset(key, mapping={f"{info.ref}|{name}": count for name, count in counted.items()})
        sizes = [answers, answers, answers * 400, counted["input"], counted["output"]]
        self.redis.hset(self.keys.evidence("w", "fix_bug"), f"{info.ref}|sizes", json.dumps(sizes))
        self.anew()

    def rank(self, draw: float = 0.0, obstacle: Callable[[ModelInfo], str | None] | None = None, **fields: Any) -> Any:
        """Rank the models for a job."""
        job = Job.parse({"task_type": "fix_bug", "prompt": "?" * 400, "workflow": "w"} | fields)
        return self.router.rank(job, candidates(job, REGISTRY, 100, obstacle), lambda: draw)

    def draws(self, count: int = 2000, **fields: Any) -> Counter[str]:
        """Rank for many jobs, and count who came first."""
        random = Random(1)
        return Counter(self.rank(random.random(), **fields).models[0].id for _ in range(count))


@pytest.fixture
def world(settings, redis):
    """A fleet that has learned nothing yet, of five models with prices."""
    found = World(settings, redis)
    yield found
    found.router.close()


def verdicts(decision: Any) -> dict[str, str]:
    return {one.model_id: one.verdict for one in decision.candidates}


def test_without_a_history_the_order_is_static(world):
    """Nothing is known, so nothing is drawn: the tier of the task type, as it always was."""
    ranking = world.rank(draw=0.999)
    assert ranking.models == STATIC
    assert (ranking.decision.rule, ranking.decision.propensity, ranking.decision.chosen) == ("static", 1, 0)
    assert (ranking.decision.workflow, ranking.decision.stage, ranking.decision.floor) == ("w", "fix_bug", 0.8)
    assert [one.probability for one in ranking.decision.candidates] == [1, 0, 0, 0, 0]


def test_a_pinned_model_is_not_weighed(world):
    """The job has decided."""
    world.history(SMALL, 1000, 0)
    ranking = world.rank(model="large")
    assert [info.id for info in ranking.models] == ["large"]
    assert (ranking.decision.rule, ranking.decision.propensity) == ("pinned", 1)


def test_adaptive_routing_can_be_switched_off(world):
    """With a history that says otherwise, the order stays static."""
    world.history(MIDDLE, 0, 100)
    world.anew(adaptive=False)
    assert world.rank().models == STATIC
    assert world.rank().decision.rule == "static"


def test_the_cheaper_model_wins_when_both_are_good_enough(world):
    """It comes first; whoever does not win stays as a fallback in static order."""
    world.history(MIDDLE, 500, 10)
    world.history(MIDDLE_TOO, 500, 10)
    world.anew(exploration=0.0)
    ranking = world.rank()
    assert ranking.models == (MIDDLE_TOO, MIDDLE, LARGE, SMALL, SMALL_TOO)
    decision = ranking.decision
    assert decision.rule == "adaptive"
    assert not decision.explored
    assert not decision.best_effort
    assert decision.candidates[decision.chosen].model_id == "middle-too"
    assert decision.propensity == decision.candidates[decision.chosen].probability
    chosen = decision.candidates[decision.chosen]
    assert chosen.calls == 510
    assert chosen.lower < chosen.expected_success < chosen.upper
    assert float(chosen.expected_cost_usd) == pytest.approx((96 + 500) * 5e-6)


def test_a_model_that_fails_too_often_loses_its_place(world):
    """However cheap it is."""
    world.history(MIDDLE, 500, 10)
    world.history(MIDDLE_TOO, 200, 300)
    world.anew(exploration=0.0)
    assert world.rank().models[0] is MIDDLE
    assert world.rank(min_success_rate=0.1).models[0] is MIDDLE_TOO


def test_the_draw_follows_the_probabilities_that_are_recorded(world):
    """Each model comes first as often as its decision says; exploring is marked and the best one is next."""
    world.history(MIDDLE, 30, 4)
    world.history(MIDDLE_TOO, 2, 1)
    world.anew(exploration=0.3)
    decision = world.rank().decision
    assert sum(one.probability for one in decision.candidates) == pytest.approx(1)
    drawn = world.draws(4000)
    for one in decision.candidates:
        assert drawn[one.model_id] / 4000 == pytest.approx(one.probability, abs=0.04)
    best = max(decision.candidates, key=lambda one: one.probability).model_id
    explored = [ranking for draw in range(100) if (ranking := world.rank(draw / 100)).decision.explored]
    assert explored
    for ranking in explored:
        assert ranking.models[0].id != best
        assert ranking.models[1].id == best
        assert ranking.decision.candidates[ranking.decision.chosen].model_id == ranking.models[0].id
        assert len(set(ranking.models)) == len(ranking.models) == 5


def test_a_weaker_tier_is_tried_only_where_answers_are_judged(world):
    """An answer that came is not an answer that is good: without feedback nothing can tell."""
    world.history(MIDDLE, 500, 10)
    world.history(SMALL, 5000, 0, stage="summarize")
    world.anew(exploration=0.3)
    assert {"small", "small-too"}.isdisjoint(world.draws())
    world.judged()
    world.anew(exploration=0.3)
    assert {"small", "small-too"} & set(world.draws())


def test_a_weaker_tier_wins_by_its_own_history_in_the_stage(world):
    """Once its answers here were judged good enough, the price decides."""
    world.history(MIDDLE, 500, 10)
    world.history(SMALL, 500, 5)
    world.judged()
    world.anew(exploration=0.0)
    assert world.rank().models[0] is SMALL


def test_a_stronger_tier_takes_over_when_the_own_one_fails(world):
    """The job's tier is where it starts, not where it has to stay."""
    world.history(MIDDLE, 100, 400)
    world.history(MIDDLE_TOO, 100, 400)
    world.history(LARGE, 490, 10)
    world.anew(exploration=0.0)
    assert world.rank().models[0] is LARGE


def test_hints_say_who_competes(world):
    """A hinted tier or provider holds, with the others as fallbacks; one that has no model is no obstacle."""
    for info in REGISTRY.all():
        world.history(info, 500, 5)
    world.anew(exploration=0.0)
    assert world.rank().models[0] is SMALL
    assert world.rank(tier_hint="premium").models == (LARGE, MIDDLE, MIDDLE_TOO, SMALL, SMALL_TOO)
    assert world.rank(tier_hint="capable").models[0] is MIDDLE_TOO
    assert world.rank(provider_hint="openai").models[0] is SMALL_TOO
    assert world.rank(provider_hint="openai", tier_hint="capable").models[0] is MIDDLE_TOO
    assert world.rank(provider_hint="openai", tier_hint="premium").models[0] is LARGE
    assert world.rank(provider_hint="google").models[0] is SMALL


def test_models_that_are_too_slow_do_not_compete(world):
    """From ten answers on, the 95th percentile of two days decides; they come last, and the verdict says why."""
    world.history(MIDDLE, 500, 10)
    world.history(MIDDLE_TOO, 500, 10)
    world.took(MIDDLE_TOO, 9000, 50)
    world.anew(exploration=0.0)
    assert world.rank().models[0] is MIDDLE_TOO
    ranking = world.rank(max_latency_ms=2000)
    assert (ranking.models[0], ranking.models[-1]) == (MIDDLE, MIDDLE_TOO)
    assert "max_latency_ms" in verdicts(ranking.decision)["middle-too"]
    assert MIDDLE_TOO not in world.rank(max_latency_ms=2000, best_effort=False).models
    world.redis.delete(*world.redis.keys(f"{world.keys.tag}:stats:*"))
    world.took(MIDDLE_TOO, 9000, 9)
    world.anew(exploration=0.0)
    assert world.rank(max_latency_ms=2000).models[0] is MIDDLE_TOO


def test_where_nobody_is_good_enough_the_job_says_what_happens(world):
    """The closest one, marked as such, or an error that names each model's trouble."""
    for info in REGISTRY.all():
        world.history(info, 10, 490)
    world.history(MIDDLE, 250, 250)
    world.anew(exploration=0.0)
    ranking = world.rank()
    assert ranking.decision.best_effort
    assert ranking.models[0] is MIDDLE
    with pytest.raises(NoCandidateError, match=r"anthropic/middle: .*openai/middle-too: "):
        world.rank(best_effort=False)
    assert world.rank(best_effort=False, min_success_rate=0.0).models[0]


def test_where_everybody_is_too_slow_it_is_a_best_effort(world):
    """All of them compete then, and the decision says that none fits."""
    world.history(MIDDLE, 500, 10)
    for info in REGISTRY.all():
        world.took(info, 9000, 50)
    assert world.rank(max_latency_ms=10).decision.best_effort
    with pytest.raises(NoCandidateError, match="max_latency_ms 10"):
        world.rank(max_latency_ms=10, best_effort=False)


def test_models_that_may_not_serve_are_never_ranked(world):
    """What the executor drops stays dropped, whatever its history."""
    world.history(MIDDLE_TOO, 500, 0)
    world.history(MIDDLE, 500, 10)
    without = world.rank(obstacle=lambda info: "no key" if info.provider == "openai" else None)
    assert {info.provider for info in without.models} == {"anthropic"}
    with pytest.raises(NoCandidateError):
        world.router.rank(Job(task_type="fix_bug", prompt="?"), Candidates((), ((MIDDLE, "no key"),)), lambda: 0)


def test_a_model_without_a_price_never_wins_by_it(world):
    """Unknown is not free."""
    free = model("openai/free", CAPABLE, None)
    registry = Registry([MIDDLE, free])
    world.history(MIDDLE, 500, 10)
    world.history(free, 500, 10)
    world.anew(exploration=0.0)
    job = Job(task_type="fix_bug", prompt="?", workflow="w")
    ranking = world.router.rank(job, candidates(job, registry, 100), lambda: 0)
    costs = {one.model_id: one.expected_cost_usd for one in ranking.decision.candidates}
    assert costs["free"] >= costs["middle"]


def test_the_usual_length_of_answers_makes_the_cost(world):
    """The answers of a model, or else the stage's, say how long the next one will be."""
    world.history(MIDDLE, 500, 10)
    world.took(MIDDLE, 100, 20, output=20 * 40)
    found = {one.model_id: one for one in world.rank().decision.candidates}
    assert float(found["middle"].expected_cost_usd) == pytest.approx((96 + 40) * 10e-6)
    assert float(found["large"].expected_cost_usd) == pytest.approx((96 + 40) * 50e-6)


def test_a_stage_is_named_by_the_job_or_its_task_type():
    """A job that names no stage is in that of its task type."""
    assert place_of(Job(task_type="fix_bug", prompt="?")) == ("default", "fix_bug")
    assert place_of(Job(task_type="fix_bug", prompt="?", workflow="w", stage="My Stage")) == ("w", "My Stage")


def test_the_best_model_is_never_a_draw(world):
    """It is the rule's own choice, by id, within what the caller allows."""
    world.history(MIDDLE, 500, 10)
    world.history(MIDDLE_TOO, 500, 10)
    world.took(MIDDLE_TOO, 9000, 50)
    world.anew(exploration=0.5)
    ask = world.router.get_best_model
    assert {ask("w", "fix_bug") for _ in range(50)} == {"middle-too"}
    assert ask("w", "fix_bug", max_latency_ms=2000) == "middle"
    assert ask("w", "fix_bug", max_cost=0.001) == "middle-too"
    assert ask("v", "nothing known", min_success_rate=0.9) == "middle"
    assert ask("v", "summarize") == "small"


def test_an_explanation_names_every_model_and_what_speaks_against_it(world):
    """Those that competed with their numbers, those that were dropped with the reason."""
    world.history(MIDDLE, 500, 10)
    world.history(MIDDLE_TOO, 100, 400)
    decision = world.router.explain("w", "fix_bug", max_cost=Decimal("0.01"))
    said = verdicts(decision)
    assert set(said) == {info.id for info in REGISTRY.all()}
    assert all(said.values())
    assert "max_cost" in said["large"]
    assert decision.candidates[decision.chosen].model_id == "middle"
    numbers = {one.model_id: one for one in decision.candidates}
    assert numbers["middle-too"].expected_success < 0.5 < numbers["middle"].lower
    assert not decision.best_effort
    assert world.router.explain("w", "fix_bug", max_cost=0).best_effort


def test_an_explanation_knows_who_has_no_key(world):
    """A provider whose key is missing here is named; where none is there at all, the workers are taken to have them."""
    values = world.settings.model_dump()
    values["providers"]["openai"]["api_key"] = "env:NOT_SET_ANYWHERE"
    router = AdaptiveModelRouter(Settings(**values), REGISTRY, world.telemetry)
    assert verdicts(router.explain("w", "s"))["middle-too"] == "has no API key"
    for provider in values["providers"].values():
        provider["api_key"] = "env:NOT_SET_ANYWHERE"
    router = AdaptiveModelRouter(Settings(**values), REGISTRY, world.telemetry)
    assert router.get_best_model("w", "s") == "middle"


KEYS = {
    "workflow",
    "stage",
    "days_analyzed",
    "models_used",
    "performance_by_model",
    "total_calls",
    "avg_cost",
    "avg_success_rate",
}


def test_stats_have_the_same_keys_with_and_without_calls(world):
    """Nobody has to ask whether there is anything to see."""
    empty = world.router.get_routing_stats("w")
    assert set(empty) == KEYS
    assert (empty["total_calls"], empty["models_used"], empty["performance_by_model"]) == (0, [], {})
    assert f"{empty['avg_cost']:.4f} {empty['avg_success_rate']:.0%}" == "0.0000 0%"
    world.took(MIDDLE, 300, 8, cost_nano=8_000_000, failed=2, calls=10, unpriced=2)
    world.took(SMALL, 100, 10, cost_nano=1_000_000)
    found = world.router.get_routing_stats("w", "fix_bug", days=3)
    assert set(found) == KEYS
    assert (found["stage"], found["days_analyzed"]) == ("fix_bug", 3)
    assert found["models_used"] == ["middle", "small"]
    assert (found["total_calls"], found["avg_cost"]) == (20, Decimal("0.0005"))
    assert found["avg_success_rate"] == pytest.approx(0.9)
    middle = found["performance_by_model"]["middle"]
    assert (middle["calls"], middle["success_rate"], middle["avg_cost"]) == (10, 0.8, Decimal("0.001"))
    assert middle["avg_latency_ms"] == 300
    assert 283 <= middle["p95_latency_ms"] <= 400
    with pytest.raises(ValueError, match="days"):
        world.router.get_routing_stats("w", days=0)


def test_a_model_at_two_providers_keeps_its_providers_name(world):
    """Only where the id alone would mean two."""
    world.took(model("a/same", CHEAP, 1), 100, 1)
    world.took(model("b/same", CHEAP, 1), 100, 1)
    assert world.router.get_routing_stats("w", "fix_bug")["models_used"] == ["a/same", "b/same"]


@pytest.mark.parametrize(
    ("info", "recent", "recommended", "words"),
    [
        (SMALL, "1" * 15 + "0" * 5, True, ["5 of the newest 20", "25%", "capable"]),
        (SMALL, "1" * 16 + "0" * 4, False, ["4 of the newest 20", "20%"]),
        (SMALL, "0" * 9, False, ["only 9 outcomes", "10 are needed"]),
        (SMALL, "0" * 10, True, ["10 of the newest 10", "capable"]),
        (MIDDLE, "0" * 20, True, ["capable models", "use premium"]),
        (LARGE, "0" * 20, False, ["no stronger tier"]),
    ],
)
def test_a_stronger_tier_is_recommended_after_too_many_failures(world, info, recent, recommended, words):
    """More than a fifth of the newest twenty outcomes, of at least ten, and while there is a stronger one."""
    world.history(info, recent.count("1"), recent.count("0"), recent=recent)
    should, reason = world.router.recommend_tier_upgrade("w", "fix_bug")
    assert should is recommended
    for word in words:
        assert word in reason


def test_the_tier_in_use_is_that_of_the_most_outcomes(world):
    """A few trials of another tier, however bad, are not what the stage uses."""
    world.history(MIDDLE, 300, 0)
    world.history(SMALL, 0, 15)
    assert world.router.recommend_tier_upgrade("w", "fix_bug") == (
        False,
        "0 of the newest 20 outcomes of capable models failed (0%; up to 20% is fine)",
    )
    assert world.router.recommend_tier_upgrade("w", "nothing")[0] is False


def test_without_redis_models_are_chosen_all_the_same(settings):
    """The static order serves until Redis is back."""
    values = settings.model_dump() | {"redis_url": "redis://127.0.0.1:1/0"}
    router = AdaptiveModelRouter(Settings(**values), REGISTRY)
    job = Job(task_type="fix_bug", prompt="?")
    assert router.rank(job, candidates(job, REGISTRY, 100), lambda: 0).models == STATIC
    router.close()


def test_a_decision_does_not_take_longer_after_more_calls(world):
    """What is kept of a stage has the same size after ten thousand outcomes as after ten."""
    sizes = []
    for outcomes in (10, 10_000):
        world.history(MIDDLE, outcomes, 0)
        sizes.append(world.redis.hlen(world.keys.evidence("w", "fix_bug")))
    assert sizes[0] == sizes[1]
