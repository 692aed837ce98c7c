"""How does a command show what it has found, to a reader and to a program?

To a program: JSON, in ASCII, amounts of money as decimal strings and times as ISO 8601 in UTC. To a reader: tables that
leave out columns rather than cut names off, with nothing in them that a terminal would obey.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attune_worker.cli.printable import printable

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

PIPE_WIDTH = 200
"""A pipe has no width, and nothing should be cut."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; the higher its ``rank``, the sooner it goes where lines are short, and 0 always stays."""

    name: str
    rank: int = 0
    right: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """The cells of a table, as they came from outside; ``styles`` of rows by their place, ``footer`` below them."""

    columns: Sequence[Column]
    cells: Sequence[Sequence[str]]
    title: str | None = None
    styles: Mapping[int, str] = field(default_factory=dict)
    footer: Sequence[str] | None = None

    def table(self, rank: int) -> Table:
        """Return the table without the columns above ``rank``."""
        kept = [place for place, column in enumerate(self.columns) if column.rank <= rank]
        title = None if self.title is None else shown(self.title)
        table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
        table.show_footer = self.footer is not None
        for place in kept:
            column, footer = self.columns[place], "" if self.footer is None else self.footer[place]
            justify: Any = "right" if column.right else "left"
            table.add_column(shown(column.name), shown(footer), justify=justify, no_wrap=True)
        for number, row in enumerate(self.cells):
            table.add_row(*(shown(row[place]) for place in kept), style=self.styles.get(number))
        return table


def console(*, stderr: bool = False) -> Console:
    """Return the console to print on."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)


def shown(text: object) -> Text:
    """Return ``text`` as it may stand in a table: nothing in it is obeyed, neither by the terminal nor by rich."""
    return Text(printable(text))


def say(on: Console, text: object, *, lines: bool = False, style: str | None = None) -> None:
    """Print a text from outside; the terminal breaks its lines."""
    on.print(printable(text, lines=lines), markup=False, highlight=False, emoji=False, soft_wrap=True, style=style)


def fitting(on: Console, rows: Rows) -> tuple[Table, int, int]:
    """Return the widest table that fits, the rank of the columns that are in it, and its width."""
    ranks = sorted({0, *(column.rank for column in rows.columns)}, reverse=True)
    for rank in ranks:
        table = rows.table(rank)
        needed = on.measure(table, options=on.options.update(width=10_000)).maximum
        if not on.is_terminal or needed <= on.width:
            break
    return table, rank, needed


def print_fitting(on: Console, rows: Rows) -> int:
    """Print the widest table that fits, cutting nothing off, and return the rank of the columns that are in it."""
    table, rank, needed = fitting(on, rows)
    on.width = max(on.width, needed)  # a terminal breaks lines, and cuts no names off
    on.print(table)
    return rank


def print_json(value: Any) -> None:
    """Print one JSON value on one line."""
    click.echo(json.dumps(value, default=plain))


def plain(value: object) -> str:
    """Return an amount or a time as it stands in JSON and CSV."""
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


def usd(amount: Decimal | None) -> str:
    """Return an amount in US dollars to the nano-dollar; ``?`` where it is not known, which is not 0."""
    return "?" if amount is None else f"{amount:.9f}"


def counted(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def moment(milliseconds: int | None) -> datetime | None:
    """Return the time that Redis' clock showed."""
    try:
        return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (OverflowError, ValueError, OSError):  # nobody of us wrote that
        return None


def duration(milliseconds: float | None) -> str:
    """Return a time span in the unit that suits it."""
    if milliseconds is None:
        return ""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def one_of(allowed: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what turns an option's ``a,b`` into a list of names, each of them allowed and named once."""
    names = list(allowed)

    def read(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
        given = [name.strip() for name in value.split(",") if name.strip()]
        for name in given:
            if name not in names:
                raise click.BadParameter(f"{name!r} is not allowed; allowed: {', '.join(names)}", ctx, param)
        return list(dict.fromkeys(given))

    return read
