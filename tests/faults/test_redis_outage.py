"""What happens to calls and their settlements while Redis is killed, stalled, or says nonsense?"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import pytest
from redis import Redis

from attune_worker.budget import Budgets
from attune_worker.client import Client
from attune_worker.errors import AttuneError, DeadlineExceededError, NotNowError
from attune_worker.jobs import Job, JobStatus
from attune_worker.limits import Limits
from attune_worker.local import LocalWorker
from attune_worker.models.breaker import CircuitBreaker
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import FleetKeys
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, answer_now, process_environ

Until = Callable[[Callable[[], Any]], Any]
JOB = Job.parse({"task_type": "summarize", "prompt": "a prompt", "model": "gpt-6-luna", "max_tokens": 50})
SOFT = [{"per": "day", "limit_usd": 100, "hard": False}]
HARD = [{"per": "day", "limit_usd": 100}]


@pytest.fixture
def environ(make_environ: Any, simulator: Simulator, own_server: EmbeddedRedis) -> dict[str, str]:
    environ: dict[str, str] = make_environ(simulator, REDIS_URL=own_server.url, REDIS_TIMEOUT_SECONDS=0.5)
    return environ


@pytest.fixture
def make_executor(settings: Settings) -> Iterator[Callable[..., EmpathyLLMExecutor]]:
    executors: list[EmpathyLLMExecutor] = []

    def make(**changes: Any) -> EmpathyLLMExecutor:
        executors.append(EmpathyLLMExecutor(Settings.model_validate({**settings.model_dump(), **changes})))
        return executors[-1]

    yield make
    for executor in executors:
        executor.close()


class Crowd:
    """Threads that call until they are stopped, and note what came of it and how long it took."""

    def __init__(self, executor: EmpathyLLMExecutor, size: int = 8) -> None:
        self.answered = 0
        self.refused: list[AttuneError] = []
        self.other: list[Exception] = []
        self.longest_seconds = 0.0
        self._executor = executor
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work) for _ in range(size)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._stop.wait(0.01):
            began = time.monotonic()
            try:
                self._executor.execute(JOB, patience_seconds=0)
            except AttuneError as error:
                self.refused.append(error)
            except Exception as error:  # noqa: BLE001  # that there is none is what the tests are about
                self.other.append(error)
            else:
                with self._lock:
                    self.answered += 1
            with self._lock:
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)


def calls(redis: Redis, settings: Settings) -> int:
    """Return how many calls the telemetry has counted."""
    keys = redis.scan_iter(match=f"{FleetKeys(settings.namespace).tag}:stats:*")
    return sum(int(redis.hget(key, "openai/gpt-6-luna|calls") or 0) for key in keys)


def settled(executor: EmpathyLLMExecutor) -> bool:
    return not len(executor._admission._unsettled)


def billed(simulator: Simulator) -> Decimal:
    return Decimal(simulator.invoice(summary=True)["total_usd"])


def assert_books_agree(redis: Redis, executor: EmpathyLLMExecutor, simulator: Simulator) -> None:
    """Every call that the provider has billed was counted once, and nothing is still reserved or held."""
    assert calls(redis, executor.settings) == simulator.invoice()["count"]
    [status] = Budgets(executor.settings).status()
    assert (status.spent_usd, status.reserved_usd) == (billed(simulator), 0)
    assert Limits(executor.settings).status()["openai"].in_flight == 0
    assert redis.zcard(FleetKeys(executor.settings.namespace).calls) == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_calls_go_on_without_redis_and_are_counted_when_it_is_back(
    own_server: EmbeddedRedis,
    redis: Redis,
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    until: Until,
    caplog: pytest.LogCaptureFixture,
    how: signal.Signals,
) -> None:
    """Every call is answered; afterwards the books agree with the invoice; the log has one line for each change."""
    caplog.set_level(logging.INFO, logger="attune_worker")
    executor = make_executor(budgets=SOFT)
    with Crowd(executor) as crowd:
        until(lambda: crowd.answered > 30)
        own_server.stop(how)
        before = crowd.answered
        until(lambda: crowd.answered > before + 60)
        assert not settled(executor)
        own_server.start()
        until(lambda: settled(executor))
        before = crowd.answered
        until(lambda: crowd.answered > before + 30)
    until(lambda: settled(executor))
    assert (crowd.refused, crowd.other) == ([], [])
    assert_books_agree(redis, executor, simulator)
    lines = [(one.levelname, one.message) for one in caplog.records if one.name.startswith("attune_worker.models")]
    lines += [(one.levelname, one.message) for one in caplog.records if one.name == "attune_worker.store.backlog"]
    assert [level for level, _ in lines].count("WARNING") == 1, lines
    assert [level for level, _ in lines].count("INFO") == 1, lines
    assert own_server._password not in caplog.text


def test_stalled_redis_costs_one_timeout_and_not_one_for_each_call(
    own_server: EmbeddedRedis,
    redis: Redis,
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    until: Until,
) -> None:
    """Calls go on while it hangs; what it had heard and does later changes nothing: no call is counted twice."""
    executor = make_executor(budgets=SOFT)
    assert own_server._process is not None
    with Crowd(executor) as crowd:
        until(lambda: crowd.answered > 30)
        os.kill(own_server._process.pid, signal.SIGSTOP)
        try:
            before = crowd.answered
            until(lambda: executor._admission._outage.away)
            until(lambda: crowd.answered > before + 100)
        finally:
            os.kill(own_server._process.pid, signal.SIGCONT)
        until(lambda: settled(executor))
        before = crowd.answered
        until(lambda: crowd.answered > before + 30)
    until(lambda: settled(executor))
    assert (crowd.refused, crowd.other) == ([], [])
    assert_books_agree(redis, executor, simulator)


def test_hard_budget_is_kept_while_redis_stalls(
    own_server: EmbeddedRedis,
    redis: Redis,
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    until: Until,
) -> None:
    """Nothing is called; and what Redis took for calls that were given up comes back."""
    executor = make_executor(budgets=HARD)
    assert own_server._process is not None
    with Crowd(executor) as crowd:
        until(lambda: crowd.answered > 10)
        os.kill(own_server._process.pid, signal.SIGSTOP)
        try:
            until(lambda: len(crowd.refused) > 50)
            until(lambda: not simulator.requests()["in_flight"])
            before = len(simulator.requests()["requests"])
            refused = len(crowd.refused)
            until(lambda: len(crowd.refused) > refused + 50)
            assert len(simulator.requests()["requests"]) == before
        finally:
            os.kill(own_server._process.pid, signal.SIGCONT)
        until(lambda: settled(executor))
        answered = crowd.answered
        until(lambda: crowd.answered > answered + 10)
    until(lambda: settled(executor))
    assert crowd.other == []
    assert {type(error) for error in crowd.refused} == {NotNowError}
    assert {error.message for error in crowd.refused} == {"a hard budget cannot be kept while Redis is away"}
    assert_books_agree(redis, executor, simulator)


def test_hard_budget_without_redis_waits_or_says_so(
    own_server: EmbeddedRedis, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """A job is put back, a caller hears it within its time; no provider is called."""
    executor = make_executor(budgets=HARD)
    own_server.stop()
    with pytest.raises(NotNowError, match="a hard budget cannot be kept while Redis is away") as caught:
        executor.execute(JOB, patience_seconds=1)
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 10
    with pytest.raises(DeadlineExceededError, match="a hard budget cannot be kept while Redis is away"):
        executor.execute(JOB, 1)
    assert simulator.requests()["requests"] == []
    own_server.start()


def test_own_circuit_protects_the_provider_while_redis_is_away(
    own_server: EmbeddedRedis, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """After five failures that this process has seen itself, it calls no more."""
    executor = make_executor(retry={"max_attempts": 1})
    own_server.stop()
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "errors": {"overloaded": 1}})
    ends = []
    for _ in range(8):
        with pytest.raises(AttuneError) as caught:
            executor.execute(JOB, patience_seconds=0)
        ends.append(caught.value.type)
    assert ends == ["overloaded"] * 5 + ["not_now"] * 3
    assert len(simulator.requests()["requests"]) == 5
    own_server.start()


def test_executor_that_starts_without_redis_answers(
    own_server: EmbeddedRedis,
    redis: Redis,
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    until: Until,
) -> None:
    """And its calls are in the books once Redis is there."""
    own_server.stop()
    executor = make_executor(budgets=SOFT)
    for _ in range(3):
        executor.execute(JOB)
    own_server.start()
    until(lambda: settled(executor))
    assert_books_agree(redis, executor, simulator)


def test_full_redis_loses_no_settlement(
    redis: Redis, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator, until: Until
) -> None:
    """It answers, but can write nothing: that is an outage, too."""
    executor = make_executor(budgets=SOFT)
    executor.execute(JOB)
    redis.config_set("maxmemory", "1")
    for _ in range(3):
        executor.execute(JOB)
    assert not settled(executor)
    redis.config_set("maxmemory", "0")
    until(lambda: settled(executor))
    assert_books_agree(redis, executor, simulator)


def test_settlement_that_redis_refuses_holds_up_nobody(
    make_executor: Callable[..., EmpathyLLMExecutor],
    redis: Redis,
    simulator: Simulator,
    until: Until,
    own_server: EmbeddedRedis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Again would fail again: it is logged and left, and those around it are written."""
    executor = make_executor(budgets=SOFT)
    executor.execute(JOB)
    own_server.stop()
    executor.execute(JOB)
    backlog = executor._admission._unsettled
    keys, _ = backlog._entries[-1]
    backlog.add((keys, "{"))
    executor.execute(JOB)
    own_server.start()
    until(lambda: settled(executor))
    assert_books_agree(redis, executor, simulator)
    assert caplog.text.count("could not be settled in full") == 1


