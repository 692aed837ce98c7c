"""``attune-worker routing``: which model would a stage get, why, and how has that worked?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from math import isnan
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attune_worker.jobs import Candidate, Decision
from attune_worker.models.adaptive import AdaptiveModelRouter

NO_KEY = "has no API key"

COLUMNS = {
    "model": 0,
    "tier": 2,
    "success": 0,
    "90 % interval": 2,
    "USD a call": 0,
    "outcomes": 0,
    "share": 0,
    "verdict": 1,
}
"""What ``explain`` shows of each model; the higher the number, the sooner a column goes where lines are short."""

LEFT = ("model", "tier", "verdict")
MAX_DIGITS = 6


class _Number(click.FloatRange):
    """A number within bounds; nan is none, although it is not outside of them either."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if isnan(found):
            self.fail(f"{value!r} is not a number", param, ctx)
        return found


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_max_cost = click.option("--max-cost", type=_Number(min=0), metavar="USD", help="Most that a call may cost.")
_max_latency = click.option(
    "--max-latency-ms", type=click.IntRange(min=1), metavar="MS", help="Most that 95 of 100 answers may take."
)
_floor = click.option("--min-success-rate", type=_Number(0, 1), metavar="RATE", help="Overrides the configured one.")


@click.group()
def routing() -> None:
    """See which model a stage gets, and why.

    Example: attune-worker routing explain code-review fix_bug
    """


@routing.command()
@click.argument("workflow")
@click.argument("stage")
@_max_cost
@_max_latency
@_floor
@_json
def best(
    workflow: str,
    stage: str,
    max_cost: float | None,
    max_latency_ms: int | None,
    min_success_rate: float | None,
    as_json: bool,
) -> None:
    """Print the model that is best for a stage by now."""
    with _router() as router:
        decision = router.explain(workflow, stage, max_cost, max_latency_ms, min_success_rate)
    chosen = decision.candidates[decision.chosen]
    if as_json:
        known = chosen.model_dump(mode="json") | {"rule": decision.rule, "best_effort": decision.best_effort}
        click.echo(json.dumps(known))
        return
    click.echo(chosen.model_id)
    if decision.best_effort:
        click.echo("this is a best effort: no model meets all of it; see attune-worker routing explain", err=True)


@routing.command()
@click.argument("workflow")
@click.argument("stage")
@_max_cost
@_max_latency
@_floor
@_json
def explain(
    workflow: str,
    stage: str,
    max_cost: float | None,
    max_latency_ms: int | None,
    min_success_rate: float | None,
    as_json: bool,
) -> None:
    """Show every model with what is known of it in a stage, and what speaks against it."""
    with _router() as router:
        decision = router.explain(workflow, stage, max_cost, max_latency_ms, min_success_rate)
    if as_json:
        click.echo(decision.model_dump_json())
        return
    _print_explained(_console(), decision)


@routing.command()
@click.argument("workflow")
@click.argument("stage", required=False)
@click.option("--days", type=click.IntRange(1, 35), default=7, show_default=True, help="Days to look back on (UTC).")
@_json
def stats(workflow: str, stage: str | None, days: int, as_json: bool) -> None:
    """Show how the calls of a workflow, or of one of its stages, went for each model."""
    with _router() as router:
        found = router.get_routing_stats(workflow, stage, days)
    if as_json:
        click.echo(json.dumps(found, default=_plain))
    elif not found["total_calls"]:
        click.echo(f"no calls of {_where(workflow, stage)} in the last {days} days")
    else:
        _console().print(_counted(found))


@routing.command()
@click.argument("workflow")
@click.argument("stage")
@_json
def upgrade(workflow: str, stage: str, as_json: bool) -> None:
    """Say whether a stage should use a stronger tier, and why."""
    with _router() as router:
        should, reason = router.recommend_tier_upgrade(workflow, stage)
    click.echo(
        json.dumps({"upgrade": should, "reason": reason}) if as_json else f"{'yes' if should else 'no'}: {reason}"
    )


@contextmanager
def _router() -> Iterator[AdaptiveModelRouter]:
    router = AdaptiveModelRouter()
    try:
        yield router
    finally:
        router.close()


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=200)  # a pipe has no width, and nothing should be cut


