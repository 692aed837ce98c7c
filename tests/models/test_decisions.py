"""Does each decision leave one line that names what decided it, and nothing of what the job says?"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attune_worker.errors import BudgetExceededError, ExecutionError, NotNowError
from attune_worker.jobs import Job
from attune_worker.models import decisions
from attune_worker.models.breaker import CircuitBreaker
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from tests.conftest import API_KEY

SECRET_PROMPT = "the prompt that no log may show"
LUNA = "openai/gpt-6-luna"
HAIKU = "anthropic/claude-haiku-5-5"

Lines = Callable[..., list[str]]
Run = Callable[..., Any]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Lines]:
    """Return a function that gives the lines of decisions so far that begin with a word."""
    caplog.set_level(logging.DEBUG, logger=decisions.__name__)

    def told(*words: str) -> list[str]:
        found = [record.message for record in caplog.records if record.name == decisions.__name__]
        return [line for line in found if line.startswith(words)] if words else found

    yield told
    assert API_KEY not in caplog.text
    assert SECRET_PROMPT not in caplog.text


@pytest.fixture
def run(settings: Settings) -> Iterator[Run]:
    """Return a function that runs a job in one start, with other settings where they are given."""
    executors: list[EmpathyLLMExecutor] = []

    def start(changes: dict[str, Any] | None = None, **fields: Any) -> Any:
        own = Settings.model_validate({**settings.model_dump(), **(changes or {})})
        executors.append(EmpathyLLMExecutor(own))
        job = Job.parse({"task_type": "summarize", "prompt": SECRET_PROMPT, "max_tokens": 50, **fields})
        return executors[-1].execute(job, job_id="j-1", patience_seconds=0)

    yield start
    for executor in executors:
        executor.close()


@pytest.fixture
def breaker(settings: Settings) -> Iterator[CircuitBreaker]:
    """Return an operator's hand on the fleet's circuits."""
    breaker = CircuitBreaker(settings=settings)
    yield breaker
    breaker.close()


def test_a_route_names_the_rule_and_counts_the_others(run: Run, lines: Lines) -> None:
    """Without a history the static order decides; who cannot serve is counted, with the reason."""
    run(workflow="nightly", stage="write\ntests")
    [line] = lines("route")
    assert line.startswith(
        f"route of job j-1 in nightly/'write\\ntests': {HAIKU}, "
        "the first in the static order: nothing is known of the stage yet; behind it: "
    )
    assert re.search(r"; dropped: \d+ google has no API key \(set GEMINI_API_KEY\)$", line)


def test_a_route_says_when_the_job_or_the_settings_decided(run: Run, lines: Lines) -> None:
    """A job that names its model, and a fleet that does not learn."""
    run(model="claude-haiku-4-5")
    run({"routing": {"adaptive": False}})
    pinned, static = lines("route")
    assert "anthropic/claude-haiku-4-5, the model that the job names" in pinned
    assert f"{HAIKU}, the first in the static order: routing.adaptive is off" in static


def test_a_learned_route_names_the_floor(run: Run, lines: Lines) -> None:
    """The cheapest that meets it, or the best there is where none does."""
    for _ in range(3):
        run()
    run({"routing": {"refresh_seconds": 0.01}})
    assert f"{HAIKU}, the cheapest that meets the floor: 0." in lines("route")[-1]
    run(min_success_rate=1.0)
    assert "the best there is: 0." in lines("route")[-1]
    assert lines("route")[-1].partition("; behind it")[0].endswith("; best effort, none meets what is asked for")


def test_a_call_names_its_model_and_what_was_passed_over(run: Run, lines: Lines, breaker: CircuitBreaker) -> None:
    """An open circuit of a tier, or of the whole provider, is named with the time until which it refuses."""
    run()
    breaker.trip("anthropic", "cheap", 60)
    run()
    breaker.reset()
    breaker.trip("anthropic", None, 60)
    run()
    plain, tier, provider = lines("call")
    until = r" is open until 20\d\d-[-0-9T:.]{18}\d*\+00:00$"
    assert re.fullmatch(rf"call [0-9a-f]{{32}} of job j-1: leave for {HAIKU}", plain)
    assert re.search(rf"leave for {LUNA}; passed over: {HAIKU}: circuit anthropic:cheap{until}", tier)
    assert re.search(rf"leave for {LUNA}; passed over: {HAIKU}: circuit anthropic:\*{until}", provider)


def open_and_over(breaker: CircuitBreaker, provider: str, tier: str | None) -> None:
    """Open a circuit for a time that has passed."""
    breaker.trip(provider, tier, 0.001)
    time.sleep(0.05)


def test_a_probe_is_told(run: Run, lines: Lines, breaker: CircuitBreaker) -> None:
    """The call that finds out whether a circuit may close again."""
    open_and_over(breaker, "anthropic", "cheap")
    run()
    open_and_over(breaker, "anthropic", None)
    run()
    of_tier, of_provider = lines("call")
    assert of_tier.endswith(f"leave for {HAIKU}, as a probe of circuit anthropic:cheap")
    assert of_provider.endswith(f"leave for {HAIKU}, as a probe of circuit anthropic:*")


def test_a_refusal_names_each_candidate_and_its_constraint(
    run: Run, lines: Lines, breaker: CircuitBreaker, settings: Settings, simulator: Simulator
) -> None:
    """An operator's circuit, a limit, a cooldown and a budget, each by its name."""
    breaker.override("openai", "cheap", "open")
    with pytest.raises(NotNowError):
        run(model=LUNA)
    assert f"no leave for job j-1: {LUNA}: circuit openai:cheap was opened by an operator, until 20" in lines()[-1]
    breaker.reset()
    limits = {name: {**one.model_dump(), "requests_per_minute": 1} for name, one in settings.providers.items()}
    run({"providers": limits}, model=LUNA)
    with pytest.raises(NotNowError):
        run({"providers": limits}, model=LUNA)
    assert f"{LUNA}: requests_per_minute is used up until 20" in lines("no leave")[-1]
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "errors": {"rate_limited": 1.0}})
    with pytest.raises(ExecutionError):
        run(model=HAIKU)
    with pytest.raises(ExecutionError):
        run(model=HAIKU)
    assert f"{HAIKU}: its provider asked to be left alone until 20" in lines("no leave")[-1]
    with pytest.raises(BudgetExceededError):
        run({"budgets": [{"per": "day", "limit_usd": 0}]}, model=LUNA)
    assert f"{LUNA}: the hard budget per day has $0.000000000 left and this job needs up to $" in lines("no leave")[-1]


