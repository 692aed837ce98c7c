"""How do the keys and subscriptions of the providers look to an operator, and how is one tried again?

Without Redis it is still known which there are; not whether they are refused, nor what is left of their quotas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click
from rich.console import Console

from attune_worker.cli.output import Column, Rows, print_fitting, print_json, say
from attune_worker.cli.printable import printable
from attune_worker.credentials import Credentials, CredentialStatus, QuotaStatus, configured
from attune_worker.errors import ServiceUnavailableError
from attune_worker.sections import DEFAULT_CREDENTIAL
from attune_worker.settings import Settings

IN_REDIS = ("refused", "held", "windows", "in_flight", "reserved_tokens", "tells_no_quota")
"""The fields that are not known while Redis is away."""

HELD = {
    "credential_refused": "refused",
    "quota_used_up": "quota used up",
    "quota_paced": "quota is spread evenly",
    "quota_reserved": "quota is reserved by calls under way",
    "quota_unknown": "one call finds out about the quota",
}

Statuses = Mapping[str, Sequence[CredentialStatus]]


def look(settings: Settings, away: str | None = None) -> tuple[Statuses, str | None]:
    """Return how each credential stands, and, where Redis cannot be reached, what was said of that.

    ``away`` is what was said already: then Redis is not asked again.
    """
    if away is not None:
        return configured(settings), away
    try:
        with closing(Credentials(settings)) as credentials:
            return credentials.status(), None
    except ServiceUnavailableError as error:
        return configured(settings), error.message


def as_values(statuses: Statuses, away: str | None) -> list[dict[str, Any]]:
    """Return the credentials as they stand in JSON; what is not known is null."""
    unknown = {} if away is None else dict.fromkeys(IN_REDIS)
    return [{"provider": provider} | asdict(one) | unknown for provider, one in _each(statuses)]


def print_credentials(on: Console, statuses: Statuses, away: str | None) -> None:
    """Print each credential, then the quota windows of the subscriptions."""
    cells = [_cells(provider, one, away) for provider, one in _each(statuses)]
    styles = {
        row: "red" if one.refused else "yellow"
        for row, (_, one) in enumerate(_each(statuses))
        if one.refused or one.held is not None
    }
    print_fitting(on, Rows(CREDENTIALS, cells, styles=styles))
    windows = [
        (f"{provider}/{one.name}", name, window)
        for provider, one in _each(statuses)
        for name, window in one.windows.items()
    ]
    if windows:
        print_fitting(on, Rows(WINDOWS, [_window_cells(*window) for window in windows]))
    if away is not None:
        say(on, f"which keys are refused, and what is left of quotas, is not known now: {away}", style="red")


def reset_key(settings: Settings, key: str, *, as_json: bool) -> None:
    """Have a key that was refused, ``PROVIDER/NAME``, tried again by the next call, and say so.

    Raises ``ConfigurationError``, naming those there are, for one that is not configured.
    """
    provider, _, name = key.rpartition("/") if "/" in key else (key, "", DEFAULT_CREDENTIAL)
    with closing(Credentials(settings)) as credentials:
        refused = credentials.reset(provider, name)
    if as_json:
        print_json({"reset": refused, "key": f"{provider}/{name}"})
        return
    said = "the refusal is forgotten: the next call tries it" if refused else "it was not refused"
    click.echo(printable(f"{provider}/{name}: {said}"))


CREDENTIALS = (
    Column("credential"),
    Column("mode", 1),
    Column("key", 2),
    Column("state"),
    Column("since (UTC)", 3),
    Column("until (UTC)", 1),
    Column("calls", 4, right=True),
    Column("tokens reserved", 4, right=True),
)

WINDOWS = (
    Column("subscription"),
    Column("window"),
    Column("told", right=True),
    Column("counted since", 1, right=True),
    Column("of about", 2, right=True),
    Column("may be used by now", right=True),
    Column("back at (UTC)"),
)


def _each(statuses: Statuses) -> Iterator[tuple[str, CredentialStatus]]:
    return ((provider, one) for provider, found in statuses.items() for one in found)


def _cells(provider: str, one: CredentialStatus, away: str | None) -> tuple[str, ...]:
    until = one.refused.recheck_at if one.refused else one.held.until if one.held else None
    counted = one.mode == "subscription" and away is None
    return (
        f"{provider}/{one.name}",
        one.mode.value,
        _key(one),
        _state(one, away),
        _time(one.refused.since if one.refused else None),
        _time(until),
        str(one.in_flight) if counted else "",
        f"{one.reserved_tokens:,}" if counted else "",
    )


def _key(one: CredentialStatus) -> str:
    if one.present:
        return "there" if one.variable is None else f"in {one.variable}"
    return "empty" if one.variable is None else f"{one.variable} is empty"


def _state(one: CredentialStatus, away: str | None) -> str:
    if away is not None:
        return "?"
    if one.refused:
        status = f", {one.refused.status}" if one.refused.status else ""
        return f"refused ({one.refused.error}{status})"
    if one.held is not None:
        return HELD.get(one.held.reason, one.held.reason)
    if one.mode == "subscription" and not one.windows:
        return "tells of no quota" if one.tells_no_quota else "no quota told yet"
    return "free" if one.present or one.windows else "no key here"


def _window_cells(subscription: str, name: str, one: QuotaStatus) -> tuple[str, ...]:
    return (
        subscription,
        name,
        f"{one.utilization:.0%}{' (rejected)' if one.status == 'rejected' else ''}",
        f"{one.counted_tokens:,} tokens",
        "?" if one.capacity_tokens is None else f"{one.capacity_tokens:,} tokens",
        f"{one.pace:.0%}",
        _time(one.resets_at) or "?",
    )


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"
