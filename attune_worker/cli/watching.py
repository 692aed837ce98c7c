"""How are circuits watched for as long as somebody likes, also while Redis is away?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from attune_worker.cli.circuit_view import CircuitView, circuits_table, label, print_circuits
from attune_worker.cli.output import console, fitting, print_json, say, shown
from attune_worker.errors import ServiceUnavailableError
from attune_worker.local import end_on_signals

Look = Callable[[], Sequence[CircuitView]]
Seen = tuple[Sequence[CircuitView], ServiceUnavailableError | None]
"""The circuits as they were last seen, and why they could not be looked at just now."""


def watch_circuits(look: Look, interval_seconds: float, *, as_json: bool) -> None:
    """Show the circuits until Ctrl-C or SIGTERM; raises ``ServiceUnavailableError`` if the first look fails."""
    first = look()
    end_on_signals()
    show = _print_changes if as_json else _live
    try:
        show(_looks(look, first, interval_seconds))
    except KeyboardInterrupt:
        return


def _looks(look: Look, first: Sequence[CircuitView], interval_seconds: float) -> Iterator[Seen]:
    """Yield what is seen, again and again."""
    views: Sequence[CircuitView] = first
    yield views, None
    while True:
        threading.Event().wait(interval_seconds)
        try:
            views = look()
        except ServiceUnavailableError as error:
            yield views, error
        else:
            yield views, None


def _print_changes(looks: Iterator[Seen]) -> None:
    """Print a line for each circuit at first, then for each that has changed, and for Redis' going and coming."""
    known: dict[tuple[str, str | None], CircuitView] = {}
    away = False
    for views, error in looks:
        if away is not (error is not None):
            away = error is not None
            print_json({"at": _now(), "redis": "away" if error else "back", "error": error and error.message})
        found = {(view.provider, view.tier): view for view in views}
        for name, view in found.items():
            if name not in known or known[name].changing != view.changing:
                print_json({"at": _now(), **view.to_json()})
        for name in known.keys() - found.keys():  # its time in Redis is over: it is closed
            print_json({"at": _now(), "provider": name[0], "tier": name[1], "state": "closed", "is_open": False})
        known = found


def _live(looks: Iterator[Seen]) -> None:
    on = console()
    if not on.is_terminal:
        _print_tables(on, looks)
        return
    since = 0.0
    with Live(console=on, auto_refresh=False, vertical_overflow="crop") as live:
        for views, error in looks:
            since = 0.0 if error is None else since or time.monotonic()
            live.update(_screen(on, views, error, since), refresh=True)


def _print_tables(on: Console, looks: Iterator[Seen]) -> None:
    """For a pipe: print the table anew whenever something has changed."""
    before: Any = None
    for views, error in looks:
        now = ([(label(view.provider, view.tier), view.changing) for view in views], error is not None)
        if now != before:
            say(on, f"{_now():%Y-%m-%d %H:%M:%S} UTC{_trouble(error)}")
            print_circuits(on, views)
            before = now


def _screen(on: Console, views: Sequence[CircuitView], error: ServiceUnavailableError | None, since: float) -> Group:
    state = f"{_now():%H:%M:%S} UTC"
    if error is not None:
        state += f"{_trouble(error)} (for {time.monotonic() - since:.0f} s); what follows was so before"
    rows = fitting(on, circuits_table(views))[0] if views else shown("all circuits are closed, and no failure is known")
    return Group(shown(state), rows, shown("Ctrl-C ends"))


def _trouble(error: ServiceUnavailableError | None) -> str:
    return "" if error is None else f": {error.message}; trying on"


def _now() -> datetime:
    return datetime.now(UTC)
