"""What does one start of a job ask for, step by step, and what when it is told no, or broken off? No I/O."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from pydantic import SecretStr

from attune_worker.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    ExecutionError,
    NotNowError,
    OverloadedError,
    ProviderTimeoutError,
    StoppedError,
)
from attune_worker.jobs import Attempt, Job, ModelTier
from attune_worker.models.adaptive import AdaptiveModelRouter
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.calls import Outcome, Permit, Refusal
from attune_worker.models.effects import Admit, Effect, Flow, Rank, Reply, Send, Settle, Unsent, Wait
from attune_worker.models.flow import ADMITTED_TOGETHER, Caller
from attune_worker.models.progress import Start
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.providers.base import HttpResponse
from attune_worker.sections import CredentialSettings
from attune_worker.settings import Settings

JOB = Job.parse({"task_type": "summarize", "prompt": "a prompt"})
ANSWER = HttpResponse(
    200,
    {},
    json.dumps(
        {
            "id": "msg_1",
            "model": "claude-haiku-5-5",
            "role": "assistant",
            "type": "message",
            "content": [{"type": "text", "text": "an answer"}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 3, "output_tokens": 2},
        }
    ).encode(),
)
OVERLOADED = HttpResponse(529, {}, b"{}")
RATE_LIMITED = HttpResponse(429, {}, b"{}")
SHORT = 20.0
"""Seconds; they are over when ``later`` says so."""

FAILED = Attempt(
    model_id="claude-haiku-5-5",
    provider="anthropic",
    tier=ModelTier.CHEAP,
    outcome="failed",
    error_type="overloaded",
    latency_ms=1,
    cost_usd=Decimal("0.25"),
)


class Ranked:
    """A flow whose first effect, the ranking, is performed by itself; ``then`` is what happens right after it."""

    def __init__(self, caller: Caller, flow: Flow) -> None:
        self._caller = caller
        self._flow = flow
        self._begun = False
        self.then: Callable[[], None] = lambda: None

    def send(self, reply: Reply) -> Effect:
        if not self._begun:
            self._begun = True
            effect = self._flow.send(None)
            assert isinstance(effect, Rank)
            reply = self._caller.rank(effect.job, None)
            self.then()
        return self._flow.send(reply)

    def refused(self, refusal: Refusal) -> Effect:
        """Refuse all that is asked for, and return what the flow does then."""
        effect = self.send(refusal)
        while isinstance(effect, Admit):
            effect = self.send(refusal)
        return effect

    def close(self) -> None:
        self._flow.close()


class Lab:
    """Flows of one caller; what was abandoned is kept."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.abandoned: list[tuple[Permit, Outcome]] = []
        self.strategy = AuthStrategy()
        registry = Registry.from_settings(settings)
        self.router = AdaptiveModelRouter(settings, registry)
        self._caller = Caller(
            settings, registry, self.router, lambda *ended: self.abandoned.append(ended), lambda: self.strategy
        )

    def candidates(self) -> tuple[ModelInfo, ...]:
        return self._caller.offers.candidates(JOB).models

    def flow(self, job: Job = JOB, **start: Any) -> Ranked:
        return Ranked(self._caller, self._caller.flow(Start(job, **start)))


