from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import (
    BadRequestError,
    ContextTooLongError,
    CredentialError,
    MalformedAnswerError,
    OverloadedError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitedError,
)
from attune_worker.jobs import Attempt, ModelTier
from attune_worker.models.credentials import Credential, Ways
from attune_worker.models.policy import Failure, NextCall, in_turn, next_call, seen_before
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.sections import RetrySettings


def model(ref: str, window: int | None = 1000) -> ModelInfo:
    provider, _, name = ref.partition("/")
    return ModelInfo(name, provider, ModelTier.CHEAP, context_window=window)


A1, A2, B1, C1 = model("a/1"), model("a/2"), model("b/1"), model("c/1")
SETTINGS = RetrySettings(max_attempts=4, max_attempts_per_model=2, backoff_seconds=1.0, backoff_cap_seconds=8.0)
TRANSIENT = [OverloadedError, ProviderTimeoutError, ProviderConnectionError, MalformedAnswerError]
FINAL_HERE = [CredentialError, ContextTooLongError, BadRequestError]


def failed(*failures: tuple[ModelInfo, ProviderError]) -> list[Failure]:
    return [Failure(*failure) for failure in failures]


def decide(
    candidates: Sequence[ModelInfo],
    failures: Sequence[Failure],
    settings: RetrySettings = SETTINGS,
    remaining: float = 1000.0,
    random: Callable[[], float] = lambda: 1.0,
) -> NextCall | None:
    return alone(next_call(candidates, failures, settings, remaining, random))


def alone(step: NextCall | None) -> NextCall | None:
    """The next call without what may stand in for it."""
    return step and NextCall(step.model, step.wait_seconds)


def test_first_call_is_the_first_choice_at_once() -> None:
    """Nothing has happened yet, so nothing is waited for."""
    assert decide([A1, B1], []) == NextCall(A1, 0)


def test_the_other_candidates_stand_in_for_the_first_one() -> None:
    """Where the fleet leaves the first choice alone, the next one is called and nothing is waited for."""
    step = next_call([A1, B1, C1], [], SETTINGS, 1000.0, lambda: 1.0)
    assert step == NextCall(A1, 0.0, (B1, C1))


def test_only_who_is_ready_by_then_stands_in() -> None:
    """A model in a longer backoff than the chosen one, or out of tries, is nobody's substitute."""
    failures = [Failure(A1, RateLimitedError("x", retry_after=60.0)), Failure(B1, OverloadedError("x"))]
    step = next_call([A1, A2, B1, C1], failures, SETTINGS, 1000.0, lambda: 1.0)
    assert step == NextCall(B1, 1.0, (A2, C1))


def test_an_attempt_of_an_earlier_start_counts_like_any_failure() -> None:
    """The budget of attempts spans all starts of a job, and what was waited for is not waited for again."""
    registry = Registry([A1, B1])
    attempts = [
        Attempt(model_id="1", provider="a", tier=ModelTier.CHEAP, outcome="failed", error_type=kind.type, latency_ms=1)
        for kind in (OverloadedError, OverloadedError, CredentialError)
    ]
    failures = [seen_before(attempt, registry) for attempt in attempts]
    assert [type(failure.error) for failure in failures] == [OverloadedError, OverloadedError, CredentialError]
    assert decide([A1, B1], failures[:1]) == NextCall(A1, 0.0)
    assert decide([A1, B1], failures[:2]) == NextCall(B1, 0.0)
    assert decide([A1, A2, B1], failures[2:]) == NextCall(B1, 0.0)


@pytest.mark.parametrize(("outcome", "error_type"), [("orphaned", None), ("failed", "stopped")])
def test_an_attempt_whose_worker_ended_counts_as_no_try(outcome: str, error_type: str | None) -> None:
    """It says nothing of the model: that is called again, however often it happened, and other failures still count."""
    fields = {"model_id": "1", "provider": "a", "tier": "cheap", "outcome": outcome, "error_type": error_type}
    ended = seen_before(Attempt(**fields, latency_ms=0), Registry([A1, B1]))
    overloaded = Failure(A1, OverloadedError("words"))
    assert decide([A1], [ended] * 9) == NextCall(A1, 0.0)
    assert decide([A1, B1], [overloaded, ended, overloaded]) == NextCall(B1, 0.0)
    assert decide([A1], [overloaded, ended, overloaded]) is None


