"""What does a call cost beside the bare HTTP request? attune-worker's executor and litellm's Router, against httpx.

All three send the same prompt to the same simulator in OpenAI's format, each from a process of its own, in turn.
Run it with ``python benchmarks/overhead.py``. litellm must be installed beside attune-worker, or, where its
requirements do not go together with others, in an environment of its own: ``python -m venv /tmp/litellm``,
``/tmp/litellm/bin/pip install litellm redis`` and ``--litellm-python /tmp/litellm/bin/python``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import callers
import click
from contenders import Services
from measurement import running_provider
from processes import BenchmarkError
from report import machine, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attune_worker.store.embedded import EmbeddedRedis

HEADINGS = ("caller", "CPU ms/call", "CPU over httpx, ms", "CPU of httpx", "wall ms/call", "wall of httpx")
LABELS = {"httpx": "bare httpx", "attune": "attune-worker", "litellm": "litellm Router with Redis"}


@dataclass(frozen=True, slots=True)
class Size:
    """How many calls each caller makes in a round, how many before the first, and how many rounds there are."""

    calls: int
    warm_up: int
    rounds: int


QUICK, FULL = Size(20, 10, 3), Size(300, 200, 11)


@dataclass(frozen=True, slots=True)
class Used:
    """What a call took, in milliseconds; CPU is that of the calling process, its background threads included."""

    cpu_ms: float
    wall_ms: float


@dataclass(frozen=True, slots=True)
class Case:
    """One caller's rounds, beside those of bare httpx."""

    kind: str
    version: str
    rounds: tuple[Used, ...]
    bare: tuple[Used, ...]

    @property
    def typical(self) -> Used:
        """The median of each number."""
        return Used(median(one.cpu_ms for one in self.rounds), median(one.wall_ms for one in self.rounds))

    @property
    def over_ms(self) -> float:
        """CPU beyond that of the bare call, the median of the differences within a round."""
        return median(own.cpu_ms - bare.cpu_ms for own, bare in self._pairs)

    @property
    def cpu_ratio(self) -> float:
        """Ratio to the bare call, the median of the ratios within a round; 0 on too coarse a clock."""
        return median(own.cpu_ms / bare.cpu_ms if bare.cpu_ms else 0.0 for own, bare in self._pairs)

    @property
    def wall_ratio(self) -> float:
        """As ``cpu_ratio``, of the time that passed."""
        return median(own.wall_ms / bare.wall_ms for own, bare in self._pairs)

    @property
    def _pairs(self) -> Iterator[tuple[Used, Used]]:
        return zip(self.rounds, self.bare, strict=True)


class Caller:
    """A process that makes calls when it is told to; it ends with the context."""

    def __init__(self, kind: str, python: str, environ: Mapping[str, str], folder: Path) -> None:
        self.kind = kind
        self._log = folder / f"{kind}.log"
        self._command = [python, callers.__file__, kind]
        self._environ = dict(environ)
        self._folder = folder

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                cwd=self._folder,  # no attune.toml of the caller's
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # nothing of it is needed any more, and litellm's threads would take their time
        self._process.communicate()

    def version(self) -> str:
        """Wait until it is ready, and return the version of the library."""
        return self._answer().strip()

    def make(self, calls: int) -> Used:
        """Make that many calls, one after the other."""
        assert self._process.stdin is not None  # it is a pipe
        with suppress(BrokenPipeError):  # then there will be no answer either
            self._process.stdin.write(f"{calls}\n")
            self._process.stdin.flush()
        used = json.loads(self._answer())
        return Used(used["cpu_seconds"] / calls * 1000, used["wall_seconds"] / calls * 1000)

    def _answer(self) -> str:
        assert self._process.stdout is not None  # it is a pipe
        answer = self._process.stdout.readline()
        if not answer:
            ending = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
            raise BenchmarkError(f"{LABELS[self.kind]} has failed:\n{ending}")
        return answer


