"""``attune-worker budget``: what is left of the budgets, and what may be spent until further notice?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import click
from rich.console import Console

from attune_worker.budget import Budgets, BudgetStatus, Per
from attune_worker.cli.costs import Moment
from attune_worker.cli.names import complete_providers, operator
from attune_worker.cli.output import Column, Rows, console, json_option, print_fitting, print_json, say, usd
from attune_worker.set_limits import Until
from attune_worker.settings import get_settings

COLUMNS = (
    Column("per"),
    Column("tenant"),
    Column("workflow"),
    Column("provider"),
    Column("kind"),
    Column("limit USD", right=True),
    Column("spent USD", 2, right=True),
    Column("reserved USD", 3, right=True),
    Column("left USD", right=True),
    Column("starts anew (UTC)", 1),
)

MAX_SHOWN = 10_000


class _Usd(click.ParamType[Decimal]):
    """An amount in US dollars, exactly as it is written."""

    name = "usd"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:
        """Read it, or say how it should look."""
        try:
            found = Decimal(value)
        except InvalidOperation:
            self.fail(f"{value!r} is no amount; it should be like 12.50, in US dollars", param, ctx)
        return found


_tenant = click.option("--tenant", metavar="NAME", help="The tenant that it is about.")
_workflow = click.option("--workflow", metavar="NAME", help="The workflow that it is about.")
_provider = click.option(
    "--provider", metavar="NAME", shell_complete=complete_providers, help="The provider that it is about."
)


@click.group()
def budget() -> None:
    """See what is left of the budgets, and change a limit while the fleet runs.

    Example: attune-worker budget show --tenant acme
    """


@budget.command()
@_tenant
@_workflow
@_provider
@click.option(
    "--sort",
    type=click.Choice(["name", "left"]),
    default="name",
    show_default=True,
    help="By name, or what is nearest to its limit first.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, MAX_SHOWN),
    default=100,
    show_default=True,
    metavar="N",
    help="Most budgets to show.",
)
@click.option("--page", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Which N of them.")
@json_option
def show(
    tenant: str | None, workflow: str | None, provider: str | None, sort: str, limit: int, page: int, as_json: bool
) -> None:
    """Show each budget in its current window: what is spent, reserved for calls under way, and left.

    A budget for each name (*) has a line for each name that was used; one that is asked for is shown in any case.

    Example: attune-worker budget show --sort left --limit 20
    """
    with closing(Budgets(get_settings())) as budgets:
        rows = budgets.status(tenant, workflow, provider)
    if sort == "left":
        rows.sort(key=_share_left)
    shown = rows[(page - 1) * limit : page * limit]
    if as_json:
        print_json({"budgets": list(map(asdict, shown)), "total": len(rows), "page": page, "limit": limit})
        return
    _print(console(), shown)
    if not rows:
        click.echo("no budget is configured, or none of these" if get_settings().budgets else "no budget is configured")
    elif len(shown) < len(rows):
        click.echo(f"page {page} of {-(-len(rows) // limit)}; {len(rows)} budgets in all")


@budget.command("set")
@click.argument("limit_usd", metavar="[USD]", type=_Usd(), required=False)
@click.option("--per", type=click.Choice(["day", "month"]), required=True, help="The budget's window.")
@_tenant
@_workflow
@_provider
@click.option("--soft", is_flag=True, help="The limit that only warns.")
@click.option("--until", type=Moment(), help="Until this time, such as 2026-11-24T09:00.  [default: the window's end]")
@click.option("--for-good", is_flag=True, help="Until it is changed again.")
@click.option("--default", "configured", is_flag=True, help="Back to the configured limit.")
@click.option("--reason", default="", metavar="TEXT", help="Why; kept with who and when.")
@json_option
@click.pass_context
def set_limit(  # noqa: PLR0913  # a flag each
    ctx: click.Context,
    limit_usd: Decimal | None,
    *,
    per: Per,
    tenant: str | None,
    workflow: str | None,
    provider: str | None,
    soft: bool,
    until: datetime | None,
    for_good: bool,
    configured: bool,
    reason: str,
    as_json: bool,
) -> None:
    """Set the limit of a configured budget for the running fleet, from the next call on.

    What is spent and reserved stays as it is: a limit below that refuses at once, and calls under way end as they
    would. Of a budget for each name (*), name one.

    Example: attune-worker budget set 150 --per day --tenant acme --reason "month's end, asked by Kim"
    """
    if configured is (limit_usd is not None):
        raise click.UsageError("give either an amount or --default", ctx)
    if (until is not None) + for_good + configured > 1:
        raise click.UsageError("give at most one of --until, --for-good and --default", ctx)
    ends: Until = until or ("for_good" if for_good else "window_end")
    with closing(Budgets(get_settings())) as budgets:
        row = budgets.set_limit(
            per,
            (tenant, workflow, provider),
            limit_usd,
            hard=not soft,
            until=ends,
            by=operator(),
            reason=reason,
        )
    if as_json:
        print_json(asdict(row))
    else:
        _print(console(), [row])


def _share_left(row: BudgetStatus) -> Decimal:
    return row.left_usd / row.limit_usd if row.limit_usd else Decimal(0)


def _print(on: Console, rows: Sequence[BudgetStatus]) -> None:
    """Print the widest table that fits, and below it what an operator has set."""
    if not rows:
        return
    used_up = {place: "bold red" if row.hard else "yellow" for place, row in enumerate(rows) if row.left_usd <= 0}
    print_fitting(on, Rows(COLUMNS, [_cells(row) for row in rows], styles=used_up))
    for row in rows:
        if row.set is not None:
            say(on, _told(row))


def _cells(row: BudgetStatus) -> tuple[str, ...]:
    return (
        row.per,
        row.tenant or "",
        row.workflow or "",
        row.provider or "",
        "hard" if row.hard else "soft",
        f"{usd(row.limit_usd)}{'' if row.set is None else ' !'}",
        usd(row.spent_usd),
        usd(row.reserved_usd),
        usd(row.left_usd),
        f"{row.resets_at:%Y-%m-%d %H:%M}",
    )


def _told(row: BudgetStatus) -> str:
    """Say who has set a limit, when, until when and why."""
    if row.set is None:
        return ""
    scope = " ".join(filter(None, (row.per, row.tenant, row.workflow, row.provider)))
    at = "" if row.set.at is None else f" at {row.set.at:%Y-%m-%d %H:%M} UTC"
    until = "for good" if row.set.until is None else f"until {row.set.until:%Y-%m-%d %H:%M} UTC"
    why = f": {row.set.reason}" if row.set.reason else ""
    return (
        f"! {scope}: {usd(row.set.limit_usd)} instead of {usd(row.configured_usd)}, {until}, by {row.set.by}{at}{why}"
    )