def test_an_answer_that_was_lost_with_its_worker_is_no_failure_of_its_model_but_was_paid_for() -> None:
    """The model is asked again, and no job pays for more calls than it may have."""
    fields = {"model_id": "1", "provider": "a", "tier": "cheap", "outcome": "succeeded", "latency_ms": 1}
    lost = seen_before(Attempt(**fields), Registry([A1, B1]))
    overloaded, settings = Failure(A1, OverloadedError("words")), RetrySettings(max_attempts=4)
    for failures in ([lost], [lost] * 3, [overloaded, lost, lost]):
        assert next_call([A1], failures, settings, 1000.0, lambda: 1.0) is not None
    for failures in ([lost] * 4, [overloaded, lost, lost, lost], [lost, lost, lost, overloaded]):
        assert next_call([A1], failures, settings, 1000.0, lambda: 1.0) is None
    assert "answered in an earlier start, whose worker was lost" in lost.error.message


def test_an_attempt_on_a_model_that_is_gone_is_still_an_attempt() -> None:
    """The configuration may have changed since; the budget has not."""
    attempt = Attempt(
        model_id="gone", provider="nobody", tier=ModelTier.CHEAP, outcome="failed", error_type="odd", latency_ms=1
    )
    failure = seen_before(attempt, Registry([A1]))
    assert failure.model.ref == "nobody/gone"
    assert decide([A1], [failure] * 4) is None


@pytest.mark.parametrize("kind", TRANSIENT)
def test_transient_failure_is_tried_again_after_a_backoff(kind: type[ProviderError]) -> None:
    """The provider may answer in a moment, and its model was the first choice."""
    assert decide([A1, B1], failed((A1, kind("x")))) == NextCall(A1, 1.0)


@pytest.mark.parametrize("kind", TRANSIENT)
def test_model_that_failed_twice_gives_way(kind: type[ProviderError]) -> None:
    """One provider in trouble does not use up the whole budget."""
    assert decide([A1, B1], failed((A1, kind("x")), (A1, kind("x")))) == NextCall(B1, 0)


@pytest.mark.parametrize(
    ("failures", "random", "wait"),
    [(1, 0.0, 0.5), (1, 1.0, 1.0), (2, 0.0, 1.0), (2, 1.0, 2.0), (3, 1.0, 4.0), (4, 1.0, 8.0), (5, 1.0, 8.0)],
)
def test_backoff_doubles_up_to_its_cap_and_half_of_it_is_random(failures: int, random: float, wait: float) -> None:
    """Workers that failed together do not come back together."""
    settings = RetrySettings(max_attempts=20, max_attempts_per_model=20, backoff_seconds=1.0, backoff_cap_seconds=8.0)
    history = failed(*[(A1, OverloadedError("x"))] * failures)
    assert decide([A1], history, settings, random=lambda: random) == NextCall(A1, wait)


def test_rate_limited_moves_to_another_model_at_once() -> None:
    """Waiting would cost the caller time that another model does not need."""
    assert decide([A1, B1], failed((A1, RateLimitedError("x", retry_after=30)))) == NextCall(B1, 0)


def test_rate_limited_waits_as_told_when_there_is_no_other_model() -> None:
    """The provider knows best when it has room again; less would be refused, more is waste."""
    assert decide([A1], failed((A1, RateLimitedError("x", retry_after=30)))) == NextCall(A1, 30)
    assert decide([A1], failed((A1, RateLimitedError("x", retry_after=0)))) == NextCall(A1, 0)


def test_rate_limited_without_a_time_backs_off() -> None:
    """Absent headers are normal."""
    assert decide([A1], failed((A1, RateLimitedError("x")))) == NextCall(A1, 1.0)


@pytest.mark.parametrize("remaining", [0.0, 29.9, 30.0])
def test_wait_that_outlasts_the_deadline_is_never_begun(remaining: float) -> None:
    """Sleeping through the deadline would only delay the same error."""
    assert decide([A1], failed((A1, RateLimitedError("x", retry_after=30))), remaining=remaining) is None


def test_overloaded_with_a_wait_too_long_goes_elsewhere() -> None:
    """The retry does not fit, but another model does."""
    assert decide([A1, B1], failed((A1, OverloadedError("x", retry_after=30))), remaining=5) == NextCall(B1, 0)


@pytest.mark.parametrize("candidates", [[A1], [A1, A2, B1, C1]])
def test_bad_request_ends_at_once(candidates: list[ModelInfo]) -> None:
    """The request itself is wrong: every model would refuse it, and some would charge."""
    assert decide(candidates, failed((A1, BadRequestError("x")))) is None