def test_what_is_decided_without_redis_is_told(settings: Settings, lines: Lines, tmp_path: Path) -> None:
    """A process that goes by what it has seen itself says so for each call."""
    with EmbeddedRedis(tmp_path) as server:
        own = Settings.model_validate(settings.model_dump() | {"redis_url": server.url})
    with EmpathyLLMExecutor(own) as executor:
        executor.run("summarize", SECRET_PROMPT, max_tokens=50)
    assert lines("without Redis") == [f"without Redis, for a call without a job: leave for {HAIKU}"]


def test_a_breaker_that_is_asked_directly_tells_refusals_and_probes(lines: Lines, breaker: CircuitBreaker) -> None:
    """With the circuit that decided: the tier's or the provider's; a closed one is silent."""
    assert breaker.is_available("anthropic", "cheap")
    assert lines() == []
    breaker.trip("anthropic", None, 60)
    assert not breaker.is_available("anthropic", "cheap")
    assert re.fullmatch(r"circuit anthropic:\* is open for (60.0|59.\d) s more", lines()[-1])
    open_and_over(breaker, "openai", "cheap")
    assert breaker.is_available("openai", "cheap")
    assert lines()[-1] == "circuit openai:cheap lets a probe through"
    assert not breaker.is_available("openai", "cheap")
    assert lines()[-1].startswith("circuit openai:cheap is half-open, and another call probes it, for ")


def test_nothing_is_made_of_a_decision_that_nobody_reads(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Without DEBUG no line is written."""
    caplog.set_level(logging.INFO, logger=decisions.__name__)
    run()
    assert [record for record in caplog.records if record.name == decisions.__name__] == []
