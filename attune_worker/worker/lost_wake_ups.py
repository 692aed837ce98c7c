"""Which jobs wait for a wake-up that nobody will bring? It is seen from their number, and they get another.

A message can be lost: Celery's transport takes it from Redis before it is noted anywhere, a submitter can die between
a job's record and its message, a queue can be purged. Jobs that stand in line are counted, and so are the messages:
where there are fewer messages than jobs, and it stays so, the difference is lost. A long line alone sends nothing.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from celery import Celery

from attune_worker.settings import Settings
from attune_worker.store.queued import QueuedJobs
from attune_worker.wake_ups import messages_waiting, send_wake_ups

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often is counted."""

WATCH_SECONDS = 5.0
"""The smallest difference in this time is what is lost; a message may be on its way for as long."""

MOST_AT_ONCE = 1000
"""Wake-ups that are sent after one look."""

FORGOTTEN_SECONDS = 3600.0
"""A job that was not woken for so long is woken again whatever the numbers say: other messages may hide it."""

MOST_FORGOTTEN = 20
"""Of these, after one look: with a line of hours they all would be."""


class Deficit:
    """The smallest number by which messages fell short of jobs, in the last ``WATCH_SECONDS``."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def lost(self, now_seconds: float, missing: int) -> int:
        """Note how many messages are missing now, and return how many are lost; 0 until it was watched for long enough.

        ``now_seconds`` only grows. After a pause in the looks it begins anew.
        """
        if self._seen and now_seconds - self._seen[-1][0] > WATCH_SECONDS:
            self._seen.clear()
        self._seen.append((now_seconds, missing))
        if now_seconds - self._seen[0][0] < WATCH_SECONDS:
            return 0
        while len(self._seen) > 1 and now_seconds - self._seen[1][0] >= WATCH_SECONDS:
            self._seen.popleft()
        return max(0, min(missing for _, missing in self._seen))

    def begin_anew(self) -> None:
        """Forget what was seen: wake-ups are on their way."""
        self._seen.clear()


class LostWakeUps:
    """Sends wake-ups again that were lost. It works for whichever worker leads the sweep."""

    def __init__(self, app: Celery, *, clock: Callable[[], float] = time.monotonic) -> None:
        settings: Settings = app.attune_settings
        self._app = app
        self._clock = clock
        self._queued = QueuedJobs(settings)
        self._deficit = Deficit()

    def look(self) -> float:
        """Count, send what is lost, and return for how many seconds to leave it at that.

        Raises ``ServiceUnavailableError`` when Redis or the broker is away.
        """
        queued = self._queued.count()  # first: a job that is submitted in between is no loss
        if not queued:
            self._deficit.begin_anew()
            return LOOK_SECONDS
        missing = queued - messages_waiting(self._app)
        if lost := self._deficit.lost(self._clock(), missing):
            jobs = self._queued.take(WATCH_SECONDS, min(lost, MOST_AT_ONCE))
            send_wake_ups(self._app, jobs)
            if jobs:
                logger.warning("%d wake-ups of jobs were lost and are sent again", len(jobs))
        elif missing <= 0:
            send_wake_ups(self._app, self._queued.take(FORGOTTEN_SECONDS, MOST_FORGOTTEN))
        return LOOK_SECONDS

    def close(self) -> None:
        """Give the connections back."""
        self._queued.close()
