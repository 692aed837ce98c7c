"""What does an operator see of a circuit?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from attune_worker.cli.output import Column, Rows, counted, print_fitting, say

COLUMNS = (
    Column("circuit"),
    Column("state"),
    Column("failures", 3, right=True),
    Column("since (UTC)", 2),
    Column("error", 2),
    Column("until (UTC)", 1),
    Column("by", 4),
    Column("why", 3),
)

STATES = {"closed": "closed", "open": "open", "half_open": "half-open"}
FORCED = {"open": "forced open", "disabled": "disabled", "metrics_only": "metrics only"}
STYLES = {
    "open": "red",
    "forced open": "bold red",
    "half-open": "yellow",
    "disabled": "magenta",
    "metrics only": "magenta",
}

WATCHED = (
    "state",
    "is_open",
    "failure_count",
    "opened_at",
    "retry_at",
    "reason",
    "error",
    "forced",
    "by",
    "forced_at",
    "reset_at",
    "forced_until",
    "probes",
)
"""The fields whose change is one: a busy circuit that is well has a success each moment."""


def label(provider: str, tier: str | None) -> str:
    """Return a circuit's name for a reader."""
    return f"{provider}:{tier or '*'}"


@dataclass(frozen=True)
class CircuitView:
    """One circuit, as ``CircuitBreaker.circuits`` tells of it."""

    provider: str
    tier: str | None
    fields: Mapping[str, Any]

    @property
    def state(self) -> str:
        """What holds now: what was laid over it, else its own state."""
        return FORCED.get(self.fields["forced"] or "") or STATES.get(self.fields["state"], self.fields["state"])

    @property
    def since(self) -> str | None:
        """Since when it holds, where that is known."""
        fields = self.fields
        if fields["forced"]:
            return None if fields["forced_at"] is None else str(fields["forced_at"])
        at = fields["reset_at"] if fields["state"] == "closed" else fields["opened_at"]
        return None if at is None else str(at)

    @property
    def next_call(self) -> str:
        """When a call may be made that may not be made now."""
        fields = self.fields
        if fields["forced"]:
            if fields["forced_until"]:
                return f"{_short(fields['forced_until'])}{'' if fields['forced'] == 'open' else ' (ends)'}"
            return "after a reset" if fields["forced"] == "open" else ""
        if not fields["next_probe"]:
            return ""
        probing = f", {counted(fields['probes'], 'probe')} under way" if fields["probes"] else ""
        return f"{_short(fields['next_probe'])}{probing}"

    @property
    def changing(self) -> tuple[Any, ...]:
        """The values that are a change when they differ."""
        return tuple(self.fields[name] for name in WATCHED)

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` says of it."""
        return {"provider": self.provider, "tier": self.tier, **self.fields}

    def row(self) -> tuple[str, ...]:
        """Return its cells under ``COLUMNS``."""
        fields = self.fields
        return (
            label(self.provider, self.tier),
            self.state,
            str(fields["failure_count"] or ""),
            _short(self.since),
            fields["error"] or "",
            self.next_call,
            fields["by"],
            fields["reason"],
        )


def circuits_table(views: Sequence[CircuitView], title: str | None = None) -> Rows:
    """Return the circuits as a table."""
    styles = {row: STYLES[view.state] for row, view in enumerate(views) if view.state in STYLES}
    return Rows(COLUMNS, [view.row() for view in views], title, styles)


def print_circuits(on: Console, views: Sequence[CircuitView]) -> None:
    """Print the circuits; where the table has no room for the reasons, they follow it."""
    if not views:
        say(on, "all circuits are closed, and no failure is known")
        return
    if print_fitting(on, circuits_table(views)) < COLUMNS[-1].rank:
        for view in views:
            if told := view.fields["reason"] or view.fields["by"]:
                by = f" ({view.fields['by']})" if view.fields["reason"] and view.fields["by"] else ""
                say(on, f"{label(view.provider, view.tier)}: {told}{by}")


def _short(text: str | None) -> str:
    """Return a time without its date where that is today's."""
    if text is None:
        return ""
    at = datetime.fromisoformat(text)
    return f"{at:%H:%M:%S}" if at.date() == datetime.now(UTC).date() else f"{at:%Y-%m-%d %H:%M:%S}"