def test_wrong_key_rules_out_the_whole_provider() -> None:
    """All models of a provider use the same key."""
    assert decide([A1, A2, B1], failed((A1, CredentialError("x")))) == NextCall(B1, 0)
    assert decide([A1, A2], failed((A1, CredentialError("x")))) is None


def test_wrong_key_stays_ruled_out() -> None:
    """Also after another provider has failed since."""
    failures = failed((A1, CredentialError("x")), (B1, OverloadedError("x")), (B1, OverloadedError("x")))
    assert decide([A1, A2, B1], failures) is None


@pytest.mark.parametrize(("window", "larger"), [(1001, True), (1000, False), (999, False), (None, False)])
def test_prompt_too_long_goes_only_to_a_larger_window(window: int | None, larger: bool) -> None:
    """A window that is not larger, or not known, would refuse the prompt again."""
    other = model("b/1", window)
    expected = NextCall(other, 0) if larger else None
    assert decide([A1, other], failed((A1, ContextTooLongError("x")))) == expected


def test_least_tried_model_comes_next() -> None:
    """A fallback that was tried already waits until the untried ones had their turn."""
    limited = RateLimitedError("x")
    assert decide([A1, B1, C1], failed((A1, limited), (B1, limited))) == NextCall(C1, 0)


def test_same_model_id_at_two_providers_is_two_models() -> None:
    """A fallback to another provider of the same model is a real fallback."""
    here, there = model("a/llama"), model("b/llama")
    assert decide([here, there], failed((here, CredentialError("x")))) == NextCall(there, 0)


models = st.lists(st.sampled_from([A1, A2, B1, C1, model("d/1", 5000)]), min_size=1, max_size=5, unique=True)
errors = st.builds(
    lambda kind, retry_after: kind("x", retry_after=retry_after),
    st.sampled_from([*TRANSIENT, *FINAL_HERE, RateLimitedError]),
    st.none() | st.floats(0, 100),
)
retry_settings = st.builds(RetrySettings, max_attempts=st.integers(1, 8), max_attempts_per_model=st.integers(1, 4))


@given(models, st.lists(errors, min_size=40, max_size=40), retry_settings, st.floats(0, 500), st.floats(0, 1))
def test_whatever_fails_the_budget_holds(
    candidates: list[ModelInfo],
    happens: list[ProviderError],
    settings: RetrySettings,
    remaining: float,
    random: float,
) -> None:
    """Never more calls than allowed, in all or per model; no ruled-out model; no wait beyond the deadline."""
    failures: list[Failure] = []
    while (step := next_call(candidates, failures, settings, remaining, lambda: random)) is not None:
        assert step.model in candidates
        assert step.wait_seconds == 0 or step.wait_seconds < remaining
        for before in failures:
            assert not isinstance(before.error, BadRequestError)
            if before.model == step.model:
                assert before.error.retryable
            if isinstance(before.error, CredentialError):
                assert before.model.provider != step.model.provider
        failures.append(Failure(step.model, happens[len(failures)]))
        remaining -= step.wait_seconds
        tries = [failure for failure in failures if not isinstance(failure.error, CredentialError)]
        assert len(tries) <= settings.max_attempts
        assert sum(failure.model == step.model for failure in tries) <= settings.max_attempts_per_model
        assert len(failures) - len(tries) <= len({model.provider for model in candidates})  # each has one key here
    assert failures


@given(models, st.sampled_from(TRANSIENT), retry_settings)
def test_whole_budget_is_used_before_giving_up(
    candidates: list[ModelInfo], kind: type[ProviderError], settings: RetrySettings
) -> None:
    """With time left, a job fails only after every allowed call has failed."""
    failures: list[Failure] = []
    while (step := decide(candidates, failures, settings)) is not None:
        failures.append(Failure(step.model, kind("x")))
    assert len(failures) == min(settings.max_attempts, settings.max_attempts_per_model * len(candidates))


def test_a_model_is_not_called_before_the_time_its_provider_asked_for() -> None:
    """With two limited models the one that is free first is waited for, however often it was tried."""
    first, second = A1, B1
    failures = [
        Failure(first, RateLimitedError("x", retry_after=60), at_seconds=100),
        Failure(second, RateLimitedError("x", retry_after=5), at_seconds=101),
    ]
    settings = RetrySettings()
    assert alone(next_call([first, second], failures, settings, 300, lambda: 0.5, 102)) == NextCall(second, 4)
    assert next_call([first, second], failures, settings, 3, lambda: 0.5, 102) is None


