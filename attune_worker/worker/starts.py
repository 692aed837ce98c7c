"""Which jobs run in this process, and how are they stopped? Those that were cancelled, and all when it ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from attune_worker.errors import ServiceUnavailableError, StoppedError
from attune_worker.inbox import Inbox
from attune_worker.interruption import Interruption
from attune_worker.store.records import Records
from attune_worker.worker.liveness import Lease

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""How often is looked whether the lease still is the one that jobs were claimed under."""

RECHECK_SECONDS = 15.0
"""How often all that run are looked at, should the news that one was cancelled have been lost."""

BATCH = 500
"""Most jobs that are looked at in one round trip."""


@dataclass(eq=False, slots=True)
class Start:
    """One start of a job here: under which lease it was claimed, and what stops it."""

    job_id: str
    lease: str = ""
    cancelled: bool = False
    interruption: Interruption = field(default_factory=Interruption)


class Starts:
    """The starts of one process, from any number of threads.

    A worker that cancels nothing and loses no lease pays a few entries in its own memory for each job.
    """

    def __init__(self, records: Records, inbox: Inbox, lease: Lease) -> None:
        self._records = records
        self._inbox = inbox
        self._lease = lease
        self._running: set[Start] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._news: SimpleQueue[str | None] = SimpleQueue()  # None: there will be no more
        self._ended_for = ""

    @contextmanager
    def begin(self, job_id: str) -> Iterator[Start]:
        """Have the start of a job stopped while the context lasts; to be entered before the job is claimed.

        Raises ``StoppedError`` when nothing is to begin here any more.
        """
        start = Start(job_id)
        tell = partial(self._news.put, job_id)
        with self._lock:
            if self._ended_for:
                raise StoppedError(self._ended_for)
            self._running.add(start)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="attune-starts", daemon=True)
                self._thread.start()
        self._inbox.add(job_id, tell)
        try:
            yield start
        finally:
            self._inbox.remove(job_id, tell)
            with self._lock:
                self._running.discard(start)

    @property
    def ending(self) -> bool:
        """Whether nothing is to begin here any more."""
        return bool(self._ended_for)

    def wind_down(self, reason: str) -> None:
        """Begin nothing more: jobs that wait are stopped, calls under way go on."""
        self._end(reason, Interruption.wind_down)

    def stop(self, reason: str) -> None:
        """Stop everything at once, and begin nothing more."""
        self._end(reason, Interruption.stop)

    def close(self) -> None:
        """End the thread that listens."""
        self._news.put(None)

    def _end(self, reason: str, how: Callable[[Interruption, str], None]) -> None:
        with self._lock:
            self._ended_for = self._ended_for or reason
            running = tuple(self._running)
        for start in running:
            how(start.interruption, reason)

    def _watch(self) -> None:
        told: set[str] = set()
        looked_at = time.monotonic()
        while True:
            heard = self._hear()
            if None in heard:
                return
            told |= {job_id for job_id in heard if job_id is not None}
            with self._lock:
                running = tuple(self._running)
            if time.monotonic() - looked_at > RECHECK_SECONDS:
                told, looked_at = {start.job_id for start in running}, time.monotonic()
            try:
                self._stop_cancelled(running, told)
                told = set()
                self._stop_lost(running)
            except ServiceUnavailableError as error:  # what was told is looked at again
                logger.debug("which jobs were cancelled is not known now: %s", error)
            except Exception:  # the edge: the thread lives as long as its worker, the log tells
                told = set()
                logger.exception("an error of attune-worker's own while jobs were to be cancelled")

    def _hear(self) -> list[str | None]:
        """Return the jobs to look at, after a moment at most."""
        try:
            heard = [self._news.get(timeout=TICK_SECONDS)]
        except Empty:
            return []
        while len(heard) < BATCH and not self._news.empty():
            heard.append(self._news.get())
        return heard

    def _stop_cancelled(self, running: Sequence[Start], told: set[str]) -> None:
        here = sorted({start.job_id for start in running} & told)
        for first in range(0, len(here), BATCH):
            marked = self._records.cancelled(here[first : first + BATCH])
            for start in running:
                if start.job_id in marked:
                    start.cancelled = True
                    start.interruption.stop("cancelled")

    def _stop_lost(self, running: Sequence[Start]) -> None:
        """Begin no further calls for jobs that were claimed under a lease that is gone: others have them, or will."""
        if not running:
            return
        lease = self._lease.id
        for start in running:
            if start.lease not in ("", lease):
                start.interruption.wind_down("its worker's lease was lost")
