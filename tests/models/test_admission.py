"""Do real executors, in threads and processes, act as one fleet against a real provider's limits and prices?"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from redis import Redis

from attune_worker.budget import Budgets, BudgetStatus
from attune_worker.errors import (
    AttuneError,
    BadRequestError,
    BudgetExceededError,
    DeadlineExceededError,
    NotNowError,
    OverloadedError,
    RateLimitedError,
)
from attune_worker.jobs import Job
from attune_worker.ledger import Ledger
from attune_worker.limits import Limits
from attune_worker.models.credentials import DEFAULT
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.keys import FleetKeys
from attune_worker.telemetry.views import StageView
from tests.conftest import API_KEY, PATIENCE_SECONDS, answer_now, process_environ

Until = Callable[[Callable[[], Any]], Any]
LUNA = Job.parse({"task_type": "summarize", "prompt": "a prompt", "model": "gpt-6-luna", "max_tokens": 50})


@pytest.fixture
def make_executor(settings: Settings) -> Iterator[Callable[..., EmpathyLLMExecutor]]:
    """Return a function that makes one of the fleet's executors, with other settings where they are given."""
    executors: list[EmpathyLLMExecutor] = []

    def make(**changes: Any) -> EmpathyLLMExecutor:
        executors.append(EmpathyLLMExecutor(Settings.model_validate({**settings.model_dump(), **changes})))
        return executors[-1]

    yield make
    for executor in executors:
        executor.close()


def limited(settings: Settings, **limits: int) -> dict[str, Any]:
    return {name: {**one.model_dump(), **limits} for name, one in settings.providers.items()}


def behave(simulator: Simulator, **profile: Any) -> None:
    simulator.profile = Profile.parse({"api_keys": [API_KEY], **profile})


def seen(simulator: Simulator) -> list[int]:
    """Return the statuses of the requests so far."""
    return [request["status"] for request in simulator.requests()["requests"]]


def billed(simulator: Simulator) -> Decimal:
    return Decimal(simulator.invoice(summary=True)["total_usd"])


def outcome_of(action: Callable[[], Any]) -> str:
    """Return what became of a call: succeeded, or the type of its error."""
    try:
        action()
    except AttuneError as error:
        return error.type
    return "succeeded"


def the_budget(executor: EmpathyLLMExecutor) -> BudgetStatus:
    [status] = Budgets(executor.settings).status()
    return status


@pytest.mark.parametrize("errors", [{}, {"truncated": 0.2, "overloaded": 0.2}])
def test_hard_budget_is_never_passed_by_a_crowd(
    make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator, errors: dict[str, float]
) -> None:
    """Fifty threads of two executors: the provider's invoice stays within it, and ours says the same."""
    behave(simulator, errors=errors)
    limit = Decimal("0.0005")
    rules = {"failure_threshold": 100}
    crowd = [make_executor(budgets=[{"per": "day", "limit_usd": limit}], breaker=rules) for _ in range(2)]
    with ThreadPoolExecutor(50) as threads:
        ends = list(
            threads.map(
                lambda n: outcome_of(lambda: crowd[n % 2].run("summarize", f"question {n}", max_tokens=60)), range(100)
            )
        )
    status = the_budget(crowd[0])
    assert 0 < billed(simulator) <= status.spent_usd <= limit
    assert status.reserved_usd == 0
    assert ends.count("budget_exceeded") > 10
    assert ends.count("succeeded") > 3
    if not errors:
        assert set(ends) == {"budget_exceeded", "succeeded"}
        assert status.spent_usd == billed(simulator)


def test_empty_budget_is_said_at_once(make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator) -> None:
    """No provider is called, nobody waits, and the error says what is left and when there is more."""
    executor = make_executor(budgets=[{"per": "month", "limit_usd": "0.000001"}])
    with pytest.raises(BudgetExceededError, match=r"per month has \$0.000001000 left .* it starts anew at") as caught:
        executor.run("summarize", "?")
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 31 * 86_400
    assert seen(simulator) == []


