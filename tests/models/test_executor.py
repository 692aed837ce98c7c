import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import (
    BadRequestError,
    CredentialError,
    DeadlineExceededError,
    ExecutionError,
    InvalidJobError,
    NoCandidateError,
    OverloadedError,
    ProviderConnectionError,
    RateLimitedError,
    StoppedError,
)
from attune_worker.interruption import Interruption
from attune_worker.jobs import Job, ModelTier
from attune_worker.models.executor import EmpathyLLMExecutor, ExecutionContext, LLMResponse
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator, prompt_digest
from attune_worker.store.keys import FleetKeys
from tests.conftest import PATIENCE_SECONDS, Stopwatch, Until, answer_now, longer_and_longer

Run = Callable[..., LLMResponse]


@pytest.fixture
def executor(settings: Settings) -> EmpathyLLMExecutor:
    return EmpathyLLMExecutor(settings)


@pytest.fixture(params=["run", "arun"])
def run(request: pytest.FixtureRequest, executor: EmpathyLLMExecutor) -> Run:
    """Run a request in either way: both must do the same."""
    if request.param == "run":
        return executor.run
    return lambda *args, **options: asyncio.run(executor.arun(*args, **options))


def misbehaving(simulator: Simulator, errors: Mapping[str, Any] | None = None, **profile: Any) -> None:
    keys = simulator.profile.api_keys
    simulator.profile = Profile.parse({"api_keys": keys, "errors": errors or {}, **profile})


def calls(simulator: Simulator) -> list[tuple[str, str, int]]:
    return [(seen["path"], seen["model"], seen["status"]) for seen in simulator.requests()["requests"]]


def billed(simulator: Simulator) -> Decimal:
    invoice = simulator.invoice(summary=True)
    assert invoice["unpriced"] == 0
    return Decimal(invoice["total_usd"])


def error_of(run: Run, *args: Any, **options: Any) -> ExecutionError:
    with pytest.raises(ExecutionError) as caught:
        run(*args, **options)
    return caught.value


def test_answer_comes_with_its_exact_cost(run: Run, simulator: Simulator) -> None:
    """To the nano-dollar what the provider's own invoice says."""
    response = run("summarize", "What is new?", system="Be brief.")
    assert prompt_digest("What is new?", "Be brief.") in response.content
    assert (response.model_id, response.provider, response.tier) == ("claude-haiku-5-5", "anthropic", ModelTier.CHEAP)
    assert response.finish_reason == "stop"
    assert response.usage is not None
    assert response.usage.output_tokens > 0
    assert response.cost_usd == billed(simulator) > 0
    assert [attempt.outcome for attempt in response.attempts] == ["succeeded"]
    assert response.attempts[0].cost_usd == response.cost_usd
    assert response.request_id == simulator.invoice()["calls"][0]["request_id"]


@pytest.mark.parametrize(
    ("tier", "model"),
    [("cheap", "claude-haiku-5-5"), ("capable", "claude-sonnet-5-5"), ("premium", "claude-opus-5-5")],
)
def test_tier_reaches_the_wire_as_its_model(
    executor: EmpathyLLMExecutor, simulator: Simulator, tier: str, model: str
) -> None:
    """The request itself names the model, and the invoice agrees on its price."""
    response = executor.run("summarize", "?", tier_hint=tier)
    assert calls(simulator) == [("/v1/messages", model, 200)]
    assert response.cost_usd == billed(simulator)


def test_fallback_changes_the_model_and_the_path_of_the_http_request(run: Run, simulator: Simulator) -> None:
    """A fallback that sends the same request again would be none."""
    misbehaving(simulator, models={"claude-haiku-5-5": {"errors": {"overloaded": 1}}})
    response = run("summarize", "?")
    assert calls(simulator) == [
        ("/v1/messages", "claude-haiku-5-5", 529),
        ("/v1/messages", "claude-haiku-5-5", 529),
        ("/v1/chat/completions", "gpt-6-luna", 200),
    ]
    assert (response.model_id, response.provider) == ("gpt-6-luna", "openai")
    assert [attempt.error_type for attempt in response.attempts] == ["overloaded", "overloaded", None]
    assert [attempt.status for attempt in response.attempts] == [529, 529, None]
    assert response.cost_usd == billed(simulator)