@pytest.mark.parametrize("garbage", ["string", "hash"])
def test_nonsense_under_every_key_stops_nobody(
    redis: Redis,
    make_executor: Callable[..., EmpathyLLMExecutor],
    simulator: Simulator,
    until: Until,
    garbage: str,
) -> None:
    """In the middle of traffic: every call is answered, and what is counted from then on is right."""
    executor = make_executor(budgets=SOFT)
    tag = FleetKeys(executor.settings.namespace).tag
    with Crowd(executor, 4) as crowd:
        until(lambda: crowd.answered > 10)
        for _ in range(3):
            with redis.pipeline() as together:
                for key in list(redis.scan_iter(match=f"{tag}*", count=1000)):
                    fields = redis.hkeys(key) if redis.type(key) == b"hash" else []
                    together.delete(key)
                    if garbage == "hash":
                        together.hset(key, mapping=dict.fromkeys([*fields, b"x"], b"\xff{"))
                    else:
                        together.set(key, "garbage")
                together.execute()
            before = crowd.answered
            until(lambda before=before: crowd.answered > before + 10)
    assert (crowd.refused, crowd.other) == ([], [])
    until(lambda: settled(executor))
    before_calls, before_usd = calls(redis, executor.settings), Budgets(executor.settings).status()[0].spent_usd
    before_billed = billed(simulator)
    for _ in range(5):
        executor.execute(JOB, patience_seconds=0)
    assert calls(redis, executor.settings) == before_calls + 5
    [status] = Budgets(executor.settings).status()
    assert status.spent_usd - before_usd == billed(simulator) - before_billed > 0
    assert Limits(executor.settings).status()["openai"].in_flight == 0