def test_budget_without_room_for_the_first_model_goes_to_one_that_fits(
    make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """The cheaper one answers, and is what was charged."""
    fields = {"task_type": "summarize", "prompt": "?", "tier_hint": "capable", "max_tokens": 60}
    offers = make_executor()._caller.offers
    models = offers.candidates(Job.parse(fields)).models
    quotes = offers.quotes(Job.parse(fields), [(model, DEFAULT) for model in models[:2]], StageView())
    worst = [quote.worst_usd for quote in quotes]
    assert worst[0] is not None
    assert worst[1] is not None
    executor = make_executor(budgets=[{"per": "day", "limit_usd": (worst[0] + worst[1]) / 2}])
    response = executor.execute(Job.parse(fields))
    assert (response.provider, response.model_id) == (models[1].provider, models[1].id)
    assert the_budget(executor).spent_usd == response.cost_usd == billed(simulator) > 0


def test_retry_needs_room_of_its_own(make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator) -> None:
    """After a call that may have cost all there was, no second one is made."""
    behave(simulator, errors={"truncated": 1})
    unlimited = make_executor()
    model = next(iter(unlimited.registry.find("openai/gpt-6-luna")))
    [quote] = unlimited._caller.offers.quotes(LUNA, [(model, DEFAULT)], StageView())
    worst = quote.worst_usd
    assert worst is not None
    executor = make_executor(budgets=[{"per": "day", "limit_usd": worst * Decimal("1.5")}])
    with pytest.raises(BudgetExceededError) as caught:
        executor.execute(LUNA)
    assert [attempt.error_type for attempt in caught.value.attempts] == ["malformed_answer"]
    assert the_budget(executor).spent_usd == worst >= billed(simulator) > 0


def test_requests_per_minute_hold_for_a_crowd(
    make_executor: Callable[..., EmpathyLLMExecutor], settings: Settings, simulator: Simulator
) -> None:
    """The provider, which has the same limit, never refuses; and the calls are spread."""
    behave(simulator, requests_per_minute=600)
    crowd = [make_executor(providers=limited(settings, requests_per_minute=600)) for _ in range(2)]
    with ThreadPoolExecutor(50) as threads:
        ends = list(threads.map(lambda n: outcome_of(lambda: crowd[n % 2].execute(LUNA)), range(50)))
    assert ends == ["succeeded"] * 50
    assert seen(simulator) == [200] * 50
    times = sorted(request["time"] for request in simulator.requests()["requests"])
    assert times[-1] - times[0] > 2  # (50 calls - 20 at once) / 9.7 a second, less what the last ones may hurry


def test_tokens_that_were_not_used_come_back(
    make_executor: Callable[..., EmpathyLLMExecutor], settings: Settings, simulator: Simulator
) -> None:
    """Each call reserves half of what may go out at once, and uses a tenth of that: ten pass without a wait."""
    executor = make_executor(providers=limited(settings, tokens_per_minute=60_000))
    job = LUNA.model_copy(update={"max_tokens": 900})
    assert [outcome_of(lambda: executor.execute(job, patience_seconds=0)) for _ in range(10)] == ["succeeded"] * 10
    assert seen(simulator) == [200] * 10


def test_no_more_calls_in_flight_than_slots(
    make_executor: Callable[..., EmpathyLLMExecutor], settings: Settings, simulator: Simulator, until: Until
) -> None:
    """Counted by the provider; who finds none free waits, and is served."""
    behave(simulator, latency=PATIENCE_SECONDS)
    crowd = [make_executor(providers=limited(settings, concurrency=3)) for _ in range(2)]
    with ThreadPoolExecutor(9) as threads:
        ends = threads.map(lambda n: outcome_of(lambda: crowd[n % 2].execute(LUNA)), range(9))
        until(lambda: simulator.requests()["in_flight"] == 3)
        behave(simulator, latency=0.1)
        answer_now(simulator)
    assert list(ends) == ["succeeded"] * 9
    assert simulator.requests()["max_in_flight"] == 3
    assert Limits(settings).status()["openai"].in_flight == 0


def test_one_cooldown_for_the_fleet(make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator) -> None:
    """What one was told by a 429, the others keep to; they say until when, and other models are not concerned."""
    behave(simulator, models={"gpt-6-luna": {"errors": {"rate_limited": 1}, "retry_after": {"seconds": 60}}})
    first, second = make_executor(retry={"max_attempts": 1}), make_executor()
    with pytest.raises(RateLimitedError):
        first.execute(LUNA)
    with pytest.raises(NotNowError, match="openai/gpt-6-luna: its provider asked to be left alone") as caught:
        second.execute(LUNA, patience_seconds=1)
    assert caught.value.retry_after is not None
    assert 30 < caught.value.retry_after <= 60
    assert second.run("summarize", "?", provider_hint="openai").provider == "anthropic"
    assert seen(simulator) == [429, 200]


def test_run_waits_and_answers(make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator) -> None:
    """Whoever has the time gets an answer, as soon as the model may be called."""
    behave(simulator, errors={"rate_limited": 1}, retry_after={"seconds": 1, "form": "retry-after-ms"})
    first, second = make_executor(retry={"max_attempts": 1}), make_executor()
    with pytest.raises(RateLimitedError):
        first.execute(LUNA)
    behave(simulator)
    assert second.run("summarize", "?", model="gpt-6-luna").attempts[-1].outcome == "succeeded"
    assert seen(simulator) == [429, 200]


def test_run_says_at_once_that_its_time_will_not_do(
    make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """With the reason, instead of the wait."""
    behave(simulator, errors={"rate_limited": 1}, retry_after={"seconds": 600})
    executor = make_executor(retry={"max_attempts": 1})
    with pytest.raises(RateLimitedError):
        executor.execute(LUNA)
    with pytest.raises(DeadlineExceededError, match=r"left alone; earliest in \d+\.\d s"):
        executor.execute(LUNA, 60)
    assert seen(simulator) == [429]


CHILD = """
import json, sys
from attune_worker.errors import AttuneError
from attune_worker.jobs import Job
from attune_worker.ledger import Ledger
from attune_worker.models.credentials import DEFAULT
from attune_worker.models.executor import EmpathyLLMExecutor
executor = EmpathyLLMExecutor()
print("ready", flush=True)
for line in sys.stdin:
    try:
        executor.execute(Job.parse(json.loads(line)), patience_seconds=0)
        print("succeeded", flush=True)
    except AttuneError as error:
        print(error.type, flush=True)
executor.close()
"""


class Child:
    """A process with an executor of its own, which answers one job at a time."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=process_environ(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **fields: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**LUNA.model_dump(mode="json", exclude_unset=True), **fields}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_SECONDS)
        self.process.stdout.close()


@pytest.fixture
def start_child() -> Iterator[Callable[[dict[str, str]], Child]]:
    children: list[Child] = []

    def start(environ: dict[str, str]) -> Child:
        children.append(Child(environ))
        return children[-1]

    yield start
    for child in children:
        child.end()


def test_processes_share_one_circuit(
    environ: dict[str, str],
    settings: Settings,
    simulator: Simulator,
    redis: Redis,
    start_child: Callable[[dict[str, str]], Child],
    make_executor: Callable[..., EmpathyLLMExecutor],
    until: Until,
) -> None:
    """Five failures of the fleet and nobody calls; when its time is up exactly one probe does, and all go on."""
    behave(simulator, errors={"overloaded": 1})
    children = [start_child({**environ, "ATTUNE_RETRY__MAX_ATTEMPTS": "1"}) for _ in range(2)]
    executor = make_executor(retry={"max_attempts": 1})
    assert [child.hear() for child in children] == ["ready"] * 2
    for turn in range(4):
        children[turn % 2].ask()
        assert children[turn % 2].hear() == "overloaded"
    with pytest.raises(OverloadedError):
        executor.execute(LUNA)
    for child in children:
        child.ask()
        assert child.hear() == "not_now"
    with pytest.raises(NotNowError, match="its circuit is open"):
        executor.execute(LUNA, patience_seconds=0)
    assert len(seen(simulator)) == 5

    behave(simulator, latency=PATIENCE_SECONDS)
    redis.hset(FleetKeys(settings.namespace).circuit("openai", "cheap"), "retry_ms", redis.time()[0] * 1000)
    for child in children:
        child.ask()
    ends: list[str] = []
    with ThreadPoolExecutor(22) as threads:
        for child in children:
            threads.submit(lambda child=child: ends.append(child.hear()))
        for _ in range(20):
            threads.submit(lambda: ends.append(outcome_of(lambda: executor.execute(LUNA, patience_seconds=0))))
        until(lambda: len(ends) == 21)  # while the one call that was begun is under way
        answer_now(simulator)
    assert (ends.count("succeeded"), ends.count("not_now")) == (1, 21)
    assert len(seen(simulator)) == 6
    behave(simulator)
    assert outcome_of(lambda: executor.execute(LUNA, patience_seconds=0)) == "succeeded"


def test_bad_requests_open_no_circuit(make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator) -> None:
    """They say nothing about the provider."""
    behave(simulator, errors={"bad_request": 1})
    executor = make_executor()
    for _ in range(8):
        with pytest.raises(BadRequestError):
            executor.execute(LUNA)
    behave(simulator)
    assert outcome_of(lambda: executor.execute(LUNA, patience_seconds=0)) == "succeeded"


def test_slot_of_a_killed_process_heals(
    environ: dict[str, str],
    settings: Settings,
    simulator: Simulator,
    redis: Redis,
    until: Until,
    start_child: Callable[[dict[str, str]], Child],
    make_executor: Callable[..., EmpathyLLMExecutor],
) -> None:
    """It is held until the call could not be running any more, and free after that without anybody's doing."""
    behave(simulator, errors={"hang": 1})
    child = start_child(
        {**environ, "ATTUNE_PROVIDERS__OPENAI__CONCURRENCY": "1", "ATTUNE_HTTP__REQUEST_TIMEOUT_SECONDS": "40"}
    )
    assert child.hear() == "ready"
    child.ask()
    until(lambda: simulator.requests()["in_flight"])
    child.process.send_signal(signal.SIGKILL)
    child.process.wait()
    behave(simulator)
    executor = make_executor(providers=limited(settings, concurrency=1))
    with pytest.raises(NotNowError, match="all of its provider's slots are taken"):
        executor.execute(LUNA, patience_seconds=0)
    slots = FleetKeys(settings.namespace).slots("openai")
    [(call, ends_ms)] = redis.zrange(slots, 0, -1, withscores=True)
    assert 20_000 < ends_ms - redis.time()[0] * 1000 < 72_000
    redis.zadd(slots, {call: redis.time()[0] * 1000 - 1})  # that much later
    assert outcome_of(lambda: executor.execute(LUNA, patience_seconds=0)) == "succeeded"


def test_cancelled_call_gives_its_place_back(
    make_executor: Callable[..., EmpathyLLMExecutor],
    settings: Settings,
    simulator: Simulator,
    redis: Redis,
    until: Until,
) -> None:
    """Slot and probe are free at once; what the provider may charge for counts as spent."""
    behave(simulator, errors={"overloaded": 1})
    executor = make_executor(
        providers=limited(settings, concurrency=1),
        budgets=[{"per": "day", "limit_usd": 1}],
        retry={"max_attempts": 1},
    )
    circuit = FleetKeys(settings.namespace).circuit("openai", "cheap")
    for _ in range(5):
        with pytest.raises(OverloadedError):
            executor.execute(LUNA)
    redis.hset(circuit, "retry_ms", redis.time()[0] * 1000)
    behave(simulator, errors={"hang": 1})

    async def cancelled() -> None:
        task = asyncio.create_task(executor.arun("summarize", "?", model="gpt-6-luna"))
        await asyncio.to_thread(until, lambda: simulator.requests()["in_flight"])
        assert await asyncio.to_thread(redis.hget, circuit, "state") == b"half_open"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    behave(simulator)
    until(lambda: Limits(executor.settings).status()["openai"].in_flight == 0)
    status = the_budget(executor)
    assert (status.reserved_usd, status.spent_usd > 0) == (0, True)
    assert outcome_of(lambda: executor.execute(LUNA, patience_seconds=0)) == "succeeded"
    assert redis.hget(circuit, "state") == b"closed"


def test_leave_that_comes_after_the_cancellation_is_given_back(
    make_executor: Callable[..., EmpathyLLMExecutor],
    settings: Settings,
    simulator: Simulator,
    redis: Redis,
    until: Until,
) -> None:
    """ADMIT is under way in a thread when its task is cancelled: nothing stays reserved, nothing is called."""
    executor = make_executor(budgets=[{"per": "day", "limit_usd": 1}])
    assert outcome_of(lambda: executor.execute(LUNA)) == "succeeded"
    before = the_budget(executor)

    async def cancelled() -> None:
        redis.client_pause(20_000, all=False)
        task = asyncio.create_task(executor.arun("summarize", "?", model="gpt-6-luna"))
        await asyncio.to_thread(until, lambda: any("b" in client["flags"] for client in redis.client_list()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        redis.client_unpause()

    asyncio.run(cancelled())
    calls = f"{FleetKeys(settings.namespace).tag}:call:*"
    until(lambda: b"released" in {redis.hget(key, "outcome") for key in redis.scan_iter(match=calls)})
    assert the_budget(executor) == before
    assert Limits(executor.settings).status()["openai"].in_flight == 0
    assert seen(simulator) == [200]


def test_interrupted_admission_gives_leave_back(
    make_executor: Callable[..., EmpathyLLMExecutor],
    settings: Settings,
    simulator: Simulator,
    redis: Redis,
    until: Until,
) -> None:
    """Ctrl-C falls into the wait for Redis' answer: nothing stays reserved, nothing is called."""
    executor = make_executor(budgets=[{"per": "day", "limit_usd": 1}])
    assert outcome_of(lambda: executor.execute(LUNA)) == "succeeded"
    before = the_budget(executor)
    redis.client_pause(20_000, all=False)

    def interrupt() -> None:
        until(lambda: any("b" in client["flags"] for client in redis.client_list()))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        executor.execute(LUNA)
    interrupter.join()
    redis.client_unpause()
    calls = f"{FleetKeys(settings.namespace).tag}:call:*"
    until(lambda: b"released" in {redis.hget(key, "outcome") for key in redis.scan_iter(match=calls)})
    assert the_budget(executor) == before
    assert seen(simulator) == [200]


def test_money_that_is_only_reserved_is_waited_for(
    make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """Ten calls, of whose worst cases three fit together: the others wait for what those give back."""
    behave(simulator, latency={"kind": "fixed", "seconds": 0.2})
    executor = make_executor(budgets=[{"per": "day", "limit_usd": "0.0001"}])  # three at once
    with ThreadPoolExecutor(10) as threads:
        ends = list(threads.map(lambda _: outcome_of(lambda: executor.execute(LUNA)), range(10)))
    assert set(ends) == {"succeeded"}
    assert the_budget(executor).spent_usd == billed(simulator)


DAYS_OFF = """
import os, sys, time
from urllib.parse import urlsplit
real = time.time
time.time = lambda: real() + float(sys.argv[1]) * 86_400
from decimal import Decimal
from uuid import uuid4
from attune_worker.jobs import Job
from attune_worker.ledger import Ledger
from attune_worker.models.admission import Admission
from attune_worker.models.calls import Outcome, Permit, Quote, Request
from attune_worker.models.registry import Registry
from attune_worker.settings import Settings
from benchmarks.tcp_proxy import TcpProxy
url = os.environ["ATTUNE_REDIS_URL"]
port = urlsplit(url).port
done = Outcome("succeeded", "success", 5, Decimal("0.25"), 1, 1)
with TcpProxy(1) as proxy:  # nobody is there
    settings = Settings.load(environ={**os.environ, "ATTUNE_REDIS_URL": url.replace(f":{port}", f":{proxy.port}")})
    model = Registry.from_settings(settings).find("openai/gpt-6-luna")[0]
    job = Job(task_type="summarize", prompt="?")
    admission = Admission(settings)
    verdict = admission.admit(Request(uuid4().hex, "", job, (Quote(model, 1, Decimal(1)),)))
    assert isinstance(verdict, Permit) and verdict.own_generation is not None, verdict
    if sys.argv[2] == "away":
        admission.settle(verdict, done)
    proxy.target_port = port
    if sys.argv[2] == "back":
        admission.settle(verdict, done)
    admission.close()
"""


@pytest.mark.parametrize("settled", ["away", "back"])
@pytest.mark.parametrize("days", ["-3", "3"])
def test_program_that_never_heard_redis_clock_counts_for_today(
    environ: dict[str, str], settings: Settings, redis: Redis, days: str, settled: str
) -> None:
    """Days off by its own clock, and its first call made while Redis was away: sums, ledger and budgets have it now."""
    budgets = [{"per": "day", "limit_usd": "9", "hard": False}]
    child = process_environ({**environ, "ATTUNE_BUDGETS": json.dumps(budgets)})
    subprocess.run([sys.executable, "-c", DAYS_OFF, days, settled], env=child, check=True, timeout=2 * PATIENCE_SECONDS)
    budgeted = Settings.model_validate({**settings.model_dump(), "budgets": budgets})
    [budget] = Budgets(budgeted, redis).status()
    [record] = Ledger(settings, redis).records()
    assert budget.spent_usd == Decimal("0.25")
    assert abs((record.written - record.time).total_seconds()) < 60
    keys = FleetKeys(settings.namespace)
    assert list(redis.scan_iter(match=f"{keys.tag}:costs:*")) == [keys.costs(f"{record.written:%Y%m%d}").encode()]


SKEWED = """
import sys, time
real = time.time
time.time = lambda: real() + float(sys.argv[1]) * 3600
from decimal import Decimal
from attune_worker.jobs import Job
from attune_worker.ledger import Ledger
from attune_worker.models.admission import Admission
from attune_worker.models.calls import Outcome, Permit, Quote, Request
from attune_worker.models.registry import Registry
from attune_worker.settings import Settings
settings = Settings.load()
model = Registry.from_settings(settings).find("openai/gpt-6-luna")[0]
job = Job(task_type="summarize", prompt="?")
admission = Admission(settings)
for n in range(3):
    verdict = admission.admit(Request(f"call-{n}-{sys.argv[1]}", "job", job, (Quote(model, 100, Decimal("0.01")),)))
    if isinstance(verdict, Permit):
        admission.settle(verdict, Outcome("failed", "failure", 1, Decimal(0), 0, error="overloaded"))
    else:
        print("refused")
admission.close()
"""


def test_clocks_of_workers_decide_nothing(
    environ: dict[str, str], settings: Settings, redis: Redis, make_executor: Callable[..., EmpathyLLMExecutor]
) -> None:
    """Two processes two hours apart open one circuit with six calls; it stays open for a minute, for everybody."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SKEWED, hours], env=process_environ(environ), stdout=subprocess.PIPE)
        for hours in ("-1", "1")
    ]
    said = b"".join(process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes)
    assert said.count(b"refused") <= 1
    circuit = redis.hgetall(FleetKeys(settings.namespace).circuit("openai", "cheap"))
    assert circuit[b"state"] == b"open"
    assert 30_000 < int(circuit[b"retry_ms"]) - redis.time()[0] * 1000 < 62_000
    with pytest.raises(NotNowError, match="its circuit is open") as caught:
        make_executor().execute(LUNA, patience_seconds=0)
    assert caught.value.retry_after is not None
    assert 30 < caught.value.retry_after <= 60
