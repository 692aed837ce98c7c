"""What could not be written to Redis yet? It is kept in memory, and written in order as soon as it can be."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

from attune_worker.errors import ServiceUnavailableError
from attune_worker.store.outage import Outage

T = TypeVar("T")

logger = logging.getLogger(__name__)

CAPACITY = 50_000
"""Entries that are kept; whoever adds to it stops before there are more, see ``full``."""

BATCH = 100
"""Entries that are written in one round trip: when an outage ends, a crowd has more to do than to wait for us."""

EXIT_SECONDS = 5.0
"""How long the end of a process may be put off by entries that nobody has waited for."""

_TICK_SECONDS = 0.1


class Backlog(Generic[T]):
    """Entries of one process that ``write`` is called with, a batch at a time, until it succeeds.

    It raises ``ServiceUnavailableError`` when it does not, and may see the same entries again. A thread of its own
    does that, started by the first entry and ended with the last. A process that ends waits for it for a while.
    """

    def __init__(self, write: Callable[[Sequence[T]], object], outage: Outage, what: str = "settlements") -> None:
        """``what`` the entries are, for the log."""
        self._write = write
        self._outage = outage
        self._what = what
        self.closed = False
        """Whether somebody has seen to it that what is left is written."""
        self.begin()
        _backlogs.add(self)

    def begin(self) -> None:
        """Begin with nothing, as a child process does: what its parent keeps, the parent writes."""
        self._entries: deque[T] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._gives_up_at = math.inf

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether nothing that would need a place here should be begun."""
        return len(self._entries) >= CAPACITY

    def add(self, entry: T) -> None:
        """Keep an entry until it is written."""
        with self._lock:
            self._entries.append(entry)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._drain, name="attune-backlog", daemon=True)
                self._thread.start()

    def close(self, seconds: float) -> None:
        """Write what is left within ``seconds``, and say how much could not be."""
        self.closed = True
        self._gives_up_at = time.monotonic() + seconds
        self.hurry()
        if (thread := self._thread) is not None:
            thread.join(seconds)
        if self._entries:
            logger.error("%d %s could not be written: Redis is away", len(self._entries), self._what)

    def hurry(self) -> None:
        """Try again and again from now on, whatever is known of the outage: there may be no other chance."""
        self._closing.set()

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._entries:
                    self._thread = None
                    return
                batch = list(islice(self._entries, BATCH))
            if not (self._closing.is_set() or self._outage.worth_trying()):
                time.sleep(_TICK_SECONDS)
                continue
            try:
                self._write(batch)
            except ServiceUnavailableError as error:
                if self._outage.failed(error):
                    logger.warning("%s are kept until Redis answers: %s", self._what, error)
                if time.monotonic() > self._gives_up_at:
                    return
                time.sleep(_TICK_SECONDS)
                continue
            if self._outage.succeeded():
                logger.info("Redis answers again; %d %s wait to be written", len(self._entries), self._what)
            with self._lock:
                for _ in batch:
                    self._entries.popleft()


_backlogs: weakref.WeakSet[Backlog[Any]] = weakref.WeakSet()
"""All there are; one with entries is kept alive by its thread."""


def _close_all() -> None:
    ends = time.monotonic() + EXIT_SECONDS
    left = [backlog for backlog in _backlogs if not backlog.closed]
    for backlog in left:
        backlog.hurry()
    for backlog in left:
        backlog.close(max(0.0, ends - time.monotonic()))


def _after_fork() -> None:
    for backlog in _backlogs:
        backlog.begin()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