def test_what_the_fleet_knew_still_holds_when_redis_goes(
    own_server: EmbeddedRedis, make_executor: Callable[..., EmpathyLLMExecutor], simulator: Simulator
) -> None:
    """A process that was refused by the fleet's open circuit does not find out again by itself."""
    executor = make_executor()
    with closing(CircuitBreaker(settings=executor.settings)) as breaker:
        breaker.trip("openai", "cheap", seconds=60, reason="trouble")
    with pytest.raises(NotNowError):
        executor.execute(JOB, patience_seconds=0)
    own_server.stop(signal.SIGKILL)
    with pytest.raises(NotNowError, match="as far as this process knows"):
        executor.execute(JOB, patience_seconds=0)
    assert simulator.invoice()["count"] == 0


@pytest.mark.parametrize("pool", ["threads", "solo", "prefork"])
def test_worker_that_is_stopped_writes_what_it_keeps(
    own_server: EmbeddedRedis,
    redis_server: EmbeddedRedis,
    make_environ: Environ,
    simulator: Simulator,
    start_worker: Callable[..., LocalWorker],
    until: Until,
    tmp_path: Path,
    pool: str,
) -> None:
    """Redis goes in the middle of a call and is back after SIGTERM: the last try is not left to the outage's turn."""
    config = tmp_path / "attune.toml"
    config.write_text('[[budgets]]\nper = "day"\nlimit_usd = 1\n')
    environ = make_environ(
        simulator,
        CONFIG=config,
        REDIS_URL=own_server.url,
        BROKER_URL=redis_server.url,
        RESULT_BACKEND=redis_server.url,
        REDIS_TIMEOUT_SECONDS=0.5,
    )
    settings = Settings.load(environ=environ)
    worker = start_worker(environ, pool=pool, concurrency=2)
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": PATIENCE_SECONDS})
    with closing(Client(settings)) as client:
        handle = client.submit("summarize", "?")
        until(lambda: handle.status() is JobStatus.RUNNING and simulator.requests()["in_flight"])
        own_server.stop()
        answer_now(simulator)
        until(lambda: "ends of jobs are kept until Redis answers" in worker.log.read_text())
        assert billed(simulator) > 0
        worker.terminate()
        if pool != "solo":  # which looks at the signal when its job is done
            until(lambda: "Warm shutdown" in worker.log.read_text())
        own_server.start()
        assert worker.process is not None
        assert worker.process.wait(PATIENCE_SECONDS) == 0
        assert handle.status() is JobStatus.SUCCEEDED
    [status] = Budgets(settings).status()
    assert (status.spent_usd, status.reserved_usd) == (billed(simulator), 0)
    assert "Traceback" not in worker.log.read_text()


def test_program_that_ends_without_close_writes_what_it_keeps(
    own_server: EmbeddedRedis, environ: dict[str, str], settings: Settings, redis: Redis, simulator: Simulator
) -> None:
    """A script that nobody taught to close its executor; a child that it forked has nothing to write."""
    program = """
        import os
        from attune_worker.models.executor import EmpathyLLMExecutor

        executor = EmpathyLLMExecutor()
        executor.run("summarize", "a prompt", model="gpt-6-luna")
        print("called", flush=True)
        if (child := os.fork()) == 0:
            raise SystemExit(len(executor._admission._unsettled))
        assert os.waitpid(child, 0)[1] == 0
    """
    own_server.stop()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], env=process_environ(environ), stdout=subprocess.PIPE
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == b"called\n"
        own_server.start()
        assert script.wait(PATIENCE_SECONDS) == 0
    assert calls(redis, settings) == simulator.invoice()["count"] == 1
