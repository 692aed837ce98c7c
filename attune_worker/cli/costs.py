"""``attune-worker costs``: what did the calls cost, what will they, and does the provider's invoice say the same?"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from attune_worker.cli.cost_view import percent_off, print_reconciled, print_report, print_savings
from attune_worker.cli.estimate import estimate
from attune_worker.cli.files import FileName
from attune_worker.cli.output import (
    console,
    counted,
    json_option,
    one_of,
    plain,
    print_json,
)
from attune_worker.cli.printable import printable
from attune_worker.errors import ConfigurationError
from attune_worker.invoices import COLUMNS, read_invoice
from attune_worker.ledger import DIMENSIONS, CostRow, Ledger
from attune_worker.ledger_record import LedgerRecord
from attune_worker.reconcile import reconcile
from attune_worker.settings import get_settings

if TYPE_CHECKING:
    from attune_worker.models.savings import Savings

FIELDS = tuple(one.name for one in fields(LedgerRecord))

FORMULA = ("=", "+", "-", "@")
"""What a spreadsheet takes for the beginning of a formula, in a tenant's name for instance (OWASP: CSV Injection)."""

MAX_DAYS = 3660


class Moment(click.ParamType[datetime]):
    """A day or a time in ISO 8601, in UTC unless it says otherwise."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Read it, or say how it should look."""
        if isinstance(value, datetime):
            return value
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time; it should be like 2026-11-23 or 2026-11-23T14:00:00+01:00", param, ctx)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def _read_columns(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Read what the file calls its columns."""
    for one in given:
        name, equals, theirs = one.partition("=")
        if name not in COLUMNS or not equals or not theirs:
            raise click.BadParameter(
                f"{one!r}: it should be like cost_usd=Amount; names: {', '.join(COLUMNS)}", ctx, param
            )
    return dict(one.split("=", 1) for one in given)


_since = click.option("--since", type=Moment(), help="Only calls recorded from then on, such as 2026-11-01.")
_until = click.option("--until", type=Moment(), help="Only calls recorded before then.")


@click.group()
def costs() -> None:
    """See what calls cost and what they would, export their records, and hold them against an invoice.

    Example: attune-worker costs report --days 30 --by tenant,model
    """


costs.add_command(estimate)


@costs.command()
@click.option("--days", type=click.IntRange(1, MAX_DAYS), default=7, show_default=True, help="Days to look back (UTC).")
@click.option(
    "--by",
    default="model",
    show_default=True,
    metavar="NAMES",
    callback=one_of(("day", *DIMENSIONS)),
    help=f"What to group by: day, {', '.join(DIMENSIONS)}.",
)
@json_option
def report(days: int, by: list[str], as_json: bool) -> None:
    """Show what the calls of the last days cost. What is not known for certain stands beside, never in the sum.

    Beside it is what had been expected of them, and what the same tokens would have cost at a premium model.

    Example: attune-worker costs report --days 30 --by tenant,model
    """
    with closing(Ledger(get_settings())) as ledger:
        rows = ledger.report(days, by)
        (total,) = ledger.report(days) if by else rows
        saved = _savings(ledger, days) if total.calls else None
    if as_json:
        shown = {"days": days, "by": by, "rows": list(map(_row, rows)), "total": _row(total)}
        print_json({**shown, "savings": None if saved is None else asdict(saved)})
    elif not total.calls:
        click.echo(f"no calls in the last {counted(days, 'day')}")
    else:
        print_report(console(), rows, total, by, f"last {counted(days, 'day')} (UTC)")
        if saved is not None:
            print_savings(console(), saved)


def _row(row: CostRow) -> dict[str, Any]:
    return {**asdict(row), "difference_percent": percent_off(row)}


