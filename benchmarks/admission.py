"""What do ADMIT and SETTLE cost, how long does a decision take, and are budgets and rate limits kept?

Run it with ``python benchmarks/admission.py``. Nothing is called between ADMIT and SETTLE where their cost is
measured, so workers ask as fast as they can; each call has two candidates, limits of every kind and a hard budget.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import click
from crew import PROCESSES, Crew
from decisions import CANDIDATES, Decisions, decision_fields, learn, measure_decisions
from limits_kept import Rate, Spent, fields, hold_the_rate, models, race_for_budget, request
from measurement import running_provider
from processes import BenchmarkError
from redis import Redis
from report import machine, versions
from rich.console import Console
from rich.table import Table

from attune_worker.models.admission import Admission
from attune_worker.models.calls import Outcome, Permit
from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis

COUNTED_CALLS = 20
WORST_USD = Decimal("0.001")
START, END = "here counting starts", "here counting ends"

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Headings and lines of a table."""


@dataclass(frozen=True, slots=True)
class Size:
    """How long workers ask (s), what is learned, how often is chosen, the budget, and the rate and its time (s)."""

    workers: tuple[int, ...]
    seconds: float
    histories: tuple[int, ...]
    decisions: int
    budget_usd: Decimal
    per_minute: int
    rate_seconds: float


QUICK = Size((1, 10), 0.2, (200, 400), 200, Decimal("0.3"), 1200, 0.9)
FULL = Size((1, 10, 100), 10.0, (1000, 1_000_000), 20_000, Decimal(10), 600, 75.0)


@dataclass(frozen=True, slots=True)
class Cost:
    """What ADMIT and SETTLE of one call take together, in microseconds; CPU of the workers and of Redis apart."""

    workers: int
    calls_per_second: float
    p50_us: float
    p99_us: float
    client_cpu_us: float
    redis_cpu_us: float


