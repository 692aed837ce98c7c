"""How long do calls take, kept in a few counters?

The buckets' bounds grow by the square root of 2, so that from 25 ms up to 9.7 minutes a percentile read from
them is at most 41 % too high. ``store/lua/telemetry.lua`` counts into the same buckets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

FIRST_BOUND_MS = 25.0
LAST = 30
"""Number of the last bucket, which holds everything over 9.7 minutes."""


def bound_ms(bucket: int) -> float:
    """Return the longest latency that the bucket holds; the last one holds longer ones too."""
    return FIRST_BOUND_MS * math.pow(2.0, bucket / 2)


def bucket_of(latency_ms: float) -> int:
    """Return the bucket, 0 to ``LAST``, that a latency is counted in.

    This is the reference for the arithmetic in ``store/lua/telemetry.lua``, which does the counting.
    """
    doublings = math.log(max(latency_ms, FIRST_BOUND_MS) / FIRST_BOUND_MS) / math.log(2)
    return min(math.ceil(2 * doublings - 1e-9), LAST)


def percentile_ms(counts: Mapping[int, int], share: float) -> int | None:
    """Return the latency that ``share`` (0 to 1) of the calls did not pass; None: there were none.

    ``counts`` maps buckets to calls. Within a bucket the calls are taken to lie evenly between its bounds.
    """
    total = sum(counts.values())
    rank = share * total
    for bucket in sorted(counts):
        count = counts[bucket]
        if count and rank <= count:
            below = bound_ms(bucket - 1) if bucket else 0.0
            return round(below + (bound_ms(bucket) - below) * rank / count)
        rank -= count
    return round(bound_ms(max(counts))) if total else None