def test_every_attempt_leaves_a_record(run: Run, simulator: Simulator) -> None:
    """As many records as requests, and one budget for all of them together."""
    misbehaving(simulator, {"server_error": 1})
    error = error_of(run, "summarize", "?")
    assert isinstance(error, OverloadedError)
    assert len(calls(simulator)) == 4
    assert [(attempt.provider, attempt.model_id) for attempt in error.attempts] == [
        ("anthropic", "claude-haiku-5-5"),
        ("anthropic", "claude-haiku-5-5"),
        ("openai", "gpt-6-luna"),
        ("openai", "gpt-6-luna"),
    ]
    assert all(attempt.outcome == "failed" and attempt.cost_usd == 0 for attempt in error.attempts)
    assert billed(simulator) == 0
    assert "openai/gpt-6-luna" in str(error)


@pytest.mark.parametrize("fault", ["disconnect", "truncated", "malformed"])
def test_broken_answers_are_attempts_of_unknown_cost(run: Run, simulator: Simulator, fault: str) -> None:
    """The provider has charged for them, so their cost is not 0; it is not known."""
    misbehaving(simulator, models={"claude-haiku-5-5": {"errors": {fault: 1}}})
    response = run("summarize", "?")
    assert [attempt.cost_usd is None for attempt in response.attempts] == [True, True, False]
    assert len(simulator.invoice()["calls"]) == 3
    assert response.attempts[-1].cost_usd == Decimal(simulator.invoice()["calls"][-1]["cost_usd"])


@pytest.mark.parametrize("way", ["context", "deadline", "settings"])
def test_whole_time_is_bounded_and_timeouts_leave_records(
    environ: dict[str, str], simulator: Simulator, stopwatch: Stopwatch, way: str
) -> None:
    """A provider that accepts and never answers costs the time that was given, not more; the call is on record."""
    misbehaving(simulator, {"hang": 1})
    for seconds in longer_and_longer(0.3):
        if way == "settings":
            environ["ATTUNE_TIMEOUT_SECONDS"] = str(seconds)
        executor = EmpathyLLMExecutor(Settings.load(environ=environ))
        options: dict[str, Any] = {
            "context": {"context": ExecutionContext(timeout_seconds=seconds)},
            "deadline": {"deadline_seconds": seconds},
            "settings": {},
        }[way]
        began, before = time.monotonic(), stopwatch.seconds
        error = error_of(executor.run, "summarize", "?", **options)
        took_seconds, ran_seconds = time.monotonic() - began, stopwatch.seconds - before
        assert isinstance(error, DeadlineExceededError)
        if calls(simulator):  # not when the time was up before the call
            break
    assert len(calls(simulator)) == 1
    assert [(attempt.error_type, attempt.cost_usd) for attempt in error.attempts] == [("timeout", None)]
    assert took_seconds >= seconds - 0.05
    assert ran_seconds < seconds + 2.7


@pytest.mark.parametrize("model", ["gpt-6-luna", None])
def test_time_up_is_the_deadline_and_not_the_providers_fault(run: Run, simulator: Simulator, model: str | None) -> None:
    """The job's own time ended the call, so the job expired, whether or not there was another model to try."""
    misbehaving(simulator, {"hang": 1})
    error = error_of(run, "summarize", "?", context=ExecutionContext(timeout_seconds=0.2), model=model)
    assert isinstance(error, DeadlineExceededError)


def test_call_is_not_made_once_the_job_has_lost_the_right_to_it(
    executor: EmpathyLLMExecutor, settings: Settings, simulator: Simulator, redis: Redis
) -> None:
    """Leave for it was given before; it is given back, and nothing is sent or counted."""
    keys = FleetKeys(settings.namespace)
    interruption = Interruption()
    interruption.only_while(lambda: False, "its lease was lost")
    job = Job.parse({"task_type": "summarize", "prompt": "?"})
    with pytest.raises(StoppedError, match="its lease was lost") as caught:
        executor.execute(job, job_id="job-1", interruption=interruption)
    assert caught.value.attempts == ()
    assert calls(simulator) == []
    assert redis.zcard(keys.calls) == 0
    [call_id] = redis.lrange(keys.job_calls("job-1"), 0, -1)
    assert redis.hmget(keys.call(call_id.decode()), "state", "outcome") == [b"settled", b"released"]