ONE, TWO = Credential("one"), Credential("two")
WAYS = Ways({"a": (ONE, TWO), "b": (Credential(),)})


def failed_by(credential: Credential, error: ProviderError, at: ModelInfo = A1) -> Failure:
    return Failure(at, error, credential=credential.name)


def with_keys(*failures: Failure, settings: RetrySettings = SETTINGS) -> NextCall | None:
    return alone(next_call([A1, A2, B1], failures, settings, 1000.0, lambda: 1.0, 0.0, WAYS))


def test_refused_key_makes_way_for_another_one() -> None:
    """On the same model, at once, and as no try of the model; without another the provider is out."""
    refused = [failed_by(ONE, CredentialError("x")), failed_by(TWO, CredentialError("x"))]
    assert with_keys(refused[0]) == NextCall(A1, 0.0)
    assert list(in_turn((A1, A2), WAYS, refused[:1])) == [(A1, TWO), (A2, TWO)]
    assert with_keys(*refused) == NextCall(B1, 0.0)
    overloaded = failed_by(TWO, OverloadedError("x"))
    assert with_keys(refused[0], overloaded) == NextCall(A1, 1.0)


def test_keys_that_are_refused_use_up_none_of_a_job_s_calls() -> None:
    """However many there are before the good one; each is out afterwards, so that there is an end to it."""
    keys = tuple(Credential(f"key-{number}") for number in range(10))
    ways, once = Ways({"a": keys}), RetrySettings(max_attempts=1)
    refused: list[Failure] = []
    for number, key in enumerate(keys[:-1], 1):
        refused.append(failed_by(key, CredentialError("x")))
        assert next_call([A1], refused, once, 1000.0, lambda: 1.0, 0.0, ways) == NextCall(A1, 0.0)
        assert list(in_turn((A1,), ways, refused)) == [(A1, left) for left in keys[number:]]
    for last in (CredentialError("x"), OverloadedError("x")):
        ended = [*refused, failed_by(keys[-1], last)]
        assert next_call([A1], ended, once, 1000.0, lambda: 1.0, 0.0, ways) is None


def test_refused_spare_key_does_not_hold_a_job_to_a_rate_limit() -> None:
    """Another model is free now; the first key's is only in a minute."""
    failures = [failed_by(ONE, RateLimitedError("x", retry_after=60)), failed_by(TWO, CredentialError("x"))]
    assert alone(next_call([A1, B1], failures, SETTINGS, 1000.0, lambda: 1.0, 0.0, WAYS)) == NextCall(B1, 0.0)


def test_rate_limit_of_one_key_holds_up_none_of_the_others() -> None:
    """The model is asked by the next key at once, and the limited one comes last."""
    limited = [
        failed_by(ONE, RateLimitedError("x", retry_after=60)),
        failed_by(TWO, RateLimitedError("x", retry_after=5)),
    ]
    assert with_keys(limited[0]) == NextCall(A1, 0.0)
    assert list(in_turn((A1,), WAYS, limited[:1])) == [(A1, TWO), (A1, ONE)]
    many = RetrySettings(max_attempts=9, max_attempts_per_model=9)
    assert alone(next_call([A1], limited, many, 1000.0, lambda: 1.0, 0.0, WAYS)) == NextCall(A1, 5.0)


def test_overload_is_the_provider_s_whatever_the_key() -> None:
    """Another key does not help, so the backoff holds for all."""
    assert with_keys(failed_by(ONE, OverloadedError("x"))) == NextCall(A1, 1.0)


@pytest.mark.parametrize(("recorded", "credential"), [(None, "default"), ("one", "one")])
def test_an_earlier_start_s_refusal_rules_out_that_key_alone(recorded: str | None, credential: str) -> None:
    """Records of before there were several name none, and mean the default one."""
    attempt = Attempt(
        model_id="1",
        provider="a",
        tier=ModelTier.CHEAP,
        outcome="failed",
        error_type="credential",
        latency_ms=1,
        credential=recorded,
    )
    failure = seen_before(attempt, Registry([A1]))
    assert failure.credential == credential
    assert list(in_turn((A1,), WAYS, [failure])) == [(A1, one) for one in (ONE, TWO) if one.name != credential]
