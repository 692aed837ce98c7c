"""How much does attune-worker cost? One worker against a bare Celery task, on threads and on prefork.

Run it with ``python benchmarks/throughput.py``; README.md beside it says how to read the result.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from contenders import MODES, Pool
from measurement import Measurement, Workload, measure
from processes import BenchmarkError
from report import as_json, as_markdown, as_table, cases, notes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

OPEN_FILES = 20_000
"""A bare task's thread has a connection to the provider and several to Redis."""

LATENCIES_SECONDS = (0.0, 2.0, 10.0)
POOLS = ("threads", "prefork")


@dataclass(frozen=True, slots=True)
class Size:
    """How many jobs there are, and how many run at once."""

    concurrency: int
    jobs: int


def size(pool: Pool, latency_seconds: float, *, quick: bool) -> Size | None:
    """Return what is run at a latency; None: nothing.

    Two cores cannot start 1,000 calls before the first is answered unless answers take a while, so it
    is the longest latency that shows a full worker. There prefork would show nothing new.
    """
    if pool == "threads":
        if latency_seconds == 0:
            return Size(50, 400 if quick else 3000)
        return Size(1000, 1000 if quick else 5000 if latency_seconds < 5 else 3000)
    if latency_seconds == 0:
        return Size(2 * (os.cpu_count() or 1), 400 if quick else 2000)
    return None if quick or latency_seconds > 5 else Size(16, 64)


def workloads(pools: Sequence[str], latencies: Sequence[float], jobs: int | None, *, quick: bool) -> list[Workload]:
    """Return what one round consists of; ``jobs`` overrides their number."""
    return [
        Workload(mode, latency, chosen.concurrency, jobs or chosen.jobs)
        for latency in latencies
        for mode in MODES
        if mode.pool in pools and (chosen := size(mode.pool, latency, quick=quick)) is not None
    ]


def in_turn(planned: Sequence[Workload], rounds: int) -> Iterator[Workload]:
    """Yield the workloads round by round, every other round backwards, so that a drift favours nobody."""
    for number in range(rounds):
        yield from planned if number % 2 == 0 else reversed(planned)


def run_all(planned: Sequence[Workload], rounds: int, console: Console) -> dict[Workload, list[Measurement]]:
    """Run everything, one after the other, and return what was measured."""
    measured: dict[Workload, list[Measurement]] = {workload: [] for workload in planned}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        every = progress.add_task("runs", total=len(planned) * rounds)
        for workload in in_turn(planned, rounds):
            name = f"{workload.mode.name} at {workload.latency_seconds:g} s"
            task = progress.add_task(name, total=workload.jobs)
            measured[workload].append(measure(workload, partial(_show, progress, task)))
            progress.remove_task(task)
            progress.advance(every)
    return measured


def _show(progress: Progress, task: TaskID, completed: int) -> None:
    progress.update(task, completed=completed)


@click.command()
@click.option(
    "--quick", is_flag=True, help="One round of fewer jobs, without prefork at 2 s and all at 10 s: under a minute."
)
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds; medians are taken over them.  [default: 3]")
@click.option("--latency", "latencies", multiple=True, type=click.FloatRange(min=0), help="Seconds; repeatable.")
@click.option("--pool", "pools", multiple=True, type=click.Choice(POOLS), help="Only this pool; repeatable.")
@click.option("--jobs", type=click.IntRange(min=10), help="Jobs of each run, instead of what suits it.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option("--markdown", is_flag=True, help="Print the table of the README.")
def main(
    quick: bool,
    rounds: int | None,
    latencies: tuple[float, ...],
    pools: tuple[str, ...],
    jobs: int | None,
    json_file: Path | None,
    markdown: bool,
) -> None:
    """Measure jobs per second, CPU and memory of one attune-worker and of a bare Celery task, in turn."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended then, too
    _allow_many_connections()
    console = Console(stderr=True)
    chosen = latencies or LATENCIES_SECONDS[: 2 if quick else None]
    planned = workloads(pools or POOLS, chosen, jobs, quick=quick)
    if not planned:
        raise click.UsageError("prefork is not run at that latency")
    try:
        found = cases(run_all(planned, rounds or (1 if quick else 3), console))
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(found), indent=2) + "\n")
    if markdown:
        click.echo(as_markdown(found))
    else:
        Console().print(as_table(found))
        click.echo(notes(found))


def _allow_many_connections() -> None:
    """Raise the limit of open files for everything that is started here; attune-worker would do it by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    main()