def test_timeout_of_one_request_leaves_time_for_others(environ: dict[str, str], simulator: Simulator) -> None:
    """Each hanging call is given up after its own time, is tried again, and then elsewhere."""
    misbehaving(simulator, models={"claude-haiku-5-5": {"errors": {"hang": 1}}})
    for seconds in longer_and_longer(0.15):
        simulator.reset()
        patience = {"ATTUNE_HTTP__REQUEST_TIMEOUT_SECONDS": str(seconds)}
        executor = EmpathyLLMExecutor(Settings.load(environ=environ | patience))
        with suppress(ExecutionError):
            response = executor.run("summarize", "?")
            if len(response.attempts) == len(calls(simulator)) == 3:  # not when even what answers had too little time
                break
    assert [attempt.error_type for attempt in response.attempts] == ["timeout", "timeout", None]
    assert [path for path, _, _ in calls(simulator)] == ["/v1/messages", "/v1/messages", "/v1/chat/completions"]


@pytest.mark.parametrize("form", ["retry-after-ms", "retry-after"])
def test_retry_after_is_waited_for(run: Run, simulator: Simulator, form: str) -> None:
    """With no other model, the second request comes when the provider said, and not before."""
    seconds = 0.08
    misbehaving(simulator, {"rate_limited": 1}, retry_after={"seconds": seconds, "form": form})
    error = error_of(run, "summarize", "?", model="gpt-6-luna")
    assert isinstance(error, RateLimitedError)
    assert error.retry_after == pytest.approx(seconds, abs=0.01)
    times = [seen["time"] for seen in simulator.requests()["requests"]]
    assert len(times) == 2
    assert times[1] - times[0] >= seconds - 0.005


def test_retry_after_beyond_the_deadline_is_not_waited_for(run: Run, simulator: Simulator) -> None:
    """The caller learns at once, and when to come again."""
    misbehaving(simulator, {"rate_limited": 1}, retry_after={"seconds": 60})
    error = error_of(run, "summarize", "?", model="gpt-6-luna", deadline_seconds=30)
    assert (type(error), error.retry_after, len(error.attempts)) == (RateLimitedError, 60, 1)


def test_rate_limited_goes_to_another_provider_at_once(run: Run, simulator: Simulator) -> None:
    """A minute's wait at one provider is no reason to wait when another has room."""
    misbehaving(
        simulator,
        models={"claude-haiku-5-5": {"errors": {"rate_limited": 1}, "retry_after": {"seconds": 60}}},
    )
    assert run("summarize", "?").provider == "openai"
    assert [path for path, _, _ in calls(simulator)] == ["/v1/messages", "/v1/chat/completions"]


def test_bad_request_ends_the_job_after_one_call(run: Run, simulator: Simulator) -> None:
    """No other model would take it."""
    misbehaving(simulator, {"bad_request": 1})
    error = error_of(run, "summarize", "?")
    assert (type(error), len(error.attempts), len(calls(simulator))) == (BadRequestError, 1, 1)


@pytest.mark.parametrize("fault", ["credential", "spend_limit"])
def test_refused_key_moves_to_another_provider(run: Run, simulator: Simulator, fault: str) -> None:
    """All of the provider's models share the key, so none of them is asked again."""
    misbehaving(
        simulator,
        models={model: {"errors": {fault: 1}} for model in ("claude-haiku-5-5", "claude-haiku-4-5")},
    )
    response = run("summarize", "?")
    assert (response.provider, len(response.attempts)) == ("openai", 2)
    assert response.attempts[0].error_type == "credential"


def test_wrong_key_everywhere_is_a_credential_error(environ: dict[str, str]) -> None:
    """The message names the provider and not the key."""
    wrong = "sk-wrong-5309-never-shown"
    environ |= {f"ATTUNE_PROVIDERS__{name}__API_KEY": wrong for name in ("ANTHROPIC", "OPENAI")}
    error = error_of(EmpathyLLMExecutor(Settings.load(environ=environ)).run, "summarize", "?")
    assert isinstance(error, CredentialError)
    assert error.provider == "openai"
    assert wrong not in str(error)


