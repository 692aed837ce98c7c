"""How does an auth strategy, and what it recommends, look to a reader?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from attune_worker.cli.output import Column, Rows, counted, print_fitting, say, usd
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.learned_lines import ENOUGH_JOBS


def shown_fields(strategy: AuthStrategy) -> dict[str, Any]:
    """Return the fields in which a strategy differs from the defaults."""
    defaults = AuthStrategy().model_dump(mode="json")
    return {name: value for name, value in strategy.model_dump(mode="json").items() if value != defaults[name]}


def print_saved(on: Console, strategy: AuthStrategy, place: str) -> None:
    """Print a strategy that has just been saved."""
    say(on, f"saved in {place}")
    _print_fields(on, strategy)


def print_status(on: Console, strategy: AuthStrategy, known: Mapping[str, Any]) -> None:
    """Print a strategy, where it is kept, and what its estimates go by."""
    say(on, f"{'kept in' if known['saved'] else 'the defaults hold: nothing is kept in'} {known['place']}")
    _print_fields(on, strategy)
    say(on, f"tokens per line: {known['tokens_per_line']['value']:g} ({_source(known['tokens_per_line'])})")
    window = known["window_tokens"]
    if window["value"] is None:
        say(on, "quota of five hours: not known; --window-tokens of auth setup sets it")
    else:
        told = "as set" if window["source"] == "set" else "an assumption: providers publish no such number"
        say(on, f"quota of five hours: {window['value']:,} tokens ({told})")


def print_recommended(on: Console, found: Mapping[str, Any], file: str | None) -> None:
    """Print a recommendation, why, and what either mode takes."""
    about = counted(found["module_lines"], "line")
    say(on, f"{found['recommendation'].value}: {about if file is None else f'{file}, {about}'}: {found['reason']}")
    names = ("mode", "USD", "share of quota", "tokens", "fits the window")
    columns = [Column(name, rank=int(name == "fits the window"), right=name != "mode") for name in names]
    modes = [found[name]["cost"] for name in ("subscription", "api")]
    chosen = {row: "bold" for row, one in enumerate(modes) if one["mode"] is found["recommendation"]}
    print_fitting(on, Rows(columns, [_row(one) for one in modes], styles=chosen))
    cost = modes[1]
    say(on, f"with {cost['model']}, {cost['tokens_per_line']:g} tokens a line ({cost['tokens_source']})")
    for name in ("subscription", "api"):
        one = found[name]
        say(on, f"{one['name']}: + {'; '.join(one['pros'])}")
        say(on, f"{' ' * len(one['name'])}  - {'; '.join(one['cons'])}")


def _print_fields(on: Console, strategy: AuthStrategy) -> None:
    changed = shown_fields(strategy)
    columns = (Column("setting"), Column("value"), Column("from", 1))
    cells = [
        (name, "" if value is None else str(value), "set" if name in changed else "default")
        for name, value in strategy.model_dump(mode="json").items()
    ]
    print_fitting(on, Rows(columns, cells))


def _source(known: Mapping[str, Any]) -> str:
    if known["source"] == "set":
        return "as set"
    if known["source"] == "learned":
        return f"learned from {counted(known['jobs'], 'job')}"
    if known["error"]:
        return f"the default; what was learned is not known now: {known['error']}"
    return f"the default; {ENOUGH_JOBS} jobs are needed to learn it, {known['jobs']} were seen"


def _row(cost: Mapping[str, Any]) -> tuple[str, ...]:
    fits = {None: "?", True: "yes", False: "no"}[cost["fits_in_context"]]
    share = "?" if cost["quota_cost"] is None else f"{cost['quota_cost']:.1%}"
    return cost["mode"].value, usd(cost["monetary_cost"]), share, f"{cost['tokens_used']:,}", fits
