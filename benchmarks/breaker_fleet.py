"""What does an outage cost a fleet of 50 workers? Breakers of each process, pybreaker's in Redis, and attune-worker's.

The provider is well, then fails every call for a while, at once or only when the caller's patience is over, and is
well again. Workers are threads, each with a breaker object of its own as if it were a process: breakers share
nothing but what they keep in Redis. Run it with ``python benchmarks/breaker_fleet.py``.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import click
import httpx
import pybreaker
from contenders import Services
from processes import BenchmarkError, PythonProcess
from redis import Redis
from report import machine, versions
from rich.console import Console
from rich.table import Table

from attune_worker.models.breaker import CircuitBreaker
from attune_worker.models.local_circuits import LocalCircuits
from attune_worker.sections import BreakerSettings
from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis

TIER = ("anthropic", "capable")
BODY = {"model": "claude-sonnet-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "a few words"}]}
HEADERS = {"x-api-key": "a-key-of-the-benchmark", "anthropic-version": "2023-06-01"}
LATENCY_SECONDS = 0.05
THRESHOLD = 5
ERRORS = {"fast": {"overloaded": 1.0}, "slow": {"hang": 1.0}}
"""HTTP 529, or no answer at all until the caller gives up."""

HEADINGS = ("provider fails", "breaker", "wasted calls", "most in a second", "most in flight", "back after s")

Guard = Callable[[Callable[[], None]], None]
"""Runs a call if the worker's breaker lets it, and tells the breaker how it ended."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many workers, and for how long (seconds): the provider well, down, the breakers open, a caller patient."""

    workers: int
    well_seconds: float
    down_seconds: float
    recovery_seconds: float
    timeout_seconds: float
    pause_seconds: float


FULL = Size(50, well_seconds=3, down_seconds=20, recovery_seconds=2, timeout_seconds=1, pause_seconds=0.2)
QUICK = Size(10, well_seconds=0.1, down_seconds=0.5, recovery_seconds=0.15, timeout_seconds=0.15, pause_seconds=0.05)


@dataclass(frozen=True, slots=True)
class Call:
    """One call that was sent."""

    start: float
    end: float
    answered: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run showed. The peaks are those of the outage's second half, when every breaker has had its say."""

    failing: str
    breaker: str
    wasted_calls: int
    most_in_a_second: int
    most_in_flight: int
    seconds_to_first_success: float


class Fleet:
    """Workers that call the provider, pause, and call again, each behind its guard, until told to stop."""

    def __init__(self, guards: Sequence[Guard], url: str, size: Size) -> None:
        self.calls: list[Call] = []
        self._size = size
        self._url = url
        self._stop = threading.Event()
        limits = httpx.Limits(max_connections=4 * size.workers)
        self._http = httpx.Client(timeout=size.timeout_seconds, headers=HEADERS, limits=limits, verify=False)
        self._threads = [threading.Thread(target=self._work, args=(guard,)) for guard in guards]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._http.close()

    def wait_for_success(self, since: float, longest_seconds: float) -> float:
        """Return how long after ``since`` a call that was sent after it was first answered."""
        while time.monotonic() < since + longest_seconds:
            ends = [call.end for call in list(self.calls) if call.answered and call.start >= since]
            if ends:
                return min(ends) - since
            time.sleep(0.01)
        raise BenchmarkError(f"no call was answered within {longest_seconds:g} s after the outage")

    def _work(self, guard: Guard) -> None:
        self._stop.wait(random.uniform(0, self._size.pause_seconds))
        while not self._stop.is_set():
            with suppress(httpx.HTTPError, pybreaker.CircuitBreakerError):
                guard(self._call)
            self._stop.wait(self._size.pause_seconds * random.uniform(0.75, 1.25))

    def _call(self) -> None:
        start, answered = time.monotonic(), False
        try:
            self._http.post(f"{self._url}/v1/messages", json=BODY).raise_for_status()
            answered = True
        finally:
            self.calls.append(Call(start, time.monotonic(), answered))


