"""What can be found of a fleet, and how bad is it?"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from attune_worker.errors import ServiceUnavailableError


class Level(StrEnum):
    """What a finding means.

    ``unknown``: it could not be found out. ``warning``: something should be done. ``failed``: jobs or money can be
    lost. ``unreachable``: a service does not answer.
    """

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    FAILED = "failed"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``fix`` says what to do where something is to be done."""

    check: str
    level: Level
    text: str
    fix: str = ""


def unreachable(check: str, error: ServiceUnavailableError, setting: str) -> Finding:
    """Return the finding of a Redis that does not answer; ``setting`` is what says where it is."""
    text = error.message.partition("; start it")[0]
    return Finding(check, Level.UNREACHABLE, text, f"Start it, or correct {setting}.")
