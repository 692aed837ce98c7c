"""Is Redis worth trying now, after it has not answered?"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0


class Outage:
    """What a process remembers of a service that does not answer, so that not every call pays for a timeout.

    After a failure the service is left alone for ``FIRST_WAIT_SECONDS``; then one caller at a time may try,
    and each failed try doubles the wait, up to ``longest_wait_seconds``. Threads may share it. ``clock``
    returns seconds that only grow.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, longest_wait_seconds: float = LONGEST_WAIT_SECONDS
    ) -> None:
        self._longest_wait_seconds = longest_wait_seconds
        self.error: Exception | None = None
        """What went wrong last; None while the service answers."""
        self._clock = clock
        self._lock = threading.Lock()
        self._wait_seconds = FIRST_WAIT_SECONDS
        self._again_at = -math.inf
        self._trying = False

    @property
    def away(self) -> bool:
        """Whether the last that was heard is a failure."""
        return self.error is not None

    def worth_trying(self) -> bool:
        """Return whether the caller should try; while the service is away, this is one caller's turn per wait."""
        if self.error is None:
            return True
        with self._lock:
            now = self._clock()
            if now < self._again_at:
                return False
            self._again_at = now + self._wait_seconds  # a try of which nothing is heard costs one wait
            self._trying = True
            return True

    def failed(self, error: Exception) -> bool:
        """Note a failure; True when it is news. Calls that were under way when the outage began prolong nothing."""
        with self._lock:
            news = self.error is None
            self.error = error
            if news:
                self._wait_seconds = FIRST_WAIT_SECONDS
            elif self._trying:
                self._wait_seconds = min(2 * self._wait_seconds, self._longest_wait_seconds)
            if news or self._trying:
                self._again_at = self._clock() + self._wait_seconds
            self._trying = False
            return news

    def succeeded(self) -> bool:
        """Note an answer; True when it is news."""
        if self.error is None:
            return False
        with self._lock:
            news = self.error is not None
            self.error = None
            self._again_at = -math.inf
            self._trying = False
            return news