def _savings(ledger: Ledger, days: int) -> Savings | None:
    """Return what was saved; None where no premium model has a price."""
    from attune_worker.models.registry import Registry
    from attune_worker.models.savings import BY, premium_model, savings

    settings = get_settings()
    registry = Registry.from_settings(settings)
    premium = premium_model(settings, registry)
    return None if premium is None else savings(ledger.report(days, BY), premium, registry)


@costs.command()
@_since
@_until
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True)
@click.option("-o", "--output", type=FileName(), help="File.  [default: standard output]")
def export(since: datetime | None, until: datetime | None, form: str, output: Path | None) -> None:
    """Write the record of every call: no prompt, no answer, no user.

    A call that was taken for orphaned and settled after all has two records; the second says corrects_orphan.

    Example: attune-worker costs export --since 2026-11-01 --format jsonl -o november.jsonl
    """
    write = _as_csv if form == "csv" else _as_jsonl
    with closing(Ledger(get_settings())) as ledger, _replacing(output) as stream:
        count = sum(1 for _ in write(ledger.records(since, until), stream))
    passed_over = f"; entries that are no records: {ledger.skipped}" if ledger.skipped else ""
    click.echo(f"{counted(count, 'record')}{passed_over}", err=True)


@costs.command("reconcile")
@click.option(
    "--invoice",
    required=True,
    type=FileName(),
    help="The provider's usage export (.csv or .jsonl), or the simulator's invoice (.json).",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=THEIRS",
    callback=_read_columns,
    help=f"What the file calls a column; may be repeated. Names: {', '.join(COLUMNS)}.",
)
@click.option("--provider", metavar="NAME", help="Only calls of this provider: whose invoice it is.")
@_since
@_until
@json_option
def compare(
    invoice: Path,
    columns: dict[str, str],
    provider: str | None,
    since: datetime | None,
    until: datetime | None,
    as_json: bool,
) -> None:
    """Hold the ledger against what the provider charges, call by call where the file names them.

    Exit code 1: something differs, or a call whose cost was not known was charged at more than budgets have counted.

    Example: attune-worker costs reconcile --invoice november.csv --provider anthropic --since 2026-11-01
    """
    lines = read_invoice(invoice, columns)
    with closing(Ledger(get_settings())) as ledger:
        records = (one for one in ledger.records(since, until) if provider in {None, one.provider})
        found = reconcile(records, lines)
    if as_json:
        print_json({"agrees": found.agrees, **asdict(found)})
    else:
        print_reconciled(console(), found)
    if not found.agrees:
        raise click.exceptions.Exit(1)


def _as_csv(records: Iterable[LedgerRecord], stream: TextIO) -> Iterator[None]:
    """Write a row for each record, and yield after each."""
    writer = csv.writer(stream, lineterminator="\n")
    found = iter(records)
    first = next(found, None)  # no head without Redis
    writer.writerow(FIELDS)
    for record in chain(() if first is None else (first,), found):
        yield writer.writerow([_cell(getattr(record, name)) for name in FIELDS])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Decimal | datetime):
        return plain(value)
    if isinstance(value, bool | int):
        return str(value).lower()
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def _as_jsonl(records: Iterable[LedgerRecord], stream: TextIO) -> Iterator[None]:
    """Write a line for each record, and yield after each."""
    for record in records:
        fields_of = {name: getattr(record, name) for name in FIELDS}
        stream.write(f"{json.dumps(fields_of, default=plain)}\n")
        yield


@contextmanager
def _replacing(path: Path | None) -> Iterator[TextIO]:
    """Yield a new file that takes the place of ``path`` once it is complete; without ``path`` standard output."""
    if path is None:
        if sys.stdout is None:
            raise ConfigurationError("standard output is closed; say where to write by -o")
        yield sys.stdout
        return
    replaced = not path.is_symlink() and (path.is_file() or not path.exists())  # links, devices, pipes are written to
    draft = path.with_name(f"{path.name}.new") if replaced else path
    try:
        stream = draft.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from None
    with stream:
        yield stream
    if replaced:
        draft.replace(path)
