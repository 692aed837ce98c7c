"""Which faults hit the fleet, and when? All of it follows from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Kind(StrEnum):
    """What is done."""

    KILL = "worker killed (SIGKILL), replaced"
    STOP = "worker stopped (SIGSTOP)"
    TERMINATE = "worker told to end (SIGTERM), replaced"
    SKEW = "worker replaced by one whose clock is an hour off"
    RESTART = "Redis restarted (SIGTERM)"
    PAUSE = "Redis paused (SIGSTOP)"
    CUT = "all connections to Redis cut"
    DOUBLE = "wake-ups sent twice"


REDIS_AWAY = frozenset({Kind.RESTART, Kind.PAUSE})
ON_WORKERS = frozenset({Kind.KILL, Kind.STOP, Kind.TERMINATE, Kind.SKEW})


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, so many seconds after the start; ``choice`` (0 to 1) says whom it hits, of those that it can."""

    at_seconds: float
    kind: Kind
    lasts_seconds: float
    choice: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How the faults of a run follow each other. Times are in seconds.

    ``lease_seconds`` and ``grace_seconds`` are settings of the workers; ``stop_seconds`` is longer than the lease.
    ``drain_seconds``: how long after the last fault jobs may take to end before they count as lost.
    """

    gap_seconds: tuple[float, float]
    stop_seconds: float
    restart_seconds: float
    pause_seconds: float
    lease_seconds: float
    grace_seconds: float
    request_timeout_seconds: float
    recovery_timeout_seconds: float
    latency_seconds: float
    drain_seconds: float


FULL = Pace((3.0, 8.0), 40.0, 1.5, 8.0, 7.0, 10.0, 20.0, 60.0, 2.0, 180.0)
SHORT = Pace((1.5, 2.5), 10.0, 0.5, 3.0, 7.0, 2.0, 5.0, 5.0, 0.8, 60.0)
SHORT_SECONDS = 300
"""A run of less than this is a short one: everything in it is faster, so that each fault has its time."""

UNDISTURBED_LEASES = 1.6
"""For so many leases after every other kill Redis stays, so that recovery by itself can be seen."""

QUIET_SHARE = 0.25
QUIET_SECONDS = 30.0
"""At the end of a run nothing is broken any more: a quarter of it, though no more than this."""


def pace(seconds: float) -> Pace:
    """Return the pace of a run of so many seconds."""
    return FULL if seconds >= SHORT_SECONDS else SHORT


def load_seconds(seconds: float) -> float:
    """Return for how much of a run jobs are submitted and faults happen."""
    return seconds - min(seconds * QUIET_SHARE, QUIET_SECONDS)


def plan(seed: int, seconds: float) -> tuple[Fault, ...]:
    """Return the faults of a run of so many seconds; every kind comes before any of them comes again."""
    random, rhythm, ends = Random(seed), pace(seconds), load_seconds(seconds)
    faults: list[Fault] = []
    deck: list[Kind] = []
    at_seconds, undisturbed_until = random.uniform(*rhythm.gap_seconds), 0.0
    while True:
        deck = deck or random.sample(list(Kind), len(Kind))
        kind = _drawn(deck, undisturbed=at_seconds < undisturbed_until)
        lasts_seconds = _lasts(kind, rhythm)
        pause_seconds = lasts_seconds if kind in REDIS_AWAY else 0.0
        if at_seconds + pause_seconds >= ends:
            return tuple(faults)
        faults.append(Fault(at_seconds, kind, lasts_seconds, random.random()))
        if kind is Kind.KILL and sum(fault.kind is kind for fault in faults) % 2:
            undisturbed_until = at_seconds + UNDISTURBED_LEASES * rhythm.lease_seconds
        at_seconds += random.uniform(*rhythm.gap_seconds) + pause_seconds


def _drawn(deck: list[Kind], *, undisturbed: bool) -> Kind:
    """Take the next kind off the deck; ``undisturbed``: the next that leaves Redis alone."""
    if not undisturbed:
        return deck.pop(0)
    harmless = [kind for kind in deck if kind not in REDIS_AWAY]
    if not harmless:
        return Kind.DOUBLE
    deck.remove(harmless[0])
    return harmless[0]


def _lasts(kind: Kind, rhythm: Pace) -> float:
    match kind:
        case Kind.STOP:
            return rhythm.stop_seconds
        case Kind.PAUSE:
            return rhythm.pause_seconds
        case Kind.RESTART:
            return rhythm.restart_seconds
        case _:
            return 0.0