@dataclass(frozen=True, slots=True)
class Commands:
    """Commands per call: those that the client sends, each a round trip, and those that scripts run inside Redis."""

    sent: float
    inside: float


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was measured."""

    commands: Commands
    costs: tuple[Cost, ...]
    decisions: tuple[Decisions, ...]
    budget: Spent
    rate: Rate


def ask_and_settle(admission: Admission, settings: Settings, ends: float) -> list[float]:
    """Ask leave and settle, again and again, at least once; return the seconds that each pair took."""
    candidates, seen = models(settings), list[float]()
    while not seen or time.monotonic() < ends:
        wanted = request(candidates, WORST_USD)
        began = time.perf_counter()
        permit = admission.admit(wanted)
        assert isinstance(permit, Permit), permit
        admission.settle(permit, Outcome("succeeded", "success", 10, WORST_USD / 2, 100, 100))
        seen.append(time.perf_counter() - began)
    return seen


def unlimited(redis_url: str) -> dict[str, Any]:
    """Return settings with a limit of every kind, all of them out of reach."""
    limits = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "concurrency": 100_000}
    given = fields(redis_url, "cost", "http://127.0.0.1:9", **limits)
    given["budgets"] = [{"per": "month", "limit_usd": "1000000", "hard": True}]
    return given


def count_commands(redis: Redis, redis_url: str) -> Commands:
    """Count with MONITOR what Redis is sent for a call, and what the scripts run."""
    settings = Settings(**unlimited(redis_url))
    admission = Admission(settings)
    ask_and_settle(admission, settings, time.monotonic())  # connects, and loads the scripts
    with redis.monitor() as monitor:
        caller = threading.Thread(target=_call_some, args=(admission, settings, redis))
        caller.start()
        seen = dropwhile(lambda one: START not in one["command"], monitor.listen())
        next(seen)
        kinds = Counter(one["client_type"] for one in takewhile(lambda one: END not in one["command"], seen))
        caller.join()
    admission.close()
    return Commands((kinds.total() - kinds["lua"]) / COUNTED_CALLS, kinds["lua"] / COUNTED_CALLS)


def _call_some(admission: Admission, settings: Settings, redis: Redis) -> None:
    redis.echo(START)
    for _ in range(COUNTED_CALLS):
        ask_and_settle(admission, settings, time.monotonic())
    redis.echo(END)


def measure_cost(crew: Crew, redis_url: str, workers: int, seconds: float) -> Cost:
    """Let so many workers ask and settle for a while."""
    shift = crew.work(ask_and_settle, unlimited(redis_url), workers, seconds)
    times, calls = sorted(shift.seen), len(shift.seen)
    return Cost(
        workers,
        calls / shift.wall_seconds,
        times[calls // 2] * 1e6,
        times[min(calls * 99 // 100, calls - 1)] * 1e6,
        shift.client_cpu_seconds / calls * 1e6,
        shift.redis_cpu_seconds / calls * 1e6,
    )


def decide(size: Size, folder: Path, console: Console) -> tuple[Decisions, ...]:
    """Measure decisions at each length of history, on a Redis of their own without a file."""
    found, learned = [], 0
    with EmbeddedRedis(folder / "decisions", configuration="appendonly no") as server:
        settings = Settings(**decision_fields(server.url))
        for calls in size.histories:
            with console.status(f"learning from {calls:,} calls"):
                learn(settings, calls - learned)
                learned = calls
                found.append(measure_decisions(settings, calls, size.decisions))
    return tuple(found)


def run_all(size: Size, console: Console) -> Found:
    """Measure everything, one after the other."""
    with tempfile.TemporaryDirectory(prefix="attune-benchmark-") as name:
        folder = Path(name)
        with (
            EmbeddedRedis(folder / "redis") as server,
            Redis.from_url(server.url) as redis,
            Crew(redis) as crew,
        ):
            commands = count_commands(redis, server.url)
            costs = []
            for workers in size.workers:
                with console.status(f"ADMIT and SETTLE, {workers} workers"):
                    costs.append(measure_cost(crew, server.url, workers, size.seconds))
            with console.status("a race for the budget"):
                budget = race_for_budget(crew, server.url, size.budget_usd, seconds=120)
            with console.status("a rate limit"), running_provider(0, folder) as (_, provider_url):
                rate = hold_the_rate(crew, server.url, provider_url, size.per_minute, size.rate_seconds)
        return Found(commands, tuple(costs), decide(size, folder, console), budget, rate)


def cost_rows(found: Found) -> Rows:
    """Return what ADMIT and SETTLE cost."""
    headings = ("workers", "calls/s", "p50 µs", "p99 µs", "client CPU µs", "Redis CPU µs")
    return headings, [
        (
            str(one.workers),
            *(
                f"{number:,.0f}"
                for number in (one.calls_per_second, one.p50_us, one.p99_us, one.client_cpu_us, one.redis_cpu_us)
            ),
        )
        for one in found.costs
    ]


def decision_rows(found: Found) -> Rows:
    """Return how long decisions take."""
    headings = ("calls recorded", "candidates", "decision µs", "first after a refresh, µs")
    return headings, [
        (f"{one.calls:,}", str(one.candidates), f"{one.kept_us:.1f}", f"{one.fresh_us:.0f}") for one in found.decisions
    ]


def kept_rows(found: Found) -> Rows:
    """Return how limits were kept."""
    budget, rate = found.budget, found.rate
    headings = ("50 callers at once, against", "calls", "allowed", "most seen", "overshoot")
    window = f"any {rate.window_seconds:g} s, {rate.requests_per_minute}/min"
    arrived_over = max(rate.most_arrived - rate.allowed, 0)
    return headings, [
        (
            "a hard budget",
            str(budget.calls),
            f"${budget.limit_usd:f}",
            f"${budget.spent_usd:f}",
            f"${budget.overshoot_usd:f}",
        ),
        (f"{window}, when admitted", str(rate.calls), str(rate.allowed), str(rate.most_admitted), str(rate.overshoot)),
        (f"{window}, at the provider", str(rate.calls), str(rate.allowed), str(rate.most_arrived), str(arrived_over)),
    ]


def notes(found: Found, size: Size) -> str:
    """Say what was measured, on what, and how."""
    names = ", ".join(f"{name} {number}" for name, number in versions().items())
    counted = found.commands
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['cpu']}, {machine()['cores']} cores for workers, Redis and provider "
        f"together; {names}.\n\n"
        f"Commands that a call sends to Redis: {counted.sent:g} (one ADMIT, one SETTLE, each one round trip); the "
        f"scripts run {counted.inside:g} commands inside Redis. Counted with MONITOR over {COUNTED_CALLS} calls.\n\n"
        f"Cost: workers are threads, spread over {PROCESSES} processes (one worker: one process), that ask and settle "
        f"for {size.seconds:g} s without a pause; where the cores are full, p50 and p99 are mostly waiting. Two "
        "candidates, limits of every kind, a hard budget; Redis with an append-only file.\n\n"
        f"Decisions: `router.rank` of {CANDIDATES} candidates from the snapshot, for prompts of different lengths; "
        "the history was written by SETTLE, once for every call. The first decision of a kind after each refresh "
        "of the snapshot (once a second) weighs the candidates anew.\n\n"
        f"Budget: calls that cost up to 1 cent, some of an unknown cost, some released; Redis counted "
        f"${found.budget.counted_usd:f}. Rate: calls to the simulator for {size.rate_seconds:g} s; the network may "
        "bunch what was admitted in time.\n"
    )


def tables(found: Found) -> Iterator[Rows]:
    """Yield the tables in order."""
    yield cost_rows(found)
    yield decision_rows(found)
    yield kept_rows(found)


def as_json(found: Found, size: Size) -> dict[str, Any]:
    """Return everything that was measured, as JSON values."""
    overshoot = {"budget_usd": found.budget.overshoot_usd, "requests": found.rate.overshoot}
    measured = {"size": asdict(size)} | asdict(found) | {"overshoot": overshoot}
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    return about | measured


def write_markdown(file: Path, found: Found, size: Size) -> None:
    """Write a page with the tables and a figure, and the figure beside it."""
    blocks = []
    for headings, lines in tables(found):
        cells = [headings, ["---"] * len(headings), *lines]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    figure = file.with_suffix(".png")
    draw(figure, found.costs)
    text = "\n\n".join(blocks)
    file.write_text(
        f"# What do ADMIT and SETTLE cost, and do they keep what they promise?\n\n{text}\n\n"
        f"![What ADMIT and SETTLE of a call take]({figure.name})\n\n{notes(found, size)}\n"
        "Written by `python benchmarks/admission.py --markdown docs/benchmarks/admission.md`.\n"
    )


def draw(file: Path, costs: Sequence[Cost]) -> None:
    """Draw latency and CPU for each number of workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    latency, cpu = figure.subplots(1, 2)
    names = [str(cost.workers) for cost in costs]
    latency.plot(names, [cost.p99_us for cost in costs], marker="o", label="p99")
    latency.plot(names, [cost.p50_us for cost in costs], marker="o", label="p50")
    latency.set_yscale("log")
    latency.set(xlabel="workers", ylabel="ADMIT and SETTLE, µs")
    client = [cost.client_cpu_us for cost in costs]
    cpu.bar(names, client, label="client")
    cpu.bar(names, [cost.redis_cpu_us for cost in costs], bottom=client, label="Redis")
    cpu.set(xlabel="workers", ylabel="CPU µs per call")
    latency.legend()
    cpu.legend()
    figure.savefig(file, dpi=120)


@click.command()
@click.option("--quick", is_flag=True, help="Short runs and little history: some seconds.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
def main(quick: bool, json_file: Path | None, markdown_file: Path | None) -> None:
    """Measure what ADMIT and SETTLE cost, how long decisions take, and whether limits are kept."""
    size = QUICK if quick else FULL
    try:
        found = run_all(size, Console(stderr=True))
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(found, size), indent=2, default=str) + "\n")
    if markdown_file is not None:
        write_markdown(markdown_file, found, size)
    console = Console(width=max(100, Console().width))
    for headings, lines in tables(found):
        table = Table(*headings)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    click.echo(notes(found, size))


if __name__ == "__main__":
    main()