def test_prompt_too_long_for_one_model_goes_to_a_larger_window(environ: dict[str, str], simulator: Simulator) -> None:
    """The provider counts tokens better than we do; its refusal leads to a model with more room."""
    models = [
        {"id": "short", "provider": "openai", "tier": "cheap", "context_window": 10_000},
        {"id": "same", "provider": "openai", "tier": "cheap", "context_window": 10_000},
    ]
    environ |= {"ATTUNE_MODELS": json.dumps(models), "ATTUNE_PROVIDER_ORDER": '["openai"]'}
    del environ["ATTUNE_PROVIDERS__ANTHROPIC__API_KEY"]
    misbehaving(simulator, models={"short": {"context_window": 1}})
    executor = EmpathyLLMExecutor(Settings.load(environ=environ))
    response = executor.run("summarize", "a prompt of more than one token")
    assert [attempt.error_type for attempt in response.attempts] == ["context_too_long", None]
    assert calls(simulator)[0][1] == "short"
    assert [executor.registry.find("same")[0].id, calls(simulator)[1][1]] == ["same", "gpt-6-luna"]


def test_run_and_arun_give_the_same(executor: EmpathyLLMExecutor) -> None:
    """Two drivers, one way."""

    def facts(response: LLMResponse) -> tuple[Any, ...]:
        attempts = [(attempt.model_id, attempt.outcome, attempt.cost_usd) for attempt in response.attempts]
        return response.content, response.model_id, response.usage, response.cost_usd, response.finish_reason, attempts

    blocking = executor.run("fix_bug", "def f(): retrun 1", max_tokens=20)
    awaited = asyncio.run(executor.arun("fix_bug", "def f(): retrun 1", max_tokens=20))
    assert facts(blocking) == facts(awaited)


def test_many_coroutines_share_one_executor(executor: EmpathyLLMExecutor, simulator: Simulator, until: Until) -> None:
    """Each gets the answer to its own question."""
    misbehaving(simulator, latency=PATIENCE_SECONDS)
    let_go = threading.Thread(
        target=lambda: (until(lambda: simulator.requests()["in_flight"] == 30), answer_now(simulator))
    )

    async def all_at_once() -> list[LLMResponse]:
        return await asyncio.gather(*(executor.arun("summarize", f"question {number}") for number in range(30)))

    let_go.start()
    responses = asyncio.run(all_at_once())
    let_go.join()
    assert [prompt_digest(f"question {number}") in response.content for number, response in enumerate(responses)] == [
        True
    ] * 30
    assert simulator.requests()["max_in_flight"] == 30
    assert sum((response.cost_usd or Decimal(0) for response in responses), Decimal(0)) == billed(simulator)


@pytest.mark.parametrize("fault", [None, "credential", "server_error", "malformed", "disconnect", "bad_request"])
def test_key_and_prompt_are_in_no_log_and_no_error(
    run: Run, settings: Settings, simulator: Simulator, caplog: pytest.LogCaptureFixture, fault: str | None
) -> None:
    """At the most talkative level, in every text form of what is raised or returned."""
    prompt = "the merger with Initech is off"
    misbehaving(simulator, {fault: 1} if fault else {})
    caplog.set_level(logging.DEBUG)
    try:
        seen = repr(run("summarize", prompt).attempts)
    except ExecutionError as error:
        seen = f"{error} {error!r} {error.attempts!r} {vars(error)}"
    seen += caplog.text
    assert settings.providers["openai"].key() not in seen
    assert prompt not in seen


@pytest.fixture
def echo(raw_server: Callable[[Callable[[socket.socket], None]], Any]) -> Iterator[Any]:
    """Run a server that refuses each request, repeating the headers and body it was sent."""
    server = raw_server(lambda connection: connection.sendall(refusal(server.received[-1])))
    return server