def run_all(kinds: Sequence[str], size: Size, litellm_python: str, console: Console) -> list[Case]:
    """Let the callers make their calls in turn, every other round backwards, so that a drift favours nobody."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attune-benchmark-")))
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        _, provider_url = stack.enter_context(running_provider(0, folder))
        environ = Services("", "", "").environ() | {"REDIS_URL": redis.url, "PROVIDER_URL": provider_url}
        pythons = {"litellm": litellm_python}
        crew = [stack.enter_context(Caller(kind, pythons.get(kind, sys.executable), environ, folder)) for kind in kinds]
        found = {caller.kind: caller.version() for caller in crew}
        for caller in crew:
            caller.make(size.warm_up)
        rounds: dict[str, list[Used]] = {kind: [] for kind in kinds}
        for number in track(range(size.rounds), "rounds", console=console, transient=True):
            for caller in crew if number % 2 == 0 else reversed(crew):
                rounds[caller.kind].append(caller.make(size.calls))
    return [Case(kind, found[kind], tuple(rounds[kind]), tuple(rounds["httpx"])) for kind in kinds]


def rows(found: Sequence[Case]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table."""
    for case in found:
        cpu, bare = sorted(one.cpu_ms for one in case.rounds), case.kind == "httpx"
        yield (
            f"{LABELS[case.kind]} {case.version}",
            f"{case.typical.cpu_ms:.2f} ({cpu[0]:.2f} to {cpu[-1]:.2f})",
            "" if bare else f"{case.over_ms:.2f}",
            "" if bare else f"{case.cpu_ratio:.2f}",
            f"{case.typical.wall_ms:.2f}",
            "" if bare else f"{case.wall_ratio:.2f}",
        )


def notes(size: Size) -> str:
    """Say what was measured, on what, and how."""
    names = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['cpu']}, {machine()['cores']} cores for callers, Redis and provider "
        f"together; {names}.\n"
        f"Medians of {size.rounds} interleaved rounds of {size.calls} calls, one after the other, after "
        f"{size.warm_up} for warming up; in brackets the lowest and highest round. Differences and ratios are taken "
        "within each round. CPU is that of the calling process, its background threads included, and not that of Redis "
        "or the provider.\n"
        "Provider: the project's simulator in OpenAI's format, which answers at once. Each caller has a process of its "
        "own with one kept connection. attune-worker: `executor.run` with its default settings, two models, prices and "
        "a hard budget. litellm: `Router.completion` with its default settings, `latency-based-routing` over two "
        "deployments, prices, and the same Redis. Bare: `httpx.Client.post`.\n"
    )


def as_json(found: Sequence[Case], size: Size) -> dict[str, Any]:
    """Return everything that was measured, as JSON values."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions() | {callers.KINDS[case.kind][0]: case.version for case in found},
        "size": asdict(size),
        "cases": [
            {
                "caller": case.kind,
                "median": asdict(case.typical),
                "cpu_over_httpx_ms": case.over_ms,
                "cpu_ratio": case.cpu_ratio,
                "wall_ratio": case.wall_ratio,
                "rounds": [asdict(one) for one in case.rounds],
            }
            for case in found
        ],
    }


def write_markdown(file: Path, found: Sequence[Case], size: Size) -> None:
    """Write a page with the table and a figure, and the figure beside it."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows(found)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    figure = file.with_suffix(".png")
    draw(figure, found)
    file.write_text(
        f"# What does a call cost beside the bare HTTP request?\n\n{table}\n\n"
        f"![CPU and wall time of a call]({figure.name})\n\n{notes(size)}\n"
        "Written by `python benchmarks/overhead.py --markdown docs/benchmarks/overhead.md`.\n"
    )


def draw(file: Path, found: Sequence[Case]) -> None:
    """Draw the medians as bars, from the lowest to the highest round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.6 * len(found)), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2, sharey=True), ("cpu_ms", "wall_ms"), ("CPU ms per call", "wall ms per call"), strict=True
    ):
        for case in reversed(found):
            middle = getattr(case.typical, name)
            values = [getattr(one, name) for one in case.rounds]
            axes.barh(LABELS[case.kind], middle, xerr=[[middle - min(values)], [max(values) - middle]], capsize=3)
        axes.set_xlabel(title)
    figure.savefig(file, dpi=120)


@click.command()
@click.option("--quick", is_flag=True, help="Fewer calls and rounds: under a minute.")
@click.option("--caller", "chosen", multiple=True, type=click.Choice(tuple(LABELS)), help="Only these; repeatable.")
@click.option("--litellm-python", default=sys.executable, help="Python with litellm and redis.  [default: this one]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
def main(
    quick: bool, chosen: tuple[str, ...], litellm_python: str, json_file: Path | None, markdown_file: Path | None
) -> None:
    """Measure CPU and wall time of a call through attune-worker, through litellm's Router, and without either."""
    size = QUICK if quick else FULL
    kinds = [kind for kind in LABELS if kind == "httpx" or kind in (chosen or LABELS)]
    try:
        found = run_all(kinds, size, litellm_python, Console(stderr=True))
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(found, size), indent=2) + "\n")
    if markdown_file is not None:
        write_markdown(markdown_file, found, size)
    table = Table(*HEADINGS)
    for row in rows(found):
        table.add_row(*row)
    Console(width=max(110, Console().width)).print(table)
    click.echo(notes(size))


if __name__ == "__main__":
    main()
