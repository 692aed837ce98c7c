"""``attune-worker run``: many jobs from a file, their results to another, as often interrupted as you like."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attune_worker.cli.bulk import INVALID, Line, Results, job_of, read_lines
from attune_worker.cli.files import FileName
from attune_worker.cli.output import say
from attune_worker.client import Client
from attune_worker.errors import AttuneError, ConfigurationError, IdempotencyConflictError, InvalidJobError
from attune_worker.jobs import Job, JobResult
from attune_worker.local import LocalFleet, end_on_signals, local_environment, unbroken
from attune_worker.settings import Settings

BATCH = 200
"""Jobs submitted in one round trip."""

PATIENCE_SECONDS = 1.0
"""How often to look whether local workers are still there, and whether Ctrl-C was pressed."""

SHOWN_REASONS = 20
"""Invalid lines that are reported on the terminal; the results file has them all."""


@dataclass
class Tally:
    """What the run has come to so far."""

    statuses: Counter[str] = field(default_factory=Counter)
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0

    def add(self, result: JobResult, lines: int) -> None:
        """Count the result of one job, which may stand for several lines with the same key."""
        self.statuses[result.status.value] += lines
        self.cost_usd += result.cost_usd or 0
        self.unpriced += result.cost_usd is None or any(attempt.cost_usd is None for attempt in result.attempts)

    @property
    def failed(self) -> int:
        """How many lines have no answer."""
        return sum(count for status, count in self.statuses.items() if status != "succeeded")

    def to_json(self) -> str:
        """Return the summary that ``--json`` prints."""
        counts = dict(sorted(self.statuses.items()))
        return json.dumps({"statuses": counts, "cost_usd": f"{self.cost_usd:f}", "unpriced": self.unpriced})


@click.command()
@click.argument("jobs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=FileName(),
    help="Results file, one JSON object a line, in the order in which jobs end.",
)
@click.option("--local", type=click.IntRange(min=1), metavar="N", help="Start N workers here for this run.")
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=100, show_default=True, help="Jobs per local worker."
)
@click.option(
    "--window", type=click.IntRange(min=1), default=2000, show_default=True, help="Most jobs submitted ahead."
)
@click.option("--retry-failed", is_flag=True, help="Do again what failed, expired, was cancelled or is dead.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run(
    jobs: Path, output: Path, local: int | None, concurrency: int, window: int, retry_failed: bool, as_json: bool
) -> None:
    """Run the jobs of a JSONL file, one a line, and write one result line for each.

    Each line holds the fields of a job, and an optional "id". Run the same command again after an
    interruption: it does only what is missing. Exit code 1: some lines failed or are invalid.

    Example: attune-worker run jobs.jsonl -o results.jsonl --local 2
    """
    if output.exists() and output.samefile(jobs):
        raise ConfigurationError(f"{output}: the results cannot be written over the jobs")
    console = Console(stderr=True)
    tally = Tally()
    end_on_signals()
    with ExitStack() as stack:
        results = stack.enter_context(Results(output, retry_failed=retry_failed))
        missing = sum(line.id not in results.done for line in read_lines(jobs))
        settings, fleet = stack.enter_context(_fleet(local if missing else None, concurrency, console))
        client = stack.enter_context(Client(settings))
        bulk = _Bulk(client, results, tally, fleet, window, console)
        try:
            bulk.run(jobs, missing)
        except KeyboardInterrupt:
            bulk.interrupted()
            raise click.exceptions.Exit(130) from None
    click.echo(tally.to_json()) if as_json else _report(tally, output, console)
    if results.failed_before:
        console.print(f"{results.failed_before} lines failed before; --retry-failed does them again", highlight=False)
    if tally.failed or results.failed_before:
        raise click.exceptions.Exit(1)


class _Bulk:
    """One run: submits ahead of what has ended, writes what has ended, and shows both."""

    def __init__(
        self,
        client: Client,
        results: Results,
        tally: Tally,
        fleet: LocalFleet | None,
        window: int,
        console: Console,
    ) -> None:
        self._client = client
        self._results = results
        self._tally = tally
        self._fleet = fleet
        self._window = window
        self._console = console
        self._lines: dict[str, list[Line]] = {}
        self._reported = 0

    def run(self, path: Path, total: int) -> None:
        """Do the ``total`` lines that the results file does not have yet."""
        batch: list[Line] = []
        with _progress(self._console) as progress, self._client.gather() as self._gathering:
            self._progress, self._bar = progress, progress.add_task("jobs", total=total, failed=0, cost="0", rate="")
            for line in read_lines(path):
                if line.id in self._results.done:
                    continue
                batch.append(line)
                if len(batch) >= BATCH:
                    self._submit(batch)
                    batch = []
                while self._gathering.waiting > self._window:
                    self._collect()
            self._submit(batch)
            while self._gathering.waiting:
                self._collect()
        self._results.finished()

    def interrupted(self) -> None:
        """Ctrl-C: let local workers finish what they run, write that, and say how to go on."""
        if self._fleet is not None:
            self._console.print("Stopping: local workers finish what they run. Ctrl-C again stops at once.")
            self._fleet.stop()
            for record in self._client.records.read(list(self._lines)):
                if record.status.ended:
                    self._write(record.to_result())
        left = sum(map(len, self._lines.values()))
        where = "" if self._fleet is not None else f" {left} submitted jobs go on in the fleet;"
        self._console.print(f"Interrupted.{where} run the same command again to do what is missing.")

    def _submit(self, lines: list[Line]) -> None:
        valid: list[tuple[Line, Job]] = []
        for line in lines:
            if line.reason is not None:
                self._invalid(line, line.reason)
                continue
            try:
                valid.append((line, self._client.check(job_of(line, self._results.run_id))))
            except InvalidJobError as error:
                self._invalid(line, error.reason)
        self._send(valid)

    @unbroken  # a job that was submitted is known here
    def _send(self, valid: list[tuple[Line, Job]]) -> None:
        try:
            job_ids = [handle.id for handle in self._client.submit_many([job for _, job in valid])]
            conflicts: Sequence[int] = ()
        except IdempotencyConflictError as error:
            job_ids, conflicts = list(error.job_ids), error.conflicts
            for index in conflicts:
                self._invalid(valid[index][0], "its 'idempotency_key' already belongs to a different job")
        for index, ((line, _), job_id) in enumerate(zip(valid, job_ids, strict=True)):
            if index not in conflicts:
                self._lines.setdefault(job_id, []).append(line)
        self._gathering.add(self._lines)

    def _collect(self) -> None:
        for record in self._gathering.ended_within(PATIENCE_SECONDS):
            self._write(record.to_result())
        if self._fleet is not None and self._gathering.waiting:
            self._fleet.check()

    @unbroken  # a result that is no longer awaited is written
    def _write(self, result: JobResult) -> None:
        lines = self._lines.pop(result.job_id, [])
        for line in lines:
            self._results.add(line, result)
            self._show()
        self._tally.add(result, len(lines))

    def _invalid(self, line: Line, reason: str) -> None:
        self._results.add_invalid(line, reason)
        self._tally.statuses[INVALID] += 1
        self._reported += 1
        if self._reported <= SHOWN_REASONS:
            say(self._console, f"line {line.number}: {reason}")
        elif self._reported == SHOWN_REASONS + 1:
            say(self._console, f"… and more; see the lines with status {INVALID!r} in {self._results.path}")
        self._show()

    def _show(self) -> None:
        speed = self._progress.tasks[0].finished_speed or self._progress.tasks[0].speed
        self._progress.update(
            self._bar,
            advance=1,
            failed=self._tally.failed,
            cost=_usd(self._tally.cost_usd),
            rate=f"{speed:.0f}/s" if speed else "",
        )


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[failed]} failed[/red]"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("${task.fields[cost]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _usd(amount: Decimal) -> str:
    return f"{amount.normalize():f}"


def _report(tally: Tally, output: Path, console: Console) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(tally.statuses.items())) or "nothing was missing"
    unpriced = f" (of {tally.unpriced} jobs not all of the cost is known)" if tally.unpriced else ""
    cost = f"{'≥' if unpriced else ''}${_usd(tally.cost_usd)}{unpriced}"
    say(console, f"{counts}; {cost}; results in {output}")


@contextmanager
def _fleet(local: int | None, concurrency: int, console: Console) -> Iterator[tuple[Settings, LocalFleet | None]]:
    """Yield the settings to use, and the local workers if any are wanted."""
    if local is None:
        yield Settings.load(), None
        return
    with tempfile.TemporaryDirectory(prefix="attune-run-") as name, ExitStack() as stack:
        folder = Path(name)
        environ = stack.enter_context(local_environment(os.environ, folder, console.print, insist=True))
        with LocalFleet(local, environ, folder, concurrency=concurrency) as fleet:
            try:
                yield Settings.load(environ=environ), fleet
            except AttuneError:
                fleet.check()  # a worker that died says more than what followed from it
                raise