def _print_explained(console: Console, decision: Decision) -> None:
    """Print the widest table that fits; where there is no room for verdicts in it, they follow it."""
    shown = [(place, one) for place, one in enumerate(decision.candidates) if one.verdict != NO_KEY]
    for dispensable in (2, 1, 0):
        table = _explained(decision, shown, dispensable)
        if not console.is_terminal or _width(console, table) <= console.width:
            break
    console.width = max(console.width, _width(console, table))  # a terminal breaks lines, and cuts no names off
    console.print(table)
    if COLUMNS["verdict"] > dispensable:
        for _, one in shown:
            console.print(f"{one.provider}/{one.model_id}: {_verdict(one, decision)}", markup=False, highlight=False)
    if without := len(decision.candidates) - len(shown):
        console.print(f"{without} more {'has' if without == 1 else 'have'} no API key", highlight=False)


def _width(console: Console, table: Table) -> int:
    """Return the width at which nothing in the table is broken or cut."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def _explained(decision: Decision, shown: Sequence[tuple[int, Candidate]], dispensable: int) -> Table:
    title = (
        f"{decision.workflow}/{decision.stage}: {decision.rule} choice, success of at least {100 * decision.floor:g}%"
    )
    if decision.best_effort:
        title += ", best effort"
    table = Table(title=escape(title), box=box.SIMPLE, title_justify="left", pad_edge=False)
    for name, rank in COLUMNS.items():
        if rank <= dispensable:
            table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for place, candidate in shown:
        cells = zip(_row(candidate, decision), COLUMNS.values(), strict=True)
        kept = [escape(cell) for cell, rank in cells if rank <= dispensable]
        table.add_row(*kept, style="bold" if place == decision.chosen else None)
    return table


def _row(one: Candidate, decision: Decision) -> tuple[str, ...]:
    interval = "" if one.lower is None or one.upper is None else f"{one.lower:.0%} to {one.upper:.0%}"
    return (
        f"{one.provider}/{one.model_id}",
        one.tier.value,
        _rate(one.expected_success, decision.floor),
        interval,
        "" if one.expected_cost_usd is None else f"{one.expected_cost_usd:.6f}",
        str(one.calls),
        _share(one.probability),
        _verdict(one, decision),
    )


def _rate(value: float | None, floor: float) -> str:
    """Return a share with as many digits as it takes to tell it from a floor that it is below of."""
    if value is None:
        return ""
    digits = 1
    while value < floor and digits < MAX_DIGITS and f"{value:.{digits}%}" == f"{floor:.{digits}%}":
        digits += 1
    return f"{value:.{digits}%}"


def _verdict(one: Candidate, decision: Decision) -> str:
    below = one.expected_success is not None and one.expected_success < decision.floor
    return f"{one.verdict}; below the floor" if one.verdict == "explored" and below else one.verdict


def _counted(found: dict[str, Any]) -> Table:
    title = f"{_where(found['workflow'], found['stage'])}, last {found['days_analyzed']} days"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", show_footer=True)
    total = ("total", str(found["total_calls"]), _share(found["avg_success_rate"]), _usd(found["avg_cost"]), "", "", "")
    names = ("model", "calls", "success", "USD a call", "mean ms", "p95 ms", "score")
    for name, footer in zip(names, total, strict=True):
        table.add_column(name, footer, justify="left" if name == "model" else "right")
    for model, one in found["performance_by_model"].items():
        score = "" if one["avg_score"] is None else f"{one['avg_score']:.2f}"
        times = (_whole(one["avg_latency_ms"]), _whole(one["p95_latency_ms"]))
        table.add_row(model, str(one["calls"]), _share(one["success_rate"]), _usd(one["avg_cost"]), *times, score)
    return table


def _where(workflow: str, stage: str | None) -> str:
    return workflow if stage is None else f"{workflow}/{stage}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _usd(value: Decimal | None) -> str:
    return "?" if value is None else f"{value:.6f}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _plain(value: object) -> str:
    if isinstance(value, Decimal):
        return format(value, "f")
    raise TypeError(f"{type(value).__name__} is not JSON")