@pytest.fixture
def make_lab(settings: Settings) -> Iterator[Callable[..., Lab]]:
    labs: list[Lab] = []

    def make(**changes: Any) -> Lab:
        labs.append(Lab(settings.model_copy(update=changes)))
        return labs[-1]

    yield make
    for lab in labs:
        lab.router.close()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function after which it is so many seconds later, by the clock that flows go by."""
    real, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def pass_time(seconds: float) -> None:
        ahead[0] += seconds

    return pass_time


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


def permit(effect: Effect, place: int = 0) -> Permit:
    assert isinstance(effect, Admit), effect
    request = effect.request
    return Permit(request.call_id, request.job, request.quotes[place], (), 1_795_392_000_000)


def error_of(flow: Ranked, reply: Any) -> ExecutionError:
    with pytest.raises(ExecutionError) as caught:
        flow.refused(reply)
    return caught.value


def test_admit_send_settle_in_this_order(lab: Lab) -> None:
    """Leave before the call, and what it did before the answer is passed on."""
    flow = lab.flow()
    taken = permit(flow.send(None))
    sent = flow.send(taken)
    assert isinstance(sent, Send)
    settled = flow.send(ANSWER)
    assert isinstance(settled, Settle)
    assert settled.permit is taken
    assert (settled.outcome.outcome, settled.outcome.input_tokens, settled.outcome.output_tokens) == ("succeeded", 3, 2)
    with pytest.raises(StopIteration) as end:
        flow.send(None)
    answer, attempts = end.value.value
    assert answer.content == "an answer"
    assert [attempt.call_id for attempt in attempts] == [taken.call_id]
    assert lab.abandoned == []


def test_candidates_are_offered_together_with_their_worst_case(lab: Lab) -> None:
    """So that one round trip finds the first that may be called; each with what it could cost at most."""
    effect = lab.flow().send(None)
    assert isinstance(effect, Admit)
    quotes = effect.request.quotes
    assert 1 < len(quotes) <= ADMITTED_TOGETHER
    assert len({quote.model for quote in quotes}) == len(quotes)
    assert all(quote.worst_usd and quote.tokens > JOB.text_bytes // 4 for quote in quotes)


def test_call_goes_to_the_model_that_leave_was_given_for(lab: Lab) -> None:
    """Not to the one that was asked for first."""
    flow = lab.flow()
    taken = permit(flow.send(None), 1)
    sent = flow.send(taken)
    assert isinstance(sent, Send)
    assert json.loads(sent.request.body)["model"] == taken.model.id


def test_each_retry_asks_for_leave_again_under_a_new_id(lab: Lab) -> None:
    """A budget or breaker that has room for one call need not have it for two."""
    flow = lab.flow()
    first = permit(flow.send(None))
    flow.send(first)
    settled = flow.send(OVERLOADED)
    assert isinstance(settled, Settle)
    assert (settled.outcome.health, settled.outcome.cost_usd) == ("failure", 0)
    effect = flow.send(None)
    while isinstance(effect, Wait):
        effect = flow.send(None)
    assert permit(effect).call_id != first.call_id


def test_short_refusal_is_waited_for_and_asked_again(lab: Lab) -> None:
    """As long as it was told to."""
    flow = lab.flow()
    permit(flow.send(None))
    assert flow.refused(Refusal("busy", 1.5)) == Wait(1.5)
    assert isinstance(flow.send(None), Admit)


def test_every_candidate_is_asked_before_the_job_waits(lab: Lab) -> None:
    """A few at a time: one that is free may stand behind many that are not."""
    flow = lab.flow()
    asked = []
    effect = flow.send(None)
    while isinstance(effect, Admit):
        asked.append([quote.model.ref for quote in effect.request.quotes])
        effect = flow.send(Refusal("busy", 10.0 - len(asked)))
    names = [name for group in asked for name in group]
    assert len(asked) > 1
    assert all(len(group) <= ADMITTED_TOGETHER for group in asked)
    assert len(set(names)) == len(names) == len(lab.candidates())
    assert effect == Wait(10.0 - len(asked))  # the soonest of all


def test_money_is_the_reason_only_where_it_is_for_all(lab: Lab) -> None:
    """A model that may be called in a while is worth waiting for."""
    flow = lab.flow()
    effect = flow.send(None)
    assert isinstance(effect, Admit)
    effect = flow.send(Refusal("no money", 3600.0, for_budget=True))
    assert isinstance(effect, Admit)
    assert flow.refused(Refusal("busy", 1.5)) == Wait(1.5)


def test_refusal_beyond_patience_puts_the_job_back(lab: Lab) -> None:
    """With what was tried, why, and when to come again."""
    flow = lab.flow(patience_seconds=1.0, attempts=(FAILED,))
    permit(flow.send(None))
    error = error_of(flow, Refusal("everybody is busy", 30.0))
    assert isinstance(error, NotNowError)
    assert (error.message, error.retry_after, error.attempts) == ("everybody is busy", 30.0, (FAILED,))


def test_refusal_that_outlasts_the_deadline_ends_the_job_at_once(lab: Lab) -> None:
    """With the reason and the time at which it could have been; nobody waits for nothing."""
    flow = lab.flow(timeout_seconds=10.0)
    permit(flow.send(None))
    error = error_of(flow, Refusal("everybody is busy", 30.0))
    assert isinstance(error, DeadlineExceededError)
    assert "everybody is busy; earliest in 30.0 s" in error.message
    assert error.retry_after == 30.0


def test_empty_budget_ends_the_job_at_once(lab: Lab) -> None:
    """Also with patience: a day is no wait for a worker."""
    flow = lab.flow(patience_seconds=1.0)
    permit(flow.send(None))
    error = error_of(flow, Refusal("no money", 3600.0, for_budget=True))
    assert isinstance(error, BudgetExceededError)
    assert error.retry_after == 3600.0


def test_attempts_of_earlier_starts_count(make_lab: Callable[..., Lab], settings: Settings) -> None:
    """All that the job may make were made, so none is asked for; the last error says how."""
    lab = make_lab(retry=settings.retry.model_copy(update={"max_attempts": 2}))
    error = error_of(lab.flow(attempts=(FAILED, FAILED)), None)
    assert isinstance(error, OverloadedError)
    assert error.attempts == (FAILED, FAILED)


def test_decision_goes_with_the_first_call_of_a_job(lab: Lab) -> None:
    """What comes after a failure, in this start or an earlier one, was not drawn."""
    for earlier, decided in (((), True), ((FAILED,), False)):
        flow = lab.flow(attempts=earlier)
        flow.send(permit(flow.send(None)))
        flow.send(ANSWER)
        with pytest.raises(StopIteration) as end:
            flow.send(None)
        assert (end.value.value[1][-1].decision is not None) == decided


def test_model_that_failed_too_often_in_earlier_starts_is_not_asked_again(lab: Lab) -> None:
    """Two attempts per model, over all starts."""
    effect = lab.flow(attempts=(FAILED, FAILED)).send(None)
    assert isinstance(effect, Admit)
    assert "claude-haiku-5-5" not in [quote.model.id for quote in effect.request.quotes]


def test_cost_of_earlier_starts_counts_towards_max_cost(lab: Lab) -> None:
    """What is left of it has to cover the worst case of every model that is asked; unknown costs count at worst."""
    job = Job.parse({"task_type": "summarize", "prompt": "a prompt", "max_cost": "0.3"})
    spent = lab.flow(job, attempts=(replace_cost(FAILED, "0.2999"),))
    assert isinstance(error_of(spent, None), OverloadedError)
    effect = lab.flow(job, attempts=(replace_cost(FAILED, "0.2"),)).send(None)
    assert isinstance(effect, Admit)
    assert all(quote.worst_usd is not None and quote.worst_usd <= Decimal("0.1") for quote in effect.request.quotes)
    unknown = lab.flow(job, attempts=(replace_cost(FAILED, None),)).send(None)
    assert isinstance(unknown, Admit)


def replace_cost(attempt: Attempt, cost_usd: str | None) -> Attempt:
    return attempt.model_copy(update={"cost_usd": None if cost_usd is None else Decimal(cost_usd)})


def test_call_that_is_broken_off_is_settled_as_abandoned(lab: Lab) -> None:
    """Whoever drove the flow was cancelled: the provider may charge, and the permit comes back."""
    flow = lab.flow()
    taken = permit(flow.send(None))
    flow.send(taken)
    flow.close()
    [(given_back, outcome)] = lab.abandoned
    assert given_back is taken
    assert (outcome.outcome, outcome.health, outcome.cost_usd, outcome.error) == (
        "failed",
        "ignored",
        None,
        "stopped",
    )


def test_call_that_was_not_sent_after_all_is_released_and_ends_the_start(lab: Lab) -> None:
    """It costs nothing and is no attempt: those of earlier starts are all there were."""
    flow = lab.flow(attempts=(FAILED,))
    taken = permit(flow.send(None))
    assert isinstance(flow.send(taken), Send)
    assert flow.send(Unsent(StoppedError("its lease was lost"))) == Settle(taken, Outcome.released())
    with pytest.raises(StoppedError) as caught:
        flow.send(None)
    assert (caught.value.message, caught.value.attempts) == ("its lease was lost", (FAILED,))
    assert lab.abandoned == []


def test_release_that_is_broken_off_is_handed_over(lab: Lab) -> None:
    """As every settlement is: the call is not taken for one that may have cost something."""
    flow = lab.flow()
    taken = permit(flow.send(None))
    flow.send(taken)
    flow.send(Unsent(StoppedError("its lease was lost")))
    flow.close()
    assert lab.abandoned == [(taken, Outcome.released())]


def test_settlement_that_is_broken_off_is_handed_over(lab: Lab) -> None:
    """Nobody knows whether it was written; the second time counts for nothing."""
    flow = lab.flow()
    taken = permit(flow.send(None))
    flow.send(taken)
    settled = flow.send(ANSWER)
    assert isinstance(settled, Settle)
    flow.close()
    assert lab.abandoned == [(taken, settled.outcome)]


def test_leave_for_a_call_that_cannot_be_built_is_given_back(lab: Lab) -> None:
    """It was never made, so it costs nothing."""
    flow = lab.flow()
    taken = permit(flow.send(None))
    nowhere = replace(taken, quote=replace(taken.quote, model=replace(taken.model, id="\ud800")))
    with pytest.raises(UnicodeEncodeError):
        flow.send(nowhere)
    [(given_back, outcome)] = lab.abandoned
    assert given_back is nowhere
    assert (outcome.outcome, outcome.cost_usd) == ("released", 0)


@pytest.mark.parametrize("closed_at", ["before the first step", "while asking", "while waiting"])
def test_nothing_is_settled_that_was_not_taken(lab: Lab, closed_at: str) -> None:
    """A flow that ends without leave owes nothing."""
    flow = lab.flow()
    if closed_at != "before the first step":
        permit(flow.send(None))
    if closed_at == "while waiting":
        assert isinstance(flow.refused(Refusal("busy", 1.0)), Wait)
    flow.close()
    assert lab.abandoned == []


def test_call_gets_no_more_time_than_the_job_has(lab: Lab) -> None:
    """The deadline bounds the request itself."""
    flow = lab.flow(timeout_seconds=7.0)
    sent = flow.send(permit(flow.send(None)))
    assert isinstance(sent, Send)
    assert 0 < sent.timeout_seconds <= 7.0


def test_timeout_is_a_cost_that_nobody_knows(lab: Lab) -> None:
    """So the reservation stands."""
    flow = lab.flow()
    flow.send(permit(flow.send(None)))
    settled = flow.send(ProviderTimeoutError("no answer"))
    assert isinstance(settled, Settle)
    assert (settled.outcome.cost_usd, settled.outcome.tokens, settled.outcome.health) == (None, None, "failure")


def test_time_that_is_up_asks_for_nothing(lab: Lab) -> None:
    """No leave is taken for a call that could not be waited for."""
    flow = lab.flow(timeout_seconds=1e-9)
    began = time.monotonic()
    while time.monotonic() == began:
        pass
    assert isinstance(error_of(flow, None), DeadlineExceededError)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        ({"patience_seconds": 30.0}, NotNowError),
        ({"patience_seconds": 30.0, "timeout_seconds": 1000.0}, NotNowError),
        ({"patience_seconds": 30.0, "timeout_seconds": SHORT}, DeadlineExceededError),
        ({}, DeadlineExceededError),
    ],
)
def test_wait_that_took_longer_than_the_start_ends_a_worker_s_job_only_at_its_deadline(
    make_lab: Callable[..., Lab], later: Callable[[float], None], start: dict[str, Any], kind: type[ExecutionError]
) -> None:
    """It is put back with the reason; a program that waits for the answer itself has no other start."""
    flow = make_lab(timeout_seconds=SHORT).flow(**start)
    permit(flow.send(None))
    assert flow.refused(Refusal("everybody is busy", 0.01)) == Wait(0.01)
    later(SHORT)
    error = error_of(flow, None)
    assert type(error) is kind
    assert kind is DeadlineExceededError or error.message == "everybody is busy"


@pytest.mark.parametrize("reply", [RATE_LIMITED, ProviderTimeoutError("no answer")])
def test_call_that_took_up_the_start_ends_the_job(
    make_lab: Callable[..., Lab], later: Callable[[float], None], reply: Reply
) -> None:
    """Also a worker's, whether another model or the same one, a while later, would be next."""
    flow = make_lab(timeout_seconds=SHORT).flow(patience_seconds=30.0)
    flow.send(permit(flow.send(None)))
    later(SHORT)
    assert isinstance(flow.send(reply), Settle)
    error = error_of(flow, None)
    assert isinstance(error, DeadlineExceededError)
    assert len(error.attempts) == 1


