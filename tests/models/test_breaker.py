import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import datetime

import pytest
from redis import Redis

from attune_worker.errors import (
    BadRequestError,
    ConfigurationError,
    MalformedAnswerError,
    OverloadedError,
    RateLimitedError,
    ServiceUnavailableError,
)
from attune_worker.jobs import ModelTier
from attune_worker.models.breaker import CircuitBreaker
from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import FleetKeys
from tests.conftest import Until, longer_and_longer, process_environ

TIER = ("anthropic", "capable")
RECOVERY_SECONDS = 0.2


def refused_after(act: Callable[[float], object], ask: Callable[[], bool]) -> None:
    """Have something be forbidden for a time that is not over when we ask."""
    for seconds in longer_and_longer(RECOVERY_SECONDS):
        act(seconds)
        if not ask():
            return
    pytest.fail("it was not refused")


Make = Callable[..., CircuitBreaker]


@pytest.fixture
def make(settings: Settings, redis: Redis) -> Make:
    """Return a function that makes the breaker of another worker of this test's fleet: 3 failures open it."""
    owners = iter(f"worker-{number}" for number in range(1000))

    def make_breaker(failure_threshold: int = 3, recovery_seconds: float = 60, **options) -> CircuitBreaker:
        options = {"owner": next(owners), "settings": settings, "redis": redis, **options}
        return CircuitBreaker(failure_threshold, recovery_seconds, **options)

    return make_breaker


@pytest.fixture
def breaker(make: Make) -> CircuitBreaker:
    return make()


def opened(breaker: CircuitBreaker, times: int = 3) -> CircuitBreaker:
    for _ in range(times):
        breaker.record_failure(*TIER, OverloadedError("busy"))
    return breaker


def status(breaker: CircuitBreaker, label: str = "anthropic:capable") -> dict:
    return breaker.get_status()[label]


def seconds_until(iso: str | None, redis: Redis) -> float:
    seconds, microseconds = redis.time()
    return datetime.fromisoformat(iso or "").timestamp() - seconds - microseconds / 1e6


def together(*actions: Callable[[], object]) -> list[object]:
    """Run the actions at the same time, each in its thread, and return what they returned."""
    answers: list[object] = []
    start = threading.Barrier(len(actions))

    def run(action: Callable[[], object]) -> None:
        start.wait()
        answers.append(action())

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def connections(listener: socket.socket) -> int:
    """Return how many connections wait to be accepted."""
    listener.setblocking(False)
    number = 0
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            number += 1
    return number


