"""Do several keys and subscriptions of a provider work together? Real executors, ADMIT and SETTLE, a real provider."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis

from attune_worker.budget import Budgets
from attune_worker.credentials import Credentials, CredentialStatus
from attune_worker.errors import ConfigurationError, CredentialError, DeadlineExceededError, NoCandidateError
from attune_worker.jobs import AuthMode, Job
from attune_worker.ledger import Ledger
from attune_worker.models.admission import Admission
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.calls import Outcome, Permit, Quote, Refusal, Request
from attune_worker.models.credentials import DEFAULT, Credential
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.models.orphans import Orphans
from attune_worker.models.registry import Registry
from attune_worker.providers.rate_headers import Observed, QuotaWindow
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys
from tests.conftest import API_KEY

SECOND, TOKEN = "sk-test-second-never-shown", "sk-test-token-never-shown"
KEY_TWO = Credential("two")
TEAM = Credential("team", AuthMode.SUBSCRIPTION)
JOB = Job.parse({"task_type": "summarize", "prompt": "a prompt", "model": "claude-haiku-5-5", "max_tokens": 50})
LEASE = "host:1:0badcafe"
REFUSED = Outcome("failed", "ignored", 30, Decimal(0), 0, error="credential", status=401, refused=True)
LIMITED = Outcome("failed", "ignored", 30, Decimal(0), 0, error="rate_limited", retry_after=30, rate_limited=True)


@pytest.fixture
def make_settings(settings: Settings) -> Callable[..., Settings]:
    """Return a function that gives Anthropic other credentials, and the fleet other settings."""

    def make(*credentials: dict[str, Any], api_key: str | None = API_KEY, **changes: Any) -> Settings:
        fields = settings.model_dump()
        fields["providers"]["anthropic"] |= {"credentials": credentials, "api_key": api_key}
        return Settings.model_validate({**fields, **changes})

    return make


@pytest.fixture
def two_keys(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings({"name": "two", "secret": SECOND})


@pytest.fixture
def team(make_settings: Callable[..., Settings]) -> Settings:
    """A key, and a subscription that may be used up without a pace."""
    return make_settings({"name": "team", "mode": "subscription", "secret": TOKEN, "burst": 1.0})


@pytest.fixture
def make_executor() -> Iterator[Callable[..., EmpathyLLMExecutor]]:
    executors: list[EmpathyLLMExecutor] = []

    def make(settings: Settings, **options: Any) -> EmpathyLLMExecutor:
        executors.append(EmpathyLLMExecutor(settings, **options))
        return executors[-1]

    yield make
    for executor in executors:
        executor.close()


@pytest.fixture
def make_admission() -> Iterator[Callable[[Settings], Admission]]:
    found: list[Admission] = []

    def make(settings: Settings) -> Admission:
        found.append(Admission(settings))
        return found[-1]

    yield make
    for admission in found:
        admission.close()


def accept(simulator: Simulator, *keys: str) -> None:
    simulator.profile = Profile.parse({"api_keys": keys})


def wanted(settings: Settings, *credentials: Credential, tokens: int = 1000, lease: str = "") -> Request:
    [model, *_] = Registry.from_settings(settings).find("anthropic/claude-haiku-5-5")
    quotes = [Quote(model, tokens, Decimal(0) if one.subscription else Decimal("0.5"), one) for one in credentials]
    return Request(uuid4().hex, "job-1", JOB, tuple(quotes), lease)


def permit(admission: Admission, request: Request) -> Permit:
    verdict = admission.admit(request)
    assert isinstance(verdict, Permit), verdict
    return verdict


def refusal(admission: Admission, request: Request) -> Refusal:
    verdict = admission.admit(request)
    assert isinstance(verdict, Refusal), verdict
    return verdict


def answered(tokens: int, utilization: float | None = None) -> Outcome:
    reset_ms = round(time.time() * 1000) // 1000 * 1000 + 3_600_000
    windows = () if utilization is None else (QuotaWindow("5h", utilization, reset_ms, "allowed"),)
    observed = Observed(windows=windows)
    return Outcome("succeeded", "success", 120, Decimal(0), tokens, 0, observed=observed, worth_usd=Decimal("0.25"))


def status(settings: Settings, name: str) -> CredentialStatus:
    [found] = [one for one in Credentials(settings).status()["anthropic"] if one.name == name]
    return found


def test_calls_are_spread_over_the_keys(
    two_keys: Settings, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """Forty calls leave no key idle."""
    accept(simulator, API_KEY, SECOND)
    executor = make_executor(two_keys)
    by = [executor.execute(JOB).attempts[0].credential for _ in range(40)]
    assert set(by) == {"default", "two"}
    assert {record.credential for record in Ledger(two_keys).records()} == {"default", "two"}


def test_refused_key_goes_out_alone_and_visibly(
    two_keys: Settings,
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The job that met it goes on by the other key, on the same model, and nobody meets it a second time."""
    accept(simulator, SECOND)
    executor = make_executor(two_keys)
    with caplog.at_level(logging.INFO):
        responses = [executor.execute(JOB) for _ in range(30)]
    attempts = [attempt for response in responses for attempt in response.attempts]
    failed = [attempt for attempt in attempts if attempt.outcome == "failed"]
    assert [(one.credential, one.status, one.error_type) for one in failed] == [("default", 401, "credential")]
    assert {response.model_id for response in responses} == {"claude-haiku-5-5"}
    [line] = [record.getMessage() for record in caplog.records if "credential" in record.getMessage()]
    assert line == "credential anthropic:default: its provider refused it; one call tries it again in 60 s"
    shown = status(two_keys, "default").refused
    assert shown is not None
    assert (shown.error, shown.status) == ("credential", 401)
    assert 55 < (shown.recheck_at - shown.since).total_seconds() <= 60
    assert status(two_keys, "two").refused is None


