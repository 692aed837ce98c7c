"""What does choosing models from evidence save, and what does it cost in success? The rule that ships against others.

Run it with ``python benchmarks/routing.py --data PATH``; ``docs/benchmarks/routing.md`` is what it wrote last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from routing_report import SHOWN_OVER_TIME, Found, as_json, as_markdown, as_table, plot_changes, plot_frontier
from rules import CONTENDERS
from simulation import simulate
from worlds import CHANGES, World, changed, made_up, mmlu, paretobandit

FLOOR = 0.8
STRICT_FLOOR = 0.9
"""For ParetoBandit, whose rewards are generous: each of its models but the cheapest comes to .8 by itself."""


def worlds(data: Path | None, *, quick: bool) -> list[World]:
    """Return what is simulated: recorded answers where there are any, then worlds that change."""
    recorded = (
        [mmlu(data, FLOOR), paretobandit(data, STRICT_FLOOR)] if data else [made_up(FLOOR, stages=8 if quick else 40)]
    )
    return [*recorded, *(changed(name, FLOOR, scale=0.2 if quick else 1.0) for name in CHANGES)]


def run(planned: Sequence[World], seeds: Sequence[int], exploration: float, console: Console) -> list[Found]:
    """Run every rule in every world, once for each seed."""
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("runs", total=len(planned) * len(CONTENDERS) * len(seeds))
        for world in planned:
            for contender in CONTENDERS:
                outcomes = []
                for seed in seeds:
                    progress.update(task, description=f"{world.name}: {contender.name}")
                    outcome = simulate(world, contender, exploration, seed)
                    drawn = world.name in CHANGES and contender.name in SHOWN_OVER_TIME
                    outcomes.append(outcome if drawn else replace(outcome, trace=()))
                    progress.advance(task)
                found.append(Found(world, contender, tuple(outcomes)))
    return found


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with routellm/ and paretobandit/; without it, MMLU is replaced by made-up stages.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=20, show_default=True, help="Orders of the requests.")
@click.option("--first-seed", type=int, default=0, show_default=True, help="Constants were chosen on 100 to 107.")
@click.option("--exploration", type=click.FloatRange(0, 0.5), default=0.05, show_default=True)
@click.option("--quick", is_flag=True, help="One seed, fewer made-up stages and shorter changes.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the page there, and its plots beside it.",
)
def main(
    data: Path | None,
    seeds: int,
    first_seed: int,
    exploration: float,
    quick: bool,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Simulate the routing of requests whose answers by every model are known."""
    if data is None:
        click.echo("No --data: made-up stages stand in for MMLU and ParetoBandit; their numbers mean little.", err=True)
    drawn = range(first_seed, first_seed + (1 if quick else seeds))
    found = run(worlds(data, quick=quick), drawn, exploration, Console(stderr=True))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(found, drawn, exploration), indent=2) + "\n")
    console = Console()
    for name in dict.fromkeys(one.world.name for one in found):
        console.print(as_table([one for one in found if one.world.name == name]))
    if markdown_file is not None:
        markdown_file.parent.mkdir(parents=True, exist_ok=True)
        markdown_file.write_text(as_markdown(found, drawn, exploration))
        plot_frontier(found, markdown_file.parent)
        plot_changes(found, markdown_file.parent)


if __name__ == "__main__":
    main()