def per_process(size: Size, _redis: Redis) -> Iterator[Guard]:
    """Yield guards that share nothing: attune-worker's rules, in memory."""
    for number in range(size.workers):
        circuits = LocalCircuits(rules(size))

        def guard(call: Callable[[], None], circuits: LocalCircuits = circuits, owner: str = f"w{number}") -> None:
            call_id = f"{owner}-{time.monotonic_ns()}"
            grant = circuits.ask([TIER], call_id, 60_000)
            if not grant.allowed:
                return
            result: dict[str, Any] = {"call": call_id, "worker": owner, "generation": grant.permits[0][0]}
            try:
                call()
            except httpx.HTTPError:
                circuits.record({TIER: {**result, "outcome": "failure"}})
            else:
                circuits.record({TIER: {**result, "outcome": "success"}})

        yield guard


def pybreaker_in_redis(size: Size, redis: Redis) -> Iterator[Guard]:
    """Yield the guards of pybreaker with its Redis storage."""
    for _ in range(size.workers):
        storage = pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, redis, namespace="benchmark")
        breaker = pybreaker.CircuitBreaker(
            fail_max=THRESHOLD, reset_timeout=size.recovery_seconds, state_storage=storage
        )
        yield breaker.call


def attune(size: Size, redis: Redis) -> Iterator[Guard]:
    """Yield the guards of attune-worker."""
    for number in range(size.workers):
        breaker = CircuitBreaker(settings=Settings(), redis=redis, rules=rules(size), owner=f"w{number}")

        def guard(call: Callable[[], None], breaker: CircuitBreaker = breaker) -> None:
            if not breaker.is_available(*TIER):
                return
            try:
                call()
            except httpx.HTTPError as error:
                breaker.record_failure(*TIER, error)
            else:
                breaker.record_success(*TIER)

        yield guard


CONTENDERS = {"per process": per_process, "pybreaker, Redis": pybreaker_in_redis, "attune-worker": attune}


def rules(size: Size) -> BreakerSettings:
    """Return rules that pybreaker has too: consecutive failures, and an open time that does not grow."""
    return BreakerSettings(
        failure_threshold=THRESHOLD,
        recovery_timeout_seconds=size.recovery_seconds,
        max_open_seconds=size.recovery_seconds,
    )


def run(failing: str, contender: str, size: Size, redis: Redis, provider_url: str) -> Outcome:
    """Let one fleet live through one outage."""
    redis.flushdb()
    set_errors(provider_url, {})
    guards = list(CONTENDERS[contender](size, redis))
    with Fleet(guards, provider_url, size) as fleet:
        time.sleep(size.well_seconds)
        down = time.monotonic()
        set_errors(provider_url, ERRORS[failing])
        time.sleep(size.down_seconds)
        set_errors(provider_url, {})
        up = time.monotonic()
        back_seconds = fleet.wait_for_success(up, 30)
    wasted = [call for call in fleet.calls if not call.answered and down <= call.start < up]
    late = [call for call in wasted if call.end >= (down + up) / 2]
    return Outcome(
        failing,
        contender,
        len(wasted),
        max((sum(call.start <= other.start < call.start + 1 for other in late) for call in late), default=0),
        max((sum(other.start <= call.start < other.end for other in late) for call in late), default=0),
        back_seconds,
    )


def set_errors(provider_url: str, errors: dict[str, float]) -> None:
    """Tell the provider how to treat calls from now on."""
    profile = {"latency": {"kind": "fixed", "seconds": LATENCY_SECONDS}, "errors": errors}
    httpx.put(f"{provider_url}/_sim/profile", json=profile, timeout=60, verify=False).raise_for_status()


@contextmanager
def running_provider(folder: Path) -> Iterator[str]:
    """Run the simulator, and yield its URL."""
    arguments = ["-m", "attune_worker", "simulator", "--port=0"]
    with PythonProcess(arguments, Services("", "", "").environ(), folder, "provider.log") as provider:
        while not (url := provider.log.read_text().strip()):
            provider.check()
            time.sleep(0.02)
        yield url


