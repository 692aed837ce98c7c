"""Which providers does the fleet leave alone, and is somebody to lift that?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime
from typing import Any

from attune_worker.doctor.finding import Finding, Level
from attune_worker.models.breaker import CircuitBreaker
from attune_worker.settings import Settings
from attune_worker.store.circuits import Name
from attune_worker.store.connection import RedisClient

FORCED = {"open": "is forced open", "disabled": "is disabled: it stops no call", "metrics_only": "never opens"}
"""What an operator has laid over a circuit."""


def look(settings: Settings, redis: RedisClient) -> Iterator[Finding]:
    """Look at every circuit; raises ``ServiceUnavailableError`` when Redis is away."""
    with closing(CircuitBreaker(settings=settings, redis=redis)) as breaker:
        yield from judged(breaker.circuits())


def judged(found: Mapping[Name, Mapping[str, Any]]) -> Iterator[Finding]:
    """Judge how they stand: one that is not closed is a warning, and so is what an operator has left in force."""
    told = [one for name, fields in found.items() if (one := _finding(name, fields)) is not None]
    yield from told or [Finding("circuits", Level.OK, "none is open, and no operator holds one")]


def _finding(name: Name, fields: Mapping[str, Any]) -> Finding | None:
    provider, tier = name
    if fields["forced"]:
        state, until = FORCED[fields["forced"]], _moment(fields["forced_until"]) or "it is reset"
    elif fields["state"] == "closed":
        return None
    else:
        state, until = "is half-open" if fields["state"] == "half_open" else "is open", _moment(fields["next_probe"])
    error = f" ({fields['error']})" if fields["error"] else ""
    by = f"by {fields['by']}" if fields["by"] else ""
    parts = [f"{provider}:{tier or '*'} {state}{f' until {until}' if until else ''}", f"{fields['reason']}{error}", by]
    reset = " ".join(["attune-worker breaker reset", provider, *([tier] if tier else [])])
    return Finding("circuits", Level.WARNING, "; ".join(filter(None, parts)), f"Once it is well: {reset}")


def _moment(text: str | None) -> str:
    return "" if text is None else f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S} UTC"
