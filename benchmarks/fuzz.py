"""Does anything but a typed error come out of the parsers, whatever goes in?

Each parser that reads what others have written is given inputs that are almost right, for the same time each: drawn by
hypothesis and, where atheris is installed (``pip install 'attune-worker[bench-fuzz]'``), searched for by libFuzzer,
which keeps the inputs that reach new code. A crash is any exception that is not the parser's own typed error, and any
result that is out of its bounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import click
from fuzz_crashes import Crashes
from fuzz_inputs import inputs
from fuzz_targets import TARGETS, Target, http_target
from hypothesis import HealthCheck, Phase, given, seed, settings
from report import machine, versions
from rich import box
from rich.console import Console
from rich.table import Table

BATCH = 300
SEARCH = Path(__file__).with_name("fuzz_atheris.py")
START_SECONDS = 60.0
"""How long a search may take beside its own time, to start and to end."""


@dataclass
class Found:
    """What came of one target: inputs tried by each way of finding them, and crashes by where they happened."""

    name: str
    hypothesis: int = 0
    atheris: int | None = None
    crashes: dict[str, str] = field(default_factory=dict)


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), default=240.0, show_default=True, help="For all together.")
@click.option("--seed", "first_seed", type=int, default=1, show_default=True, help="Of what hypothesis draws.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this target; may be given again.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all of it here.")
def main(seconds: float, first_seed: int, only: tuple[str, ...], json_file: Path | None) -> None:
    """Try inputs on every parser and count; exit code 1 if any of them crashed."""
    console = Console()
    with _targets(only) as targets:
        ways = 2 if find_spec("atheris") else 1
        each = seconds / len(targets) / ways
        found = [_tried(target, each, first_seed, console) for target in targets]
    _print(console, found)
    told = {"machine": machine(), "versions": _versions(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "seconds": seconds}
    console.print(json.dumps(told), highlight=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps({**told, "seed": first_seed, "targets": [asdict(one) for one in found]}))
    sys.exit(any(one.crashes for one in found))


@contextmanager
def _targets(only: tuple[str, ...]) -> Iterator[list[Target]]:
    with http_target() as http:
        targets = [target for target in (*TARGETS, http) if not only or target.name in only]
        if not targets:
            raise click.UsageError(f"no such target; there are: {', '.join(one.name for one in (*TARGETS, http))}")
        yield targets


def _tried(target: Target, seconds: float, first_seed: int, console: Console) -> Found:
    console.print(f"{target.name} …", highlight=False)
    crashes = Crashes()
    found = Found(target.name, _drawn(target, seconds, first_seed, crashes))
    if find_spec("atheris"):
        found.atheris = _searched(target, seconds, crashes)
    found.crashes = crashes.by_place
    return found


def _drawn(target: Target, seconds: float, first_seed: int, crashes: Crashes) -> int:
    """Try what hypothesis draws, batch after batch; return how many inputs that were."""
    ends, tried, batch = time.monotonic() + seconds, 0, first_seed
    while time.monotonic() < ends:

        @seed(batch)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs(target))
        def run(data: bytes) -> None:
            nonlocal tried
            tried += 1
            with crashes.noted(data):
                target.run(data)

        run()
        batch += 1
    return tried


def _searched(target: Target, seconds: float, crashes: Crashes) -> int:
    """Have libFuzzer search in a process of its own: it instruments what it imports, and ends with its process."""
    done = subprocess.run(
        [sys.executable, str(SEARCH), target.name, str(seconds)],
        capture_output=True,
        text=True,
        timeout=seconds + START_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise click.ClickException(f"the search in {target.name} ended by itself:\n{done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    crashes.by_place |= told["crashes"]
    tried: int = told["tried"]
    return tried


def _versions() -> dict[str, str]:
    found = versions()
    for name in ("hypothesis", "pydantic", "h11", "atheris"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _print(console: Console, found: list[Found]) -> None:
    table = Table(box=box.MARKDOWN)
    table.add_column("parser")
    for heading in ("by hypothesis", "by atheris", "crashes"):
        table.add_column(heading, justify="right")
    for one in found:
        searched = "" if one.atheris is None else f"{one.atheris:,}"
        table.add_row(one.name, f"{one.hypothesis:,}", searched, str(len(one.crashes)))
    both = sum(one.hypothesis for one in found), sum(one.atheris or 0 for one in found)
    table.add_row("together", *(f"{number:,}" for number in both), str(sum(len(one.crashes) for one in found)))
    console.print(table)
    for one in found:
        for place, example in one.crashes.items():
            console.print(f"{one.name}: {place}\n    {example}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
