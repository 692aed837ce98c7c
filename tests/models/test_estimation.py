"""What is expected of a job, before the first call like it and after some? Real Redis, simulated provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis

from attune_worker.errors import InvalidJobError, ServiceUnavailableError
from attune_worker.jobs import Job
from attune_worker.ledger import Ledger
from attune_worker.models.estimation import Estimator, most_usd
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.sections import RetrySettings
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys
from attune_worker.telemetry.sizes import Sizes
from tests.conftest import API_KEY

MODEL = "anthropic/claude-haiku-5-5"


def job(**fields: Any) -> Job:
    return Job.parse({"task_type": "summarize", "prompt": "word " * 200, "workflow": "w", **fields})


@pytest.fixture
def executor(settings: Settings) -> Iterator[EmpathyLLMExecutor]:
    changed = settings.model_copy(update={"routing": settings.routing.model_copy(update={"refresh_seconds": 0.02})})
    with EmpathyLLMExecutor(changed) as found:
        yield found


@pytest.fixture
def estimator(settings: Settings) -> Iterator[Estimator]:
    with Estimator(settings) as found:
        yield found


@pytest.fixture
def ledger(settings: Settings, redis: Redis) -> Ledger:
    return Ledger(settings, redis)


def test_before_the_first_call_it_is_a_guess_and_says_so(estimator: Estimator) -> None:
    """With a worst case that holds all the same; by subscription it is no money, and tokens of a quota."""
    found = estimator.estimate(job(max_tokens=1000))
    first = found.first
    assert first is not None
    assert (found.rule, first.ref, first.source) == ("static", MODEL, "a guess: nothing was called yet")
    assert (first.input_tokens, first.output_tokens, first.learned_calls) == (250, 500, 0)
    assert (first.most_input_tokens, first.most_output_tokens) == (1032, 1000)
    assert found.expected_usd is not None
    assert found.worst_usd is not None
    assert found.most_usd is not None
    assert 0 < found.expected_usd < found.worst_usd < found.most_usd
    quota = first.subscription
    assert (quota.expected_usd, quota.worst_usd, quota.tokens, quota.most_tokens) == (0, 0, 750, 2032)
    assert first.lately is None


def test_after_calls_of_known_size_the_estimate_is_what_they_cost(
    executor: EmpathyLLMExecutor, settings: Settings, ledger: Ledger, until: Callable[..., Any]
) -> None:
    """To the token where all are alike; and the ledger knows how far off the first guesses were."""
    view = executor.router._snapshot.view
    answers = []
    for number in range(12):
        answers.append(executor.run("summarize", "word " * 200, model=MODEL, workflow="w"))
        until(lambda seen=number + 1: view("w", "summarize").stage.sizes.get(MODEL, Sizes()).calls == seen)
    costs, usage = [one.cost_usd for one in answers], answers[0].usage
    with Estimator(settings) as estimator:
        first = estimator.first(job(model=MODEL))
    assert first is not None
    assert usage is not None
    assert (first.input_tokens, first.output_tokens) == (usage.input_tokens, usage.output_tokens)
    assert (first.learned_calls, first.expected_usd) == (12, costs[0])
    assert first.source == "learned from 12 calls of this model in this stage"

    records = list(ledger.records())
    expected = [record.expected_usd for record in records]
    assert expected[0] > expected[1] == expected[-1] == costs[-1]  # the first was a guess, and one call taught it
    [row] = ledger.report(1)
    compared = row.compared
    assert (compared.calls, compared.actual_usd, compared.expected_usd) == (12, row.cost_usd, sum(expected))
    assert compared.off_usd == expected[0] - costs[0]
    assert first.lately is not None
    assert (first.lately.calls, first.lately.ratio) == (12, float(row.cost_usd / sum(expected)))
    assert first.lately.mean_off_usd == (compared.off_usd / 12).quantize(Decimal("1e-9"))


def test_lengths_that_vary_are_met_on_average(executor: EmpathyLLMExecutor, settings: Settings) -> None:
    """Prompts of 50 to 350 words: all together the estimate of the next ones is less than 2 % off."""
    for words in range(50, 351, 20):
        executor.run("summarize", "word " * words, model=MODEL, workflow="w")
    again = ["word " * words for words in range(60, 341, 20)]
    with Estimator(settings) as estimator:
        expected = sum(estimator.estimate(job(prompt=text, model=MODEL)).expected_usd for text in again)
    cost = sum(executor.run("summarize", text, model=MODEL, workflow="w").cost_usd for text in again)
    assert abs(cost / expected - 1) < Decimal("0.02")


def test_a_wider_place_helps_where_a_stage_is_new(executor: EmpathyLLMExecutor, estimator: Estimator) -> None:
    """Another stage of the workflow, then any of the fleet."""
    for _ in range(5):
        executor.run("summarize", "word " * 100, model=MODEL, workflow="w")
    of_workflow, of_fleet = (estimator.estimate(job(stage="new", workflow=name)) for name in ("w", "other"))
    assert of_workflow.first is not None
    assert of_fleet.first is not None
    assert of_workflow.first.source == "learned from 5 calls of this model in this workflow"
    assert of_fleet.first.source == "learned from 5 calls of this model of the whole fleet"
    others = {one.source for one in of_fleet.candidates if one.ref != MODEL}
    assert others == {"learned from 5 calls of all models of the whole fleet"}


def test_a_failed_call_is_no_test_of_its_estimate(
    executor: EmpathyLLMExecutor, ledger: Ledger, simulator: Simulator
) -> None:
    """It cost nothing, and nothing else was to be expected of it."""
    fails = {"claude-haiku-5-5": {"errors": {"overloaded": 1}}}
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "models": fails})
    executor.run("summarize", "?", provider_hint="anthropic")
    [row] = ledger.report(1)
    assert row.calls > row.compared.calls == 1


@pytest.mark.parametrize("garbage", ["x", "[1,1,1e-9,1e300,5]", "[]"])
def test_a_corrupted_hash_makes_a_guess_and_no_error(
    estimator: Estimator, settings: Settings, redis: Redis, garbage: str
) -> None:
    """Also where the key holds another type, and where counters of the sums are texts."""
    keys = FleetKeys(settings.namespace)
    redis.hset(keys.evidence("w", "summarize"), mapping={f"{MODEL}|sizes": garbage, "n": "many"})
    redis.set(keys.evidence("w"), "not a hash")
    redis.hset(keys.evidence(), f"{MODEL}|sizes", garbage)
    first = estimator.estimate(job()).first
    assert first is not None
    assert first.learned_calls == 0


def test_who_may_not_serve_is_there_with_the_reason(settings: Settings) -> None:
    """Behind those that may, with what it would have cost."""
    with Estimator(settings) as estimator:
        found = estimator.estimate(job(max_cost="0.01"))
        nobody = estimator.estimate(job(max_cost="0.000000001"))
    serving = [one.serves for one in found.candidates]
    assert serving == sorted(serving, reverse=True)
    assert {one.why for one in found.candidates if one.provider == "google"} == {"has no API key (set GEMINI_API_KEY)"}
    assert any("over max_cost" in one.why and one.expected_usd for one in found.candidates if not one.serves)
    assert (nobody.first, nobody.rule, nobody.expected_usd, nobody.most_usd) == (None, None, None, None)


def test_a_program_without_keys_sees_what_the_workers_will(settings: Settings) -> None:
    """A web backend that submits has none; its estimate is not that nobody may serve."""
    unset = {"api_key": SecretStr("env:NOT_SET")}
    providers = {name: one.model_copy(update=unset) for name, one in settings.providers.items()}
    keyless = settings.model_copy(update={"providers": providers})
    with Estimator(keyless) as estimator:
        found = estimator.estimate(job())
    assert {one.provider for one in found.candidates if one.serves} == {"anthropic", "openai", "google"}


TEAM = {"name": "team", "mode": "subscription", "secret": "env:NOT_SET", "burst": 1.0}


@pytest.fixture
def make_settings(settings: Settings, tmp_path: Path) -> Callable[..., Settings]:
    """Return a function that gives Anthropic a subscription, and the fleet other settings."""

    def make(*, secret: str = "token-never-shown", **changes: Any) -> Settings:
        fields = settings.model_dump() | {"auth": {"file": tmp_path / "auth.json", **changes}}
        fields["providers"]["anthropic"] |= {"credentials": [{**TEAM, "secret": secret}]}
        return Settings.model_validate(fields)

    return make


def test_both_modes_are_told_and_which_one_the_job_would_go_by(make_settings: Callable[..., Settings]) -> None:
    """As the strategy recommends; 0 by subscription, but what a key would cost where it may spill."""
    with Estimator(make_settings()) as estimator:
        small, large = (estimator.estimate(job(module_lines=lines)) for lines in (1999, 2000))
        spills = estimator.estimate(job(module_lines=1999, spill_to_api=True))
        own = estimator.estimate(job(module_lines=1999, auth_mode="api"))
    assert small.first is not None
    assert large.first is not None
    assert (small.first.mode, large.first.mode) == ("subscription", "api")
    assert (small.expected_usd, small.worst_usd, small.most_usd) == (0, 0, 0)
    assert {one.provider for one in small.candidates if one.serves} == {"anthropic"}  # no bill elsewhere
    assert (large.expected_usd, large.worst_usd) == (small.first.expected_usd, small.first.worst_usd)
    assert small.first.mode_why == (
        "the strategy recommends a subscription for a job of its size: 1,999 lines, it is below "
        "medium_module_threshold (2000), and prefer_subscription is on"
    )
    assert spills.first is not None
    assert (spills.first.mode, spills.first.spills) == ("subscription", True)
    assert (spills.expected_usd, spills.worst_usd) == (0, large.worst_usd)
    assert own.first is not None
    assert (own.first.mode, own.first.mode_why) == ("api", "the job asks for an API key")
    others = {one.mode_why for one in large.candidates if one.provider == "openai"}
    assert others == {"there is no subscription"}


def test_share_of_a_window_is_told_once_its_size_is_known(make_settings: Callable[..., Settings], redis: Redis) -> None:
    """With what is used of it, and that it is held up."""
    settings = make_settings()
    key = FleetKeys(settings.namespace).credential("anthropic", "team")
    reset_ms = round(time.time() * 1000) + 3_600_000
    redis.hset(key, mapping={"5h_utilization": 0.5, "5h_reset_ms": reset_ms, "5h_told_ms": reset_ms - 3_600_000})
    with Estimator(settings) as estimator:
        first = estimator.first(job(module_lines=1))
    assert first is not None
    assert first.subscription.credential == "team"
    window = first.subscription.windows["5h"]
    assert (window.share, window.most_share, window.used) == (None, None, 0.5)
    redis.hset(key, mapping={"5h_utilization": 1.0, "5h_capacity": 100_000})
    with Estimator(settings) as estimator:
        quota = estimator.first(job(module_lines=1, max_tokens=1000)).subscription
    window = quota.windows["5h"]
    assert (window.share, window.most_share, window.used) == (750 / 100_000, 2032 / 100_000, 1.0)
    assert (quota.held, quota.held_until) == ("quota_used_up", window.resets_at)


def test_a_program_without_keys_sees_the_mode_that_workers_will_have(make_settings: Callable[..., Settings]) -> None:
    """Where a provider has keys of several names too: none of its secrets is there, and each counts as if it were."""
    settings = make_settings(secret="env:NOT_SET")
    providers = {
        name: one.model_copy(update={"api_key": SecretStr("env:NOT_SET")}) for name, one in settings.providers.items()
    }
    with Estimator(settings.model_copy(update={"providers": providers})) as estimator:
        small, large = (estimator.estimate(job(module_lines=lines)) for lines in (1, 2000))
    assert small.first is not None
    assert small.first.mode == "subscription"
    assert {one.mode for one in large.candidates if one.serves} == {"api"}
    assert {one.provider for one in large.candidates if one.serves} == {"anthropic", "openai", "google"}


def test_what_cannot_be_known_is_said(settings: Settings, estimator: Estimator) -> None:
    """A model that there is not, and Redis that cannot be reached."""
    with pytest.raises(InvalidJobError, match="claude-haiku-5-5"):
        estimator.estimate(job(model="claude-haiku-5-6"))
    away = Settings.model_validate({**settings.model_dump(), "redis_url": "redis://127.0.0.1:1"})
    with Estimator(away) as lost, pytest.raises(ServiceUnavailableError):
        lost.estimate(job())


@pytest.mark.parametrize(
    ("worst", "expected"),
    [
        ([], None),
        (["1", None], None),
        (["1"], "2"),
        (["1", "5", "3"], "16"),
        (["1", "1", "1", "1", "1"], "4"),
    ],
)
def test_the_most_is_that_of_the_dearest_attempts(worst: list[str | None], expected: str | None) -> None:
    """Four attempts, two of a model: each charged at its worst."""
    found = most_usd([None if one is None else Decimal(one) for one in worst], RetrySettings())
    assert found == (None if expected is None else Decimal(expected))
