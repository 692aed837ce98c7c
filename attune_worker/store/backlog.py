"""What could not be written to Redis yet? It is kept in memory, and written in order as soon as it can be."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from attune_worker.errors import ServiceUnavailableError
from attune_worker.store.outage import Outage

T = TypeVar("T")

logger = logging.getLogger(__name__)

CAPACITY = 50_000
"""Entries that are kept; whoever adds to it stops before there are more, see ``full``."""

BATCH = 100
"""Entries that are written in one round trip: when an outage ends, a crowd has more to do than to wait for us."""

_TICK_SECONDS = 0.1


class Backlog(Generic[T]):
    """Entries of one process that ``write`` is called with, a batch at a time, until it succeeds.

    It raises ``ServiceUnavailableError`` when it does not, and may see the same entries again. A thread of its own
    does that, started by the first entry and ended with the last.
    """

    def __init__(self, write: Callable[[Sequence[T]], object], outage: Outage) -> None:
        self._write = write
        self._outage = outage
        self._entries: deque[T] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._closing = threading.Event()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether nothing that would need a place here should be begun."""
        return len(self._entries) >= CAPACITY

    def add(self, entry: T) -> None:
        """Keep an entry until it is written."""
        with self._lock:
            if self._process != os.getpid():  # a fork: what the parent keeps, the parent writes
                self._entries.clear()
                self._process, self._thread = os.getpid(), None
            self._entries.append(entry)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._drain, name="attune-backlog", daemon=True)
                self._thread.start()

    def close(self, seconds: float) -> None:
        """Write what is left within ``seconds``, and say how much could not be."""
        self._closing.set()
        thread = self._thread
        if thread is not None and thread.is_alive() and self._process == os.getpid():
            thread.join(seconds)
        if self._entries and self._process == os.getpid():
            logger.error("%d settlements could not be written: Redis is away", len(self._entries))

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
                    logger.warning("settlements are kept until Redis answers: %s", error)
                time.sleep(_TICK_SECONDS)
                continue
            if self._outage.succeeded():
                logger.info("Redis answers again; %d settlements wait to be written", len(self._entries))
            with self._lock:
                for _ in batch:
                    self._entries.popleft()
