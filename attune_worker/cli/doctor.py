"""``attune-worker doctor``: is everything there that a fleet needs, and could anything lose jobs or money?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attune_worker.cli.output import Column, Rows, console, json_option, print_fitting, print_json, say, shown
from attune_worker.doctor import Finding, Level, findings, versions
from attune_worker.origins import Origin, origins
from attune_worker.settings import get_settings

STYLES = {
    Level.OK: "green",
    Level.UNKNOWN: "yellow",
    Level.WARNING: "yellow",
    Level.FAILED: "bold red",
    Level.UNREACHABLE: "bold red",
}


@click.command()
@click.option("--offline", is_flag=True, help="Do not contact providers.")
@json_option
def doctor(*, offline: bool, as_json: bool) -> None:
    """Look at settings, Redis, broker, workers and providers, and say what should be done.

    Each provider with a key is asked for its list of models, with each of its keys and subscriptions: it costs nothing,
    uses no quota, and tells whether the key is taken.

    Exit code 1: something can lose jobs or money. 3: Redis, the broker, the result backend, or every provider that was
    asked cannot be reached.

    Example: attune-worker doctor
    """
    settings = get_settings()
    configured = origins(settings)
    found = list(findings(settings, offline=offline))
    if as_json:
        told = {"versions": versions(), "settings": list(map(asdict, configured)), "findings": list(map(asdict, found))}
        print_json(told)
    else:
        _print(console(), configured, found)
    levels = {finding.level for finding in found}
    if Level.UNREACHABLE in levels:
        raise click.exceptions.Exit(3)
    if Level.FAILED in levels:
        raise click.exceptions.Exit(1)


def _print(on: Console, configured: Sequence[Origin], found: Sequence[Finding]) -> None:
    say(on, ", ".join(f"{name} {number}" for name, number in versions().items()))
    names = (Column("setting"), Column("value"), Column("from", 1))
    print_fitting(on, Rows(names, [(one.name, one.value, one.origin) for one in configured]))
    grid = Table.grid(padding=(0, 2))
    for _ in range(2):
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in found:
        text = shown(finding.text)
        if finding.fix and finding.level is not Level.OK:
            text.append(f"\n{finding.fix}", style="bold")
        grid.add_row(Text(finding.level.value, STYLES[finding.level]), finding.check, text)
    on.print(grid)