def run_all(size: Size, console: Console) -> list[Outcome]:
    """Run everyone through both outages, on one Redis and one provider."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="attune-benchmark-") as folder,
        EmbeddedRedis(Path(folder) / "redis") as server,
        Redis.from_url(server.url) as redis,
        running_provider(Path(folder)) as provider_url,
    ):
        for failing in ERRORS:
            for contender in CONTENDERS:
                with console.status(f"{contender}, provider fails {failing}"):
                    found.append(run(failing, contender, size, redis, provider_url))
    return found


def rows(found: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table."""
    for outcome in found:
        yield (
            outcome.failing,
            outcome.breaker,
            str(outcome.wasted_calls),
            str(outcome.most_in_a_second),
            str(outcome.most_in_flight),
            f"{outcome.seconds_to_first_success:.2f}",
        )


def notes(size: Size) -> str:
    """Say what was measured, on what, and how."""
    names = ", ".join(f"{name} {number}" for name, number in all_versions().items())
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['cpu']}, {machine()['cores']} cores; {names}.\n"
        f"{size.workers} workers (threads, each with a breaker object of its own), a call each about "
        f"{size.pause_seconds + LATENCY_SECONDS:g} s. The provider is down for {size.down_seconds:g} s; "
        f"{THRESHOLD} failures open a circuit for {size.recovery_seconds:g} s. 'fast': HTTP 529; 'slow': no answer, "
        f"callers give up after {size.timeout_seconds:g} s. Wasted: sent while the provider was down. The two peaks "
        f"are those of the outage's second half. Back: from its end to the first answer.\n\n{bound(size)}"
    )


def bound(size: Size) -> str:
    """Say what a breaker of the whole fleet wastes at most, for the numbers to be held against."""
    fast = int(size.down_seconds / size.recovery_seconds)
    slow = int((size.down_seconds - size.timeout_seconds) / (size.recovery_seconds + size.timeout_seconds))
    return (
        f"What one breaker for the fleet cannot save: the {THRESHOLD} failures in a row that open the circuit, what is "
        "in flight at that moment, and one probe for each time it may be tried. "
        f"'fast': {THRESHOLD} failures, what is in flight (at most {size.workers}), at most {fast} probes. "
        f"'slow': {size.workers} in flight before the first fails, those {THRESHOLD} failures among them; "
        f"probes: {slow} at most; together {size.workers + slow}."
    )


def all_versions() -> dict[str, str]:
    """Return the versions of everything compared."""
    return {**versions(), "pybreaker": version("pybreaker")}


def as_markdown(found: Sequence[Outcome], size: Size) -> str:
    """Return the page: the table, with what it needs to be understood."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows(found)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"# How many calls does an outage cost a fleet of {size.workers} workers?\n\n{table}\n\n{notes(size)}\n\n"
        "Written by `python benchmarks/breaker_fleet.py --markdown docs/benchmarks/breaker-fleet.md`.\n"
    )


@click.command()
@click.option("--quick", is_flag=True, help="Fewer workers and shorter outages: some seconds.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the table.")
def main(quick: bool, json_file: Path | None, markdown_file: Path | None) -> None:
    """Let fleets with three kinds of breakers live through an outage, and count the calls they waste."""
    size = QUICK if quick else FULL
    logging.getLogger("attune_worker").setLevel(logging.ERROR)  # circuits that open are what this is about
    try:
        found = run_all(size, Console(stderr=True))
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from error
    if json_file is not None:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": all_versions(),
            "size": asdict(size),
            "outcomes": [asdict(outcome) for outcome in found],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if markdown_file is not None:
        markdown_file.write_text(as_markdown(found, size))
    table = Table(*HEADINGS)
    for row in rows(found):
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)
    click.echo(notes(size))


if __name__ == "__main__":
    main()