def process(program: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"from attune_worker.models.breaker import CircuitBreaker\n{program}"]
    return subprocess.Popen(
        command, env=process_environ(environ), stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


class TestFleet:
    """Many workers, one circuit."""

    def test_failures_of_many_workers_open_one_circuit(self, make: Make) -> None:
        """Three failures in the fleet, not three per process; a worker that has seen none refuses too."""
        workers = [make() for _ in range(4)]
        for worker in workers[:2]:
            worker.record_failure(*TIER)
        assert workers[3].is_available(*TIER)
        workers[2].record_failure(*TIER)
        assert not any(worker.is_available(*TIER) for worker in workers)
        assert not make().is_available(*TIER)  # a new worker adopts what is, and resets nothing

    def test_tiers_and_providers_are_apart(self, breaker: CircuitBreaker) -> None:
        """A provider's premium models may work while its cheap ones do not; enum and text are the same tier."""
        opened(breaker)
        assert not breaker.is_available("anthropic", ModelTier.CAPABLE)
        assert breaker.is_available("anthropic", "premium")
        assert breaker.is_available("openai", "capable")
        assert breaker.is_available("anthropic")

    @pytest.mark.parametrize("skew_seconds", [-3600, 3600])
    def test_another_process_with_a_wrong_clock_agrees(
        self, environ, settings: Settings, redis: Redis, skew_seconds: int
    ) -> None:
        """A breaker without arguments; its failures open the circuit here, for as long as Redis' clock says."""
        program = (
            f"import time\nreal = time.time\ntime.time = lambda: real() + {skew_seconds}\n"
            "breaker = CircuitBreaker()\n"
            "for _ in range(5):\n    breaker.record_failure('anthropic', 'capable')\n"
            "print(breaker.is_available('anthropic', 'capable'))\n"
        )
        output, _ = process(program, environ).communicate()
        assert output.split() == ["False"]
        with closing(CircuitBreaker(settings=settings)) as breaker:
            assert not breaker.is_available(*TIER)
            assert 30 < seconds_until(status(breaker)["retry_at"], redis) <= 60

    def test_concurrent_trips_are_one_transition(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        """Forty failures at once open the circuit once, and one worker says so."""
        workers = [make() for _ in range(40)]
        together(*(lambda worker=worker: worker.record_failure(*TIER) for worker in workers))
        assert [record.getMessage() for record in caplog.records] == [
            "circuit anthropic:capable: opened: 3 failures in a row"
        ]

    def test_one_probe_among_fifty_workers(self, make: Make, until: Until) -> None:
        """After the wait one of them may try; its success lets everybody in."""
        workers = [make(recovery_seconds=RECOVERY_SECONDS) for _ in range(50)]
        opened(workers[0])
        prober = until(lambda: next((worker for worker in workers if worker.is_available(*TIER)), None))
        assert together(*(lambda worker=worker: worker.is_available(*TIER) for worker in workers)) == [False] * 50
        assert status(workers[0])["probes"] == 1
        prober.record_success(*TIER)
        assert all(together(*(lambda worker=worker: worker.is_available(*TIER) for worker in workers)))

    def test_racing_for_the_probe(self, make: Make, until: Until, redis: Redis, settings: Settings) -> None:
        """Fifty ask in the same moment, just when the wait is over: one is let through."""
        workers = [make(recovery_seconds=RECOVERY_SECONDS) for _ in range(50)]
        opened(workers[0])
        until(lambda: seconds_until(status(workers[0])["retry_at"], redis) < 0)
        answers = together(*(lambda worker=worker: worker.is_available(*TIER) for worker in workers))
        assert sorted(answers) == [False] * 49 + [True]

    def test_killed_prober_costs_its_lease(self, environ, make: Make, until: Until) -> None:
        """Its process is gone without a word; after its lease another worker probes, and nobody resets anything."""
        breaker = make(recovery_seconds=0.001, lease_seconds=60)
        opened(breaker)
        for lease_seconds in longer_and_longer(3):
            program = (
                f"import time\nbreaker = CircuitBreaker(lease_seconds={lease_seconds})\n"
                "while not breaker.is_available('anthropic', 'capable'):\n    time.sleep(0.01)\n"
                "print('probing', flush=True)\ninput()\n"
            )
            with process(program, environ) as prober:
                assert prober.stdout is not None
                assert prober.stdout.readline() == "probing\n"
                refused = not breaker.is_available(*TIER)
                prober.send_signal(signal.SIGKILL)
            if refused:
                break
            breaker.release(*TIER)  # the lease was over before we asked
        assert refused
        until(lambda: breaker.is_available(*TIER))
        breaker.record_success(*TIER)
        assert status(breaker)["state"] == "closed"

    def test_forgotten_scripts_change_nothing(self, breaker: CircuitBreaker, redis: Redis) -> None:
        """A restart of Redis forgets scripts, not circuits."""
        opened(breaker, 2)
        redis.script_flush()
        breaker.record_failure(*TIER)
        redis.script_flush()
        assert not breaker.is_available(*TIER)

    def test_foreign_keys_are_no_errors(self, breaker: CircuitBreaker, redis: Redis, settings: Settings) -> None:
        """Whatever somebody has written under our names, the breaker works, and calls are allowed."""
        keys = FleetKeys(settings.namespace)
        redis.set(keys.circuit(*TIER), "text")
        redis.set(keys.circuits, "text")
        assert breaker.get_status() == {}
        assert breaker.is_available(*TIER)
        opened(breaker)
        redis.sadd(keys.circuits, "no JSON", '{"a": 1}', '["", 1]', "[" * 10_000)
        assert list(breaker.get_status()) == ["anthropic:capable"]


class TestResults:
    """Which results count, and for which permit."""

    @pytest.mark.parametrize(
        ("error", "counts"),
        [
            (None, True),
            (OverloadedError("529"), True),
            (MalformedAnswerError("cut"), True),
            (OSError("connection"), True),
            (BadRequestError("400"), False),
            (RateLimitedError("429"), False),
            (asyncio.CancelledError(), False),
            (KeyboardInterrupt(), False),
        ],
    )
    def test_which_errors_count(self, make: Make, error: BaseException | None, counts: bool) -> None:
        """Errors of the caller, limits and cancellations say nothing about the provider's health."""
        breaker = make(failure_threshold=1)
        breaker.record_failure(*TIER, error)
        assert breaker.is_available(*TIER) is not counts

    def test_retry_after_of_the_error_wins(self, make: Make, redis: Redis) -> None:
        """The provider asks for more time than the breaker would give it."""
        breaker = make(failure_threshold=1, recovery_seconds=5)
        breaker.record_failure(*TIER, OverloadedError("busy", retry_after=300))
        assert 200 < seconds_until(status(breaker)["retry_at"], redis) <= 300

    def test_result_of_an_older_permit_is_dropped(self, make: Make) -> None:
        """A call that began before the circuit closed again says nothing about it now."""
        late, other = make(failure_threshold=1), make(failure_threshold=1)
        assert late.is_available(*TIER)
        opened(other, 1)
        other.reset(*TIER)
        late.record_failure(*TIER)
        assert other.is_available(*TIER)

    def test_probe_recorded_by_another_thread(self, make: Make, until: Until) -> None:
        """Whoever of this breaker's threads has the probe's result tells it."""
        breaker = make(recovery_seconds=RECOVERY_SECONDS)
        opened(breaker)
        until(lambda: breaker.is_available(*TIER))
        together(lambda: breaker.record_success(*TIER))
        assert status(breaker)["state"] == "closed"

    def test_tasks_on_one_loop_have_permits_of_their_own(self, make: Make) -> None:
        """A late task's failure is dropped although another task of its thread holds a newer permit."""
        breaker = make(failure_threshold=1)

        async def late(asked: asyncio.Event, go_on: asyncio.Event) -> None:
            assert breaker.is_available(*TIER)
            asked.set()
            await go_on.wait()
            breaker.record_failure(*TIER)

        async def scene() -> None:
            asked, go_on = asyncio.Event(), asyncio.Event()
            task = asyncio.create_task(late(asked, go_on))
            await asked.wait()
            breaker.reset(*TIER)
            assert breaker.is_available(*TIER)
            go_on.set()
            await task
            assert breaker.is_available(*TIER)

        asyncio.run(scene())

    def test_released_probe_makes_room_for_another(self, make: Make, until: Until) -> None:
        """A call that was not made after all gives its permit back."""
        first, second = make(recovery_seconds=RECOVERY_SECONDS), make(recovery_seconds=RECOVERY_SECONDS)
        opened(first)
        until(lambda: first.is_available(*TIER))
        assert not second.is_available(*TIER)
        first.release(*TIER)
        assert second.is_available(*TIER)

    def test_asking_often_leaves_the_last_permit(self, breaker: CircuitBreaker, make: Make) -> None:
        """A caller that looks at many circuits before each call still has its result counted."""
        for _ in range(3):
            breaker.is_available(*TIER)
        make().reset(*TIER)
        assert breaker.is_available(*TIER)
        breaker.record_failure(*TIER)
        breaker.record_failure(*TIER)
        assert status(breaker)["failure_count"] == 2


class TestOperators:
    """What people do to a circuit, and see of it."""

    def test_status_tells_what_happened(self, breaker: CircuitBreaker, redis: Redis) -> None:
        """Who, when, why, and until when."""
        opened(breaker)
        found = status(breaker)
        assert (found["state"], found["is_open"], found["failure_count"]) == ("open", True, 3)
        assert (found["reason"], found["error"], found["by"]) == (
            "3 failures in a row",
            "OverloadedError",
            breaker.owner,
        )
        assert found["forced"] is None
        assert found["last_failure"] == found["opened_at"]
        assert -30 < seconds_until(found["opened_at"], redis) <= 0

    def test_status_changes_nothing(self, breaker: CircuitBreaker, redis: Redis, settings: Settings) -> None:
        """Dashboards may look as often as they like."""
        opened(breaker)
        key = FleetKeys(settings.namespace).circuit(*TIER)
        before = redis.hgetall(key)
        breaker.get_status()
        assert redis.hgetall(key) == before

    def test_trip_of_a_provider_stops_all_its_tiers_until_reset(self, breaker: CircuitBreaker, make: Make) -> None:
        """Whatever the tiers' own circuits say; others go on."""
        make().trip("anthropic", reason="their status page says so", by="ada")
        assert not breaker.is_available(*TIER)
        assert not breaker.is_available("anthropic")
        assert breaker.is_available("openai", "capable")
        found = status(breaker, "anthropic:*")
        assert (found["forced"], found["by"], found["reason"]) == ("open", "ada", "their status page says so")
        assert (found["is_open"], found["retry_at"]) == (True, None)
        breaker.reset("anthropic")
        assert breaker.is_available(*TIER)

    def test_trip_for_a_time_is_followed_by_a_probe(self, make: Make, until: Until) -> None:
        """One call of any tier finds out for the whole provider, and its result counts for both circuits."""
        first, second = make(), make()
        refused_after(
            lambda seconds: first.trip("anthropic", seconds=seconds, reason="trial", by="ada"),
            lambda: first.is_available(*TIER),
        )
        until(lambda: first.is_available(*TIER))
        assert not second.is_available("anthropic", "cheap")
        first.record_success(*TIER)
        assert status(first, "anthropic:*")["state"] == "closed"
        assert second.is_available("anthropic", "cheap")

    def test_disabled_allows_all_and_records_nothing(self, breaker: CircuitBreaker) -> None:
        """Not even an open circuit refuses."""
        opened(breaker)
        breaker.override(*TIER, "disabled", by="ada")
        assert breaker.is_available(*TIER)
        opened(breaker, 10)
        breaker.override(*TIER, None)
        assert status(breaker)["failure_count"] == 3
        assert not breaker.is_available(*TIER)

    def test_metrics_only_counts_and_never_opens(self, breaker: CircuitBreaker) -> None:
        """For trying out a threshold on live calls."""
        breaker.override(*TIER, "metrics_only", by="ada", reason="trial")
        opened(breaker, 10)
        assert breaker.is_available(*TIER)
        found = status(breaker)
        assert (found["failure_count"], found["forced"], found["state"]) == (3, "metrics_only", "closed")

    def test_override_for_a_time_ends_by_itself(self, breaker: CircuitBreaker, until: Until) -> None:
        """Nobody has to remember to lift it."""
        refused_after(
            lambda seconds: breaker.override(*TIER, "open", seconds=seconds), lambda: breaker.is_available(*TIER)
        )
        until(lambda: breaker.is_available(*TIER))
        assert status(breaker)["forced"] is None

    def test_reset_forgets_failures_and_probes(self, make: Make, until: Until) -> None:
        """The probe that is under way decides nothing any more."""
        breaker = make(recovery_seconds=RECOVERY_SECONDS)
        opened(breaker)
        until(lambda: breaker.is_available(*TIER))
        make().reset(*TIER, by="ada")
        breaker.record_failure(*TIER)
        found = status(breaker)
        assert (found["state"], found["failure_count"], found["by"]) == ("closed", 0, "ada")

    def test_what_reset_reaches(self, breaker: CircuitBreaker) -> None:
        """One circuit, all of a provider, or all."""
        names = [("a", "x"), ("a", "y"), ("a", None), ("b", "x"), ("b", None)]

        def still_open(*which: str | None) -> list[tuple[str, str | None]]:
            for name in names:
                breaker.trip(*name)
            breaker.reset(*which)
            found = breaker.get_status()
            return [(provider, tier) for provider, tier in names if found[f"{provider}:{tier or '*'}"]["is_open"]]

        assert still_open("a", "x") == names[1:]
        assert still_open("a") == names[3:]
        assert still_open() == []

    def test_reset_finds_what_the_index_has_lost(
        self, breaker: CircuitBreaker, redis: Redis, settings: Settings
    ) -> None:
        """An evicted index hides no circuit of a configured provider, and none is made that was not there."""
        index = FleetKeys(settings.namespace).circuits
        for which in [("anthropic",), ()]:
            for tier in ("cheap", None):
                breaker.trip("anthropic", tier)
            breaker.trip("openai", "premium")
            redis.delete(index)
            breaker.reset(*which)
            found = {name: one["is_open"] for name, one in breaker.get_status().items()}
            assert found == {"anthropic:cheap": False, "anthropic:*": False} | (
                {} if which else {"openai:premium": False}
            )
            assert breaker.is_available("anthropic", "cheap")
            assert breaker.is_available("openai", "premium") is not bool(which)

    def test_names_never_collide(self, breaker: CircuitBreaker) -> None:
        """Whatever they hold; each is found again in the status."""
        names = [
            ("a", "b:c"),
            ("a:b", "c"),
            ("a", "*"),
            ("a", None),
            ("a%3Ab", "c"),
            ("{a}", "b c"),
            ("x" * 10_000, "y"),
            ("x" * 10_000 + "x", "y"),
            ("\ud800", "\udfff"),
            ("ümlaut", "\0\n"),
        ]
        for name in names:
            breaker.record_failure(*name)
        found = breaker.get_status()
        assert len(found) == len(names)
        assert {circuit["failure_count"] for circuit in found.values()} == {1}

    def test_what_makes_no_sense_is_refused(self, breaker: CircuitBreaker, settings: Settings) -> None:
        """With the name of the argument."""
        for wrong in (lambda: breaker.is_available(""), lambda: breaker.record_success("", "cheap")):
            with pytest.raises(ValueError, match=r"^provider: "):
                wrong()
        with pytest.raises(ValueError, match=r"^seconds: "):
            breaker.trip("anthropic", seconds=-1)
        with pytest.raises(ValueError, match=r"^tier: "):
            breaker.reset(tier="cheap")
        with pytest.raises(ValueError, match=r"^kind: "):
            breaker.override("anthropic", kind="off")
        with pytest.raises(ConfigurationError, match=r"^failure_threshold: "):
            CircuitBreaker(0, settings=settings)


class TestRedisAway:
    """Calls go on, by what this process sees."""

    @pytest.fixture
    def server(self, tmp_path) -> Iterator[EmbeddedRedis]:
        with EmbeddedRedis(tmp_path / "redis") as server:
            yield server

    @pytest.fixture
    def make_breaker(self, make_environ, simulator) -> Iterator[Callable[..., CircuitBreaker]]:
        with ExitStack() as stack:

            def make_breaker(**overrides) -> CircuitBreaker:
                settings = Settings.load(environ=make_environ(simulator, **overrides))
                return stack.enter_context(closing(CircuitBreaker(3, 60, settings=settings)))

            yield make_breaker

    def test_goes_on_alone_and_comes_back(
        self, server: EmbeddedRedis, make_breaker, until: Until, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It opens after three failures of its own, says so once, and takes up the fleet's state again."""
        caplog.set_level(logging.INFO)
        breaker = make_breaker(REDIS_URL=server.url)
        opened(breaker)
        server.stop()
        assert not breaker.is_available(*TIER)  # what the fleet knew is not forgotten
        assert breaker.is_available("openai", "capable")
        for _ in range(3):
            assert breaker.is_available("openai", "capable")
            breaker.record_failure("openai", "capable")
        assert not breaker.is_available("openai", "capable")
        for ask in (breaker.get_status, breaker.reset, lambda: breaker.trip("openai")):
            with pytest.raises(ServiceUnavailableError):
                ask()

        server.start()
        assert until(lambda: breaker.is_available("openai", "capable"))
        assert not breaker.is_available(*TIER)
        about_redis = [record.levelname for record in caplog.records if "Redis" in record.getMessage()]
        assert about_redis == ["WARNING", "INFO"]
        assert not any("Traceback" in record.getMessage() or record.exc_info for record in caplog.records)

    def test_dead_redis_costs_no_timeout_per_call(self, make_breaker) -> None:
        """A server that takes commands and never answers is tried now and then, not at each call."""
        with socket.create_server(("127.0.0.1", 0)) as hanging:  # the kernel accepts, and nobody reads
            url = f"redis://127.0.0.1:{hanging.getsockname()[1]}/0"
            breaker = make_breaker(REDIS_URL=url, REDIS_TIMEOUT_SECONDS=0.2)
            assert breaker.is_available(*TIER)
            for _ in range(1000):
                breaker.record_success(*TIER)
            assert 1 <= connections(hanging) <= 10