def test_wait_leaves_a_call_of_the_same_start_enough_time(make_lab: Callable[..., Lab]) -> None:
    """Else the job is put back: a call of milliseconds would be paid for in vain, and end the job."""
    lab = make_lab(timeout_seconds=20.0)
    flow = lab.flow(patience_seconds=30.0)
    permit(flow.send(None))
    error = error_of(flow, Refusal("everybody is busy", 11.0))
    assert isinstance(error, NotNowError)
    assert error.retry_after == 11.0
    for flow in (lab.flow(patience_seconds=30.0, timeout_seconds=15.0), lab.flow()):
        permit(flow.send(None))
        assert flow.refused(Refusal("everybody is busy", 11.0)) == Wait(11.0)


@pytest.fixture
def subscribed(make_lab: Callable[..., Lab], settings: Settings) -> Lab:
    """A caller with a subscription to Anthropic, and keys to that and to another provider."""
    team = CredentialSettings(name="team", mode="subscription", secret=SecretStr("sk-never-shown"))
    providers = dict(settings.providers)
    providers["anthropic"] = providers["anthropic"].model_copy(update={"credentials": (team,)})
    providers["openai"] = providers["openai"].model_copy(update={"api_key": SecretStr("sk-never-shown-either")})
    return make_lab(providers=providers)


def test_strategy_that_comes_after_the_ranking_lets_nothing_spill(subscribed: Lab) -> None:
    """The models were ranked to be paid by the token; now only those of the subscription's provider are asked."""

    def change() -> None:
        subscribed.strategy = AuthStrategy()

    subscribed.strategy = AuthStrategy(default_mode="api")
    flow = subscribed.flow()
    flow.then = change
    effect, asked = flow.send(None), []
    while isinstance(effect, Admit):
        asked += [(quote.model.provider, quote.credential.name) for quote in effect.request.quotes]
        effect = flow.send(Refusal("the quota is used up", 1.0))
    assert set(asked) == {("anthropic", "team")}


def test_strategy_that_comes_after_the_ranking_leaves_no_way(subscribed: Lab) -> None:
    """Only a subscription was cheap enough, and now it is not to be used: the job is routed anew, and not lost."""

    def change() -> None:
        subscribed.strategy = AuthStrategy(default_mode="api")

    job = Job.parse({"task_type": "summarize", "prompt": "a prompt", "max_cost": "0.000000001"})
    flow = subscribed.flow(job, patience_seconds=1.0)
    flow.then = change
    with pytest.raises(NotNowError, match="strategy has changed"):
        flow.send(None)