def refusal(request: bytes) -> bytes:
    error = {"message": f"I was sent {request.decode()}", "type": "invalid_request_error"}
    body = json.dumps({"error": error}).encode()
    return b"HTTP/1.1 400 Bad\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def test_key_that_the_provider_repeats_is_not_shown(environ: dict[str, str], echo: Any) -> None:
    """Some gateways quote the request in their error."""
    environ["ATTUNE_PROVIDERS__OPENAI__BASE_URL"] = echo.url
    settings = Settings.load(environ=environ)
    error = error_of(EmpathyLLMExecutor(settings).run, "summarize", "?", model="openai/gpt-6-luna")
    assert b"Bearer" in echo.received[0]
    assert "I was sent" in str(error)
    assert settings.providers["openai"].key() not in f"{error} {error!r}"


def test_user_and_session_reach_the_provider_only_as_hashes(environ: dict[str, str], echo: Any) -> None:
    """The provider can tell users apart, and nobody can tell who they are; metadata is not sent at all."""
    for name in ("OPENAI", "ANTHROPIC"):
        environ[f"ATTUNE_PROVIDERS__{name}__BASE_URL"] = echo.url
    executor = EmpathyLLMExecutor(Settings.load(environ=environ))
    context = ExecutionContext(
        workflow_name="secret-workflow",
        step_name="secret-step",
        user_id="ada@example.com",
        session_id="session-77",
        metadata={"ticket": "T-1000"},
    )
    for ref in ("openai/gpt-6-luna", "anthropic/claude-haiku-5-5"):
        for asking in (context, context, ExecutionContext(user_id="bob@example.com")):
            error_of(executor.run, "summarize", "?", context=asking, model=ref)
    sent = b"".join(echo.received).decode()
    for private in ("ada@", "bob@", "session-77", "T-1000", "secret-workflow", "secret-step"):
        assert private not in sent
    users = [body.get("user") or body["metadata"]["user_id"] for body in echo.bodies]
    assert users[0] == users[1] == users[3] == users[4]
    assert users[2] == users[5] != users[0]


def test_metadata_comes_back(run: Run) -> None:
    """What the caller attached is returned as it was."""
    context = ExecutionContext(metadata={"ticket": ["T", 1, None]})
    assert run("summarize", "?", context=context).metadata == {"ticket": ["T", 1, None]}


@pytest.mark.parametrize(
    ("context", "path", "model"),
    [
        (ExecutionContext(provider_hint="openai"), "/v1/chat/completions", "gpt-6-luna"),
        (ExecutionContext(tier_hint=ModelTier.PREMIUM), "/v1/messages", "claude-opus-5-5"),
        (ExecutionContext(tier_hint="premium", provider_hint="openai"), "/v1/chat/completions", "gpt-6.1-sol"),
        (ExecutionContext(), "/v1/messages", "claude-haiku-5-5"),
    ],
)
def test_hints_of_the_context_decide_what_is_called(
    run: Run, simulator: Simulator, context: ExecutionContext, path: str, model: str
) -> None:
    """A field that is accepted is honoured, on the wire."""
    run("summarize", "?", context=context)
    assert calls(simulator) == [(path, model, 200)]


def test_options_win_over_the_context(run: Run, simulator: Simulator) -> None:
    """What is said about this call is said last."""
    run("summarize", "?", context=ExecutionContext(tier_hint="premium"), tier_hint="cheap", max_tokens=1)
    assert [model for _, model, _ in calls(simulator)] == ["claude-haiku-5-5"]


def test_context_with_a_wrong_value_is_refused(run: Run, simulator: Simulator) -> None:
    """The same way as a wrong field of a job, and before anything is sent."""
    with pytest.raises(InvalidJobError, match=r"'cheap', 'capable' or 'premium'"):
        run("summarize", "?", context=ExecutionContext(tier_hint="gold"))
    with pytest.raises(InvalidJobError, match="lone surrogate"):
        run("summarize", "half a \ud83d smile")
    with pytest.raises(InvalidJobError, match=r"'user_id'.*unicode"):
        run("summarize", "?", context=ExecutionContext(user_id="\ud83d"))
    assert calls(simulator) == []


