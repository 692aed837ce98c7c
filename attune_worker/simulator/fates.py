"""What becomes of the n-th call? A pure function of the seed, n and the behaviour asked for."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from attune_worker.simulator.latency import FixedLatency
from attune_worker.simulator.profile import Behaviour, Fault

_STEPS = 2**52
_MASK = _STEPS - 1


class Fate(NamedTuple):
    """How a call goes wrong, if it does, and the time until then."""

    fault: Fault | None
    latency_seconds: float


def fate(seed: int, call: int, behaviour: Behaviour) -> Fate:
    """Return the fate of call number ``call``; a retry is another call, so it may fare differently."""
    latency, errors = behaviour.latency, behaviour.errors
    if not errors.bounds and isinstance(latency, FixedLatency):
        return Fate(None, latency.seconds)
    first, second = _draws(seed, call)
    return Fate(errors.at(first), latency.at(second))


def _draws(seed: int, call: int) -> tuple[float, float]:
    """Return two independent numbers, evenly spread over the open interval from 0 to 1.

    A hash instead of a random generator: the draws of a call do not depend on how many were made
    before, and seeding a Mersenne Twister for each call would cost ten times as much.
    """
    digest = hashlib.blake2b(f"{seed}:{call}".encode(), digest_size=16).digest()
    halves = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
    first, second = (((half & _MASK) + 0.5) / _STEPS for half in halves)
    return first, second