def test_refused_key_is_tried_again_by_one_call_and_comes_back(
    make_settings: Callable[..., Settings],
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    redis: Redis,
) -> None:
    """When the check is due, and the provider has changed its mind."""
    settings = make_settings(auth={"recheck_seconds": 600})
    accept(simulator, "another")
    executor = make_executor(settings)
    with pytest.raises(CredentialError):
        executor.execute(JOB)
    with pytest.raises(DeadlineExceededError, match="does not accept this key at the moment"):
        executor.execute(JOB, 60)
    assert len(simulator.requests()["requests"]) == 1
    accept(simulator, API_KEY)
    redis.hset(FleetKeys(settings.namespace).credential("anthropic", "default"), "recheck_ms", 1)  # that much later
    assert executor.execute(JOB).content
    assert status(settings, "default").refused is None
    assert len(simulator.requests()["requests"]) == 2


def test_a_job_is_answered_as_long_as_one_key_is_accepted(
    make_settings: Callable[..., Settings], make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """Calls by keys that are refused count as none of ``max_attempts``, and cost nothing."""
    bad = [{"name": f"bad-{number}", "secret": f"sk-test-bad-{number}"} for number in range(5)]
    settings = make_settings(*bad, {"name": "good", "secret": SECOND}, retry={"max_attempts": 1})
    accept(simulator, SECOND)
    executor, credentials = make_executor(settings), Credentials(settings)
    met = set()
    for _ in range(20):
        *refused, last = executor.execute(JOB).attempts
        assert (last.credential, last.outcome) == ("good", "succeeded")
        assert all((one.error_type, one.cost_usd) == ("credential", 0) for one in refused)
        met.add(len(refused))
        credentials.reset("anthropic")
    assert max(met) > 1


def test_reset_has_a_key_tried_again_at_once(
    two_keys: Settings, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """After an operator has paid the bill; only of keys that are configured."""
    accept(simulator, "another")
    executor = make_executor(two_keys)
    with pytest.raises(CredentialError):
        executor.execute(JOB)
    accept(simulator, API_KEY, SECOND)
    credentials = Credentials(two_keys)
    assert credentials.reset("anthropic", "two")
    assert not credentials.reset("anthropic", "two")
    assert executor.execute(JOB).attempts[0].credential == "two"
    with pytest.raises(ConfigurationError, match="no credential 'thre'; configured: default, two"):
        credentials.reset("anthropic", "thre")
    with pytest.raises(ConfigurationError, match="'antropic' is not a provider"):
        credentials.reset("antropic")


def test_job_of_a_later_start_does_not_meet_a_refused_key_again(
    two_keys: Settings, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """Also where the fleet has forgotten it meanwhile."""
    accept(simulator, SECOND)
    executor = make_executor(two_keys)
    responses = (executor.execute(JOB) for _ in range(100))
    attempts = next(response.attempts for response in responses if len(response.attempts) == 2)
    Credentials(two_keys).reset("anthropic")
    for _ in range(10):
        assert executor.execute(JOB, attempts=attempts[:1]).attempts[1].credential == "two"


def test_cooldown_is_of_one_key(two_keys: Settings, make_admission: Callable[[Settings], Admission]) -> None:
    """A 429 on one of them leaves the other, and the default key's limits are where they were before there were two."""
    admission = make_admission(two_keys)
    admission.settle(permit(admission, wanted(two_keys, KEY_TWO)), LIMITED)
    assert "asked to be left alone" in refusal(admission, wanted(two_keys, KEY_TWO)).reason
    assert permit(admission, wanted(two_keys, KEY_TWO, DEFAULT)).credential == DEFAULT
    admission.settle(permit(admission, wanted(two_keys, DEFAULT)), LIMITED)
    refused = refusal(admission, wanted(two_keys, KEY_TWO, DEFAULT))
    assert 0 < refused.retry_after_seconds <= 30
    assert FleetKeys("ns").limits("p", "m", "default") == FleetKeys("ns").limits("p", "m")


def test_secrets_are_shown_nowhere(
    team: Settings, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator, redis: Redis
) -> None:
    """Not in settings, errors, statuses or Redis."""
    accept(simulator, "another")
    executor = make_executor(team)
    with pytest.raises(CredentialError) as caught:
        executor.run("summarize", "a prompt", model="claude-haiku-5-5", auth_mode="subscription")
    shown = [repr(team), repr(caught.value.attempts), str(caught.value), repr(Credentials(team).status())]
    shown += [repr(redis.dump(key)) for key in redis.scan_iter(match=f"*{team.namespace}*")]
    assert not any(secret in text for secret in (API_KEY, TOKEN) for text in shown)


def test_call_by_subscription_costs_quota_and_no_money(
    team: Settings, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """Nothing is taken from an empty budget or a max_cost of nothing; tokens are counted, and the mode is on record."""
    accept(simulator, TOKEN)
    settings = Settings.model_validate({**team.model_dump(), "budgets": [{"per": "day", "limit_usd": 0}]})
    response = make_executor(settings).run(
        "summarize", "a prompt", model="claude-haiku-5-5", auth_mode="subscription", max_cost=0
    )
    assert (response.auth_mode, response.cost_usd) == ("subscription", 0)
    [attempt] = response.attempts
    assert (attempt.auth_mode, attempt.credential, attempt.cost_usd) == (AuthMode.SUBSCRIPTION, "team", 0)
    [record] = Ledger(settings).records()
    assert (record.mode, record.credential, record.cost_usd, record.estimate_usd) == ("subscription", "team", 0, 0)
    assert (record.input_tokens or 0) > 0
    [budget] = Budgets(settings).status()
    assert (budget.spent_usd, budget.reserved_usd) == (0, 0)
    [row] = Ledger(settings).report(1, ["mode"])
    assert (row.keys, row.cost_usd, row.unknown_calls) == ({"mode": "subscription"}, 0, 0)


@pytest.mark.parametrize(("lines", "mode"), [(499, "subscription"), (500, "api")])
def test_strategy_decides_by_the_size_of_the_module(
    team: Settings,
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
    lines: int,
    mode: str,
) -> None:
    """With one line in the log for the mode, and one for the call, each of which names what decided."""
    accept(simulator, API_KEY, TOKEN)
    with caplog.at_level(logging.DEBUG, logger="attune_worker"):
        response = make_executor(team, strategy=lambda: AuthStrategy(medium_module_threshold=500)).execute(
            JOB.model_copy(update={"module_lines": lines}), job_id="job-1"
        )
    assert response.auth_mode == mode
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("auth ")]
    of_mode, of_call = told
    assert of_mode.startswith(f"auth mode of job job-1, taken for {lines} lines: {mode}, because it is")
    assert of_call.startswith(f"auth of call {response.attempts[0].call_id} to anthropic/claude-haiku-5-5: ")
    assert "the strategy recommends" in of_call


def test_wish_that_nobody_can_meet_is_said_with_the_reason(
    settings: Settings, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """And nothing is paid for instead, unless that is allowed."""
    executor = make_executor(settings)
    with pytest.raises(NoCandidateError, match="anthropic: has no subscription, which the job asks for"):
        executor.run("summarize", "?", auth_mode="subscription")
    assert simulator.requests()["requests"] == []
    assert executor.run("summarize", "?", auth_mode="subscription", spill_to_api=True).auth_mode == "api"


@pytest.mark.parametrize("spill", [False, True])
def test_used_up_quota_waits_or_spills_as_it_is_told(
    team: Settings,
    make_admission: Callable[[Settings], Admission],
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    spill: bool,
) -> None:
    """No other provider's bill either, unless the job allows it."""
    accept(simulator, API_KEY, TOKEN)
    admission = make_admission(team)
    admission.settle(permit(admission, wanted(team, TEAM)), answered(1000, 1.0))
    executor = make_executor(team, strategy=lambda: AuthStrategy(default_mode=AuthMode.SUBSCRIPTION))
    job = Job.parse({"task_type": "summarize", "prompt": "?", "max_tokens": 50, "spill_to_api": spill})
    if spill:
        assert executor.execute(job).auth_mode == "api"
    else:
        with pytest.raises(DeadlineExceededError, match="by team: the subscription's quota is used up"):
            executor.execute(job)
        assert simulator.requests()["requests"] == []


def test_crowd_of_workers_never_goes_over_a_shared_window(
    team: Settings, make_admission: Callable[[Settings], Admission]
) -> None:
    """Two workers, twenty threads, 89 % of 100,000 tokens used: ten calls of a thousand fit for certain, or fewer."""
    workers = [make_admission(team) for _ in range(2)]
    for utilization in (0.84, 0.89):  # 5,000 tokens: so many in a rise of 0.05 are 83,333 in all, at least
        permits = [permit(workers[0], wanted(team, TEAM, tokens=5000))]
        workers[0].settle(permits[0], answered(5000, utilization))
    workers[0].settle(permit(workers[0], wanted(team, TEAM, tokens=100)), answered(0, 0.89))
    capacity = status(team, "team").windows["5h"].capacity_tokens
    assert capacity is not None
    assert 80_000 < capacity <= 100_000
    gate = threading.Barrier(20)

    def ask(place: int) -> Permit | Refusal:
        gate.wait()
        return workers[place % 2].admit(wanted(team, TEAM, DEFAULT, tokens=1000))

    with ThreadPoolExecutor(20) as threads:
        verdicts = [verdict for verdict in threads.map(ask, range(20)) if isinstance(verdict, Permit)]
    by = [verdict.credential for verdict in verdicts]
    assert 7 <= by.count(TEAM) <= 10
    assert by.count(DEFAULT) == 20 - by.count(TEAM)
    shown = status(team, "team")
    assert (shown.in_flight, shown.reserved_tokens) == (by.count(TEAM), 1000 * by.count(TEAM))


def test_orphaned_reservation_comes_back_as_used(
    team: Settings, make_admission: Callable[[Settings], Admission], redis: Redis
) -> None:
    """The worker died: its call is not under way any more, and may have used all that it had reserved, for no money."""
    keys = FleetKeys(team.namespace)
    redis.zadd(keys.workers, {LEASE: 2**45})
    admission = make_admission(team)
    admission.settle(permit(admission, wanted(team, TEAM)), answered(10, 0.5))
    taken = permit(admission, wanted(team, TEAM, tokens=700, lease=LEASE))
    assert (status(team, "team").in_flight, status(team, "team").reserved_tokens) == (1, 700)
    orphans = Orphans(Settings.model_validate({**team.model_dump(), "providers": {}}), redis)
    attempts = orphans.of_job("job-1", LEASE)
    assert attempts[-1].model_dump(include={"outcome", "auth_mode", "credential", "cost_usd"}) == {
        "outcome": "orphaned",
        "auth_mode": AuthMode.SUBSCRIPTION,
        "credential": "team",
        "cost_usd": 0,
    }
    shown = status(team, "team")
    assert (shown.in_flight, shown.reserved_tokens, shown.windows["5h"].counted_tokens) == (0, 0, 710)
    admission.settle(taken, answered(300, 0.51))  # it lived after all
    again = status(team, "team")
    assert (again.in_flight, again.windows["5h"].utilization, again.windows["5h"].counted_tokens) == (0, 0.51, 700)
    assert [record.cost_usd for record in Ledger(team).records()] == [0, 0, 0]


@pytest.mark.parametrize("taken_place", [0, 1])
def test_leave_that_nobody_heard_of_is_given_back_whichever_it_was(
    team: Settings, make_admission: Callable[[Settings], Admission], taken_place: int
) -> None:
    """Both candidates are the same model, so only the credential tells which one was taken."""
    admission = make_admission(team)
    credentials = (TEAM, DEFAULT) if taken_place == 0 else (DEFAULT, TEAM)
    request = wanted(team, *credentials)
    taken = permit(admission, request)
    other = dataclasses.replace(taken, quote=request.quotes[1])
    admission.settle(other, Outcome.released())
    expected = 1 if taken.credential == TEAM else 0
    assert status(team, "team").in_flight == expected
    admission.settle(taken, Outcome.released())
    assert status(team, "team").in_flight == 0


def test_no_call_by_subscription_while_redis_is_away(
    team: Settings, make_admission: Callable[[Settings], Admission]
) -> None:
    """Nobody could say what the others use; a key goes by what this process knows."""
    nowhere = Settings.model_validate({**team.model_dump(), "redis_url": "redis://127.0.0.1:1"})
    admission = make_admission(nowhere)
    assert "a quota cannot be kept" in refusal(admission, wanted(team, TEAM)).reason
    assert permit(admission, wanted(team, TEAM, DEFAULT)).credential == DEFAULT


def test_refused_call_takes_out_a_subscription_too(
    team: Settings, make_admission: Callable[[Settings], Admission]
) -> None:
    """Its token has expired: the quota does not matter then."""
    admission = make_admission(team)
    admission.settle(permit(admission, wanted(team, TEAM)), REFUSED)
    assert "does not accept this key" in refusal(admission, wanted(team, TEAM)).reason
    shown = status(team, "team")
    assert shown.refused is not None
    assert (shown.in_flight, shown.windows) == (0, {})


def test_status_says_what_there_is(make_settings: Callable[..., Settings], redis: Redis) -> None:
    """Also of a credential whose secret is missing here, and over garbage in Redis."""
    settings = make_settings({"name": "gone", "secret": "env:NOT_SET"}, api_key=None)
    redis.hset(
        FleetKeys(settings.namespace).credential("anthropic", "gone"), mapping={"refused_ms": b"\xff", "calls": "x"}
    )
    found = Credentials(settings).status()
    assert found["anthropic"] == (CredentialStatus("gone", AuthMode.API, present=False, variable="NOT_SET"),)
    assert found["openai"] == (CredentialStatus("default", AuthMode.API, present=True),)
