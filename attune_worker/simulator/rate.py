"""May another request pass within the limit per minute, and if not, when?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SECONDS_PER_MINUTE = 60.0


class Allowance(NamedTuple):
    """What a caller learns about its limit. ``wait_seconds`` is 0 when the request passed."""

    limit: int
    remaining: int
    reset_seconds: float
    wait_seconds: float


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds one minute's requests and refills evenly, as Anthropic and OpenAI document theirs."""

    limit: int
    level: float
    filled_at: float

    @classmethod
    def full(cls, limit: int, now: float) -> Bucket:
        """Return a bucket that nothing has been taken from."""
        return cls(limit, float(limit), now)

    def take(self, now: float) -> Allowance:
        """Take one request at time ``now`` (seconds), if there is one."""
        per_second = self.limit / SECONDS_PER_MINUTE
        self.level = min(float(self.limit), self.level + max(0.0, now - self.filled_at) * per_second)
        self.filled_at = max(now, self.filled_at)
        wait = 0.0 if self.level >= 1 else (1 - self.level) / per_second
        if not wait:
            self.level -= 1
        return Allowance(self.limit, int(self.level), (self.limit - self.level) / per_second, wait)
