"""``attune-worker routing``: which model would a stage get, why, and how has that worked?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from attune_worker.jobs import Candidate, Decision
from attune_worker.models.adaptive import AdaptiveModelRouter

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_max_cost = click.option("--max-cost", type=click.FloatRange(min=0), metavar="USD", help="Most that a call may cost.")
_max_latency = click.option(
    "--max-latency-ms", type=click.IntRange(min=1), metavar="MS", help="Most that 95 of 100 answers may take."
)
_floor = click.option(
    "--min-success-rate", type=click.FloatRange(0, 1), metavar="RATE", help="Overrides the configured one."
)


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
    _console().print(_explained(decision))


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


def _explained(decision: Decision) -> Table:
    title = f"{decision.workflow}/{decision.stage}: {decision.rule} choice, success of at least {decision.floor:.0%}"
    if decision.best_effort:
        title += ", best effort"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("model", "tier"):
        table.add_column(name)
    for name in ("success", "90 % interval", "USD a call", "outcomes", "share"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for place, candidate in enumerate(decision.candidates):
        table.add_row(*_row(candidate), style="bold" if place == decision.chosen else None)
    return table


def _row(one: Candidate) -> tuple[str, ...]:
    interval = "" if one.lower is None or one.upper is None else f"{one.lower:.0%} to {one.upper:.0%}"
    return (
        f"{one.provider}/{one.model_id}",
        one.tier.value,
        _share(one.expected_success),
        interval,
        "" if one.expected_cost_usd is None else f"{one.expected_cost_usd:.6f}",
        str(one.calls),
        _share(one.probability),
        one.verdict,
    )


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
