"""``attune-worker routing``: which model would a stage get, why, and how has that worked?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import click
from rich.console import Console

from attune_worker.cli.number import Number
from attune_worker.cli.output import Column, Rows, console, counted, json_option, print_fitting, print_json, say
from attune_worker.cli.printable import printable
from attune_worker.jobs import Candidate, Decision
from attune_worker.models.adaptive import AdaptiveModelRouter

NO_KEY = "has no API key"

COLUMNS = (
    Column("model"),
    Column("tier", 2),
    Column("success", right=True),
    Column("90 % interval", 2, right=True),
    Column("USD a call", right=True),
    Column("outcomes", right=True),
    Column("share", right=True),
    Column("verdict", 1),
)
"""What ``explain`` shows of each model."""

VERDICT_RANK = 1
MAX_DIGITS = 6


_max_cost = click.option("--max-cost", type=Number(min=0), metavar="USD", help="Most that a call may cost.")
_max_latency = click.option(
    "--max-latency-ms", type=click.IntRange(min=1), metavar="MS", help="Most that 95 of 100 answers may take."
)
_floor = click.option("--min-success-rate", type=Number(0, 1), metavar="RATE", help="Overrides the configured one.")


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
@json_option
def best(
    workflow: str,
    stage: str,
    max_cost: float | None,
    max_latency_ms: int | None,
    min_success_rate: float | None,
    as_json: bool,
) -> None:
    """Print the model that is best for a stage by now.

    Example: attune-worker routing best code-review fix_bug --max-cost 0.02
    """
    with _router() as router:
        decision = router.explain(workflow, stage, max_cost, max_latency_ms, min_success_rate)
    chosen = decision.candidates[decision.chosen]
    if as_json:
        known = chosen.model_dump(mode="json") | {"rule": decision.rule, "best_effort": decision.best_effort}
        print_json(known)
        return
    click.echo(printable(chosen.model_id))
    if decision.best_effort:
        click.echo("this is a best effort: no model meets all of it; see attune-worker routing explain", err=True)


@routing.command()
@click.argument("workflow")
@click.argument("stage")
@_max_cost
@_max_latency
@_floor
@json_option
def explain(
    workflow: str,
    stage: str,
    max_cost: float | None,
    max_latency_ms: int | None,
    min_success_rate: float | None,
    as_json: bool,
) -> None:
    """Show every model with what is known of it in a stage, and what speaks against it.

    Example: attune-worker routing explain code-review fix_bug
    """
    with _router() as router:
        decision = router.explain(workflow, stage, max_cost, max_latency_ms, min_success_rate)
    if as_json:
        print_json(decision.model_dump(mode="json"))
        return
    _print_explained(console(), decision)


@routing.command()
@click.argument("workflow")
@click.argument("stage", required=False)
@click.option("--days", type=click.IntRange(1, 35), default=7, show_default=True, help="Days to look back on (UTC).")
@json_option
def stats(workflow: str, stage: str | None, days: int, as_json: bool) -> None:
    """Show how the calls of a workflow, or of one of its stages, went for each model.

    Example: attune-worker routing stats code-review --days 30
    """
    with _router() as router:
        found = router.get_routing_stats(workflow, stage, days)
    if as_json:
        print_json(found)
    elif not found["total_calls"]:
        click.echo(printable(f"no calls of {_where(workflow, stage)} in the last {counted(days, 'day')}"))
    else:
        print_fitting(console(), _counted(found))


@routing.command()
@click.argument("workflow")
@click.argument("stage")
@json_option
def upgrade(workflow: str, stage: str, as_json: bool) -> None:
    """Say whether a stage should use a stronger tier, and why.

    Example: attune-worker routing upgrade code-review fix_bug
    """
    with _router() as router:
        should, reason = router.recommend_tier_upgrade(workflow, stage)
    if as_json:
        print_json({"upgrade": should, "reason": reason})
    else:
        click.echo(printable(f"{'yes' if should else 'no'}: {reason}"))


@contextmanager
def _router() -> Iterator[AdaptiveModelRouter]:
    router = AdaptiveModelRouter()
    try:
        yield router
    finally:
        router.close()


def _print_explained(on: Console, decision: Decision) -> None:
    """Print the widest table that fits; where there is no room for verdicts in it, they follow it."""
    kept = [(place, one) for place, one in enumerate(decision.candidates) if one.verdict != NO_KEY]
    if print_fitting(on, _explained(decision, kept)) < VERDICT_RANK:
        for _, one in kept:
            say(on, f"{one.provider}/{one.model_id}: {_verdict(one, decision)}")
    if without := len(decision.candidates) - len(kept):
        say(on, f"{without} more {'has' if without == 1 else 'have'} no API key")


def _explained(decision: Decision, kept: list[tuple[int, Candidate]]) -> Rows:
    title = (
        f"{decision.workflow}/{decision.stage}: {decision.rule} choice, success of at least {100 * decision.floor:g}%"
    )
    if decision.best_effort:
        title += ", best effort"
    chosen = {row: "bold" for row, (place, _) in enumerate(kept) if place == decision.chosen}
    return Rows(COLUMNS, [_row(one, decision) for _, one in kept], title, chosen)


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


def _counted(found: dict[str, Any]) -> Rows:
    title = f"{_where(found['workflow'], found['stage'])}, last {counted(found['days_analyzed'], 'day')}"
    total = ("total", str(found["total_calls"]), _share(found["avg_success_rate"]), _usd(found["avg_cost"]), "", "", "")
    names = ("model", "calls", "success", "USD a call", "mean ms", "p95 ms", "score")
    columns = [Column(name, rank=int(" ms" in name), right=name != "model") for name in names]
    cells = []
    for model, one in found["performance_by_model"].items():
        score = "" if one["avg_score"] is None else f"{one['avg_score']:.2f}"
        times = (_whole(one["avg_latency_ms"]), _whole(one["p95_latency_ms"]))
        cells.append((model, str(one["calls"]), _share(one["success_rate"]), _usd(one["avg_cost"]), *times, score))
    return Rows(columns, cells, title, footer=total)


def _where(workflow: str, stage: str | None) -> str:
    return workflow if stage is None else f"{workflow}/{stage}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _usd(value: Decimal | None) -> str:
    return "?" if value is None else f"{value:.6f}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