def test_dear_models_are_left_out_by_max_cost(run: Run, simulator: Simulator) -> None:
    """What a call may cost at worst is known before it is made."""
    dear = run("final_review", "?", max_tokens=500)
    response = run("final_review", "?", max_tokens=500, max_cost="0.01")
    assert (dear.model_id, response.model_id) == ("claude-opus-5-5", "gpt-6.1-sol")
    assert response.cost_usd is not None
    assert response.cost_usd <= Decimal("0.01")
    error = error_of(run, "final_review", "?", max_cost=0)
    assert isinstance(error, NoCandidateError)
    assert "over max_cost" in str(error)
    assert len(calls(simulator)) == 2


def test_unknown_price_is_unknown_and_cannot_keep_a_limit(environ: dict[str, str], simulator: Simulator) -> None:
    """An unknown price is never 0: it is None, and a job with a limit is not sent there."""
    models = '[{"id": "home-made", "provider": "local", "tier": "cheap"}]'
    environ |= {
        "ATTUNE_MODELS": models,
        "ATTUNE_PROVIDERS__LOCAL__KIND": "openai",
        "ATTUNE_PROVIDERS__LOCAL__BASE_URL": simulator.openai_url,
    }
    simulator.profile = Profile(require_key=False)
    executor = EmpathyLLMExecutor(Settings.load(environ=environ))
    response = executor.run("summarize", "?", model="home-made")
    assert response.cost_usd is None
    assert response.attempts[0].cost_usd is None
    error = error_of(executor.run, "summarize", "?", model="home-made", max_cost=100)
    assert "price is unknown" in str(error)


def test_provider_without_a_key_is_not_asked(environ: dict[str, str]) -> None:
    """And when nobody is left, the message says which variable to set."""
    del environ["ATTUNE_PROVIDERS__ANTHROPIC__API_KEY"]
    assert EmpathyLLMExecutor(Settings.load(environ=environ)).run("summarize", "?").provider == "openai"
    del environ["ATTUNE_PROVIDERS__OPENAI__API_KEY"]
    error = error_of(EmpathyLLMExecutor(Settings.load(environ=environ)).run, "summarize", "?")
    assert isinstance(error, NoCandidateError)
    assert "set ANTHROPIC_API_KEY" in str(error)
    assert "set OPENAI_API_KEY" in str(error)


def test_provider_that_is_not_there_is_left_for_another(environ: dict[str, str]) -> None:
    """A refused connection costs nothing, and is known to."""
    environ["ATTUNE_PROVIDERS__ANTHROPIC__BASE_URL"] = "http://127.0.0.1:1"
    response = EmpathyLLMExecutor(Settings.load(environ=environ)).run("summarize", "?")
    assert response.provider == "openai"
    assert [(attempt.error_type, attempt.cost_usd) for attempt in response.attempts[:2]] == [("connection", 0)] * 2


def test_all_providers_away_is_a_connection_error(environ: dict[str, str]) -> None:
    """The last failure is what the caller sees, with all attempts."""
    for name in ("ANTHROPIC", "OPENAI"):
        environ[f"ATTUNE_PROVIDERS__{name}__BASE_URL"] = "http://127.0.0.1:1"
    error = error_of(EmpathyLLMExecutor(Settings.load(environ=environ)).run, "summarize", "?")
    assert (type(error), len(error.attempts)) == (ProviderConnectionError, 4)


def test_model_asked_first_and_its_price_are_known_without_a_call(
    executor: EmpathyLLMExecutor, simulator: Simulator
) -> None:
    """An estimate uses the model that would be called, at the price that would be charged."""
    assert executor.get_model_for_task("summarize") == "claude-haiku-5-5"
    assert executor.get_model_for_task("Final Review") == "claude-opus-5-5"
    response = executor.run("summarize", "a question")
    assert response.usage is not None
    estimate = executor.estimate_cost("summarize", response.usage.input_tokens, response.usage.output_tokens)
    assert estimate == billed(simulator)


def test_messages_keep_their_turns_on_the_wire(environ: dict[str, str], echo: Any) -> None:
    """A conversation is sent as one, not as a single text."""
    environ["ATTUNE_PROVIDERS__OPENAI__BASE_URL"] = echo.url
    executor = EmpathyLLMExecutor(Settings.load(environ=environ))
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    error_of(executor.run, "summarize", None, messages=turns, model="openai/gpt-6-luna", stop=["END"])
    assert echo.bodies[0]["messages"] == turns
    assert echo.bodies[0]["stop"] == ["END"]
