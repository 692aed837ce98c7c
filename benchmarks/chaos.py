"""What happens to 10,000 jobs while workers die, Redis goes away and connections break, all the time?

    python benchmarks/chaos.py                                                # attune-worker, ten minutes
    python benchmarks/chaos.py --seconds 60                                   # a short form of it
    python benchmarks/chaos.py --contender celery-early --contender celery-late

Everything follows from ``--seed``: jobs, faults, and which of the provider's calls fail. It ends with exit code 1 when
attune-worker has broken a promise. docs/explanation/failure-modes.md says what each fault may cost.
"""

from __future__ import annotations

import json
import signal
import tempfile
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from chaos_report import as_json, as_markdown, broken, setting, table_of
from chaos_run import run
from processes import BenchmarkError
from report import machine, versions
from rich.console import Console

from attune_worker.errors import AttuneError

CONTENDERS = ("attune", "celery-early", "celery-late")
SHORTEST_SECONDS = 40


@click.command()
@click.option("--seconds", type=click.IntRange(min=SHORTEST_SECONDS), default=600, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--contender", "contenders", type=click.Choice(CONTENDERS), multiple=True, default=["attune"], show_default=True
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option("--markdown", is_flag=True, help="Print the table of docs/explanation/failure-modes.md, too.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Keep logs and Redis' files there.")
def main(
    seconds: int, seed: int, contenders: tuple[str, ...], json_file: Path | None, markdown: bool, folder: Path | None
) -> None:
    """Break a fleet for a while, and check that nothing was lost, run twice or counted wrong."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended then, too
    console, outcomes = Console(stderr=True), []
    for kind in dict.fromkeys(contenders):
        kept = nullcontext(str(folder / kind)) if folder else tempfile.TemporaryDirectory(prefix="attune-chaos-")
        with kept as name, console.status(kind) as status:
            place = Path(name)
            place.mkdir(parents=True, exist_ok=True)

            def show(news: str, ended: int, jobs: int, kind: str = kind, status: Any = status) -> None:
                status.update(f"{kind}: {ended:,} of {jobs:,} jobs have ended; {news}")

            try:
                outcomes.append(run(kind, seconds, seed, place, show))
            except (AttuneError, BenchmarkError) as error:
                raise click.ClickException(str(error)) from error
    if json_file is not None:
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}
        found = about | {"seconds": seconds, "seed": seed, "outcomes": [as_json(one) for one in outcomes]}
        json_file.write_text(json.dumps(found, indent=2, default=str) + "\n")
    wide = Console(width=max(120, Console().width))
    for outcome in outcomes:
        wide.print(table_of(outcome))
    if markdown or len(outcomes) > 1:
        click.echo(f"{as_markdown(outcomes)}\n")
    click.echo(setting(seconds, seed))
    if promises := broken(outcomes):
        raise click.ClickException(f"broken: {'; '.join(promises)}")


if __name__ == "__main__":
    main()
