"""Which jobs run in this process, and how are they stopped? Those that were cancelled, and all when it ends."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue

from attune_worker.errors import ServiceUnavailableError, StoppedError
from attune_worker.inbox import Inbox
from attune_worker.interruption import Interruption
from attune_worker.jobs import Attempt
from attune_worker.store.records import Records
from attune_worker.worker.liveness import Lease
from attune_worker.worker.recovery import history

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""How often is looked whether the lease still is the one that jobs were claimed under."""

RECHECK_SECONDS = 15.0
"""How often all that run are looked at, should the news that one was cancelled have been lost."""

BATCH = 500
"""Most jobs that are looked at in one round trip."""

STRAY_SECONDS = 60.0
"""How often, about, all running jobs are gone through for those that stand as run here and are not."""

STRAY_READS = 100.0
"""Most running jobs a second that are read for that on average: where there are more, it is done less often."""

STRAY = "its worker does not run it"
"""Why a job waits that was handed back so."""

CLOSE_SECONDS = 1.0
"""How long the end of a process may be put off by what the thread is at."""


@dataclass(eq=False, slots=True)
class Start:
    """One start of a job here: under which lease it was claimed, and what stops it."""

    job_id: str
    lease: str = ""
    cancelled: bool = False
    interruption: Interruption = field(default_factory=Interruption)


class Starts:
    """The starts of one process, from any number of threads.

    A worker that cancels nothing and loses no lease pays a few entries in its own memory for each job. Jobs that stand
    as run by this process and are not are handed back; ``kept`` names those whose ends are still to be written, and
    ``calls`` tells of the calls of a job under a lease.
    """

    def __init__(
        self,
        records: Records,
        inbox: Inbox,
        lease: Lease,
        *,
        kept: Callable[[], set[str]],
        calls: Callable[[str, str], Sequence[Attempt]],
        stray_seconds: float = STRAY_SECONDS,
    ) -> None:
        self._records = records
        self._kept = kept
        self._strays = _Strays(records, lease, self._here, calls, stray_seconds)
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
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _here(self) -> set[str]:
        """Return the jobs that run here or whose ends are kept here."""
        with self._lock:  # these before the kept ones: a start goes from here to there
            here = {start.job_id for start in self._running}
        return here | self._kept()

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
                if not self._ended_for:
                    self._strays.step()
            except ServiceUnavailableError as error:  # what was told is looked at again
                logger.debug("which jobs were cancelled or run elsewhere is not known now: %s", error)
            except Exception:  # the edge: the thread lives as long as its worker, the log tells
                told = set()
                logger.exception("an error of attune-worker's own while jobs were to be cancelled or handed back")

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


class _Strays:
    """Hands back jobs that stand as run under this process's lease, though no thread of it runs them.

    Such are left by a CLAIM that was held up on its way until nobody waited for its answer, and by an end that Redis
    refused. As long as this process lives, nobody else would take them. It is used by one thread.
    """

    def __init__(
        self,
        records: Records,
        lease: Lease,
        here: Callable[[], set[str]],
        calls: Callable[[str, str], Sequence[Attempt]],
        seconds: float,
    ) -> None:
        self._records = records
        self._lease = lease
        self._here = here
        self._calls = calls
        self._seconds = seconds
        self._look: Iterator[tuple[str, str]] | None = None
        self._under = ""
        self._read = 0
        self._found: set[str] = set()
        self._suspects: set[str] = set()  # of the look before
        self._look_at = self._later(seconds)

    def step(self) -> None:
        """Look at some of the running jobs, if it is time to; what is found in two looks in a row is handed back."""
        look, self._look = self._look, None  # an error ends it
        if look is None:
            if time.monotonic() < self._look_at:
                return
            self._look_at = self._later(self._seconds)
            look, self._under, self._read, self._found = self._records.running(), self._lease.id, 0, set()
        part = list(islice(look, BATCH))
        here = self._here()
        self._found |= {job_id for job_id, lease in part if lease == self._under and job_id not in here}
        self._read += len(part)
        if part:
            self._look = look
            return
        strays, self._suspects = sorted(self._found & self._suspects), self._found
        pause = min(RECHECK_SECONDS, self._seconds) if self._found else self._seconds
        self._look_at = self._later(max(pause, self._read / STRAY_READS))
        for first in range(0, len(strays), BATCH):
            self._hand_back(strays[first : first + BATCH])

    def _hand_back(self, job_ids: Sequence[str]) -> None:
        fences = self._records.fences(job_ids, self._under)
        here = self._here()  # after it: the start that got this fence was here before the fence was given out
        for job_id, fence in fences.items():
            if job_id in here:
                continue
            attempts = history(self._records.read([job_id])[0].progress, self._calls(job_id, self._under))
            if self._records.put_back(job_id, fence, 0, STRAY, attempts):
                logger.warning("job %s stood as run by this worker, which does not run it; it was put back", job_id)

    def _later(self, seconds: float) -> float:
        """Return a time about so many seconds from now: workers that began together shall not look together."""
        return time.monotonic() + seconds * random.uniform(0.5, 1.5)  # noqa: S311  # spreads load, hides nothing
