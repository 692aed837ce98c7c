"""How does the end of a job get into its record when Redis is away? It is tried, then kept, and written later."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from attune_worker.errors import ServiceUnavailableError
from attune_worker.models.admission import refused
from attune_worker.store.backlog import Backlog
from attune_worker.store.outage import Outage

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 2.0
"""How long a thread waits for Redis before it leaves the end of its job to others and goes on."""

MAX_KEPT = 1_000
MAX_KEPT_CHARACTERS = 64 * 2**20
"""How many ends are kept, and how long their answers may be together; then threads wait for Redis themselves."""

RETRY_SECONDS = 2.0
"""How often is looked whether Redis is back: somebody waits for these answers."""

PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Kept:
    write: Callable[[], object]
    characters: int
    job_id: str


class Ends:
    """Writes how the starts of one process ended; safe for use from many threads.

    What is written has to be such that it may be written twice.
    """

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS, max_characters: int = MAX_KEPT_CHARACTERS) -> None:
        self._patience_seconds = patience_seconds
        self._max_characters = max_characters
        self._outage = Outage(longest_wait_seconds=RETRY_SECONDS)
        self._kept: Backlog[_Kept] = Backlog(self._write_all, self._outage, "ends of jobs")
        self._lock = threading.Lock()
        self._characters = 0
        self._jobs: Counter[str] = Counter()
        self._closing = threading.Event()
        self._news: SimpleQueue[Callable[[], object] | None] = SimpleQueue()  # None: there will be no more
        self._teller: threading.Thread | None = None

    def write(
        self,
        write: Callable[[], T],
        characters: int = 0,
        then: Callable[[T], object] | None = None,
        *,
        job_id: str = "",
    ) -> T | None:
        """Return what ``write`` returns; None: Redis is away, and it is written when Redis is back.

        ``then`` is told what a later ``write`` returned. While too much is kept already, this waits for Redis;
        ``characters`` is how much ``write`` holds on to, ``job_id`` whose end it is. Raises
        ``ServiceUnavailableError`` when Redis is there and refuses what it is told.
        """
        gives_up = time.monotonic() + self._patience_seconds
        while True:
            if self._outage.worth_trying():
                try:
                    answer = write()
                except ServiceUnavailableError as error:
                    if refused(error):
                        raise
                    if self._outage.failed(error):
                        logger.warning("ends of jobs are kept until Redis answers: %s", error)
                else:
                    self._outage.succeeded()
                    return answer
            if self._closing.is_set() or (time.monotonic() > gives_up and self._room(characters)):
                self.keep(write if then is None else lambda: self._tell(then, write()), characters, job_id)
                return None
            self._closing.wait(PAUSE_SECONDS)

    def keep(self, write: Callable[[], object], characters: int = 0, job_id: str = "") -> None:
        """Have ``write`` called, in another thread, until Redis answers."""
        with self._lock:
            self._characters += characters
            self._jobs[job_id] += 1
        self._kept.add(_Kept(write, characters, job_id))

    def kept(self) -> set[str]:
        """Return the jobs of which something is kept: what their records say of them is not the last word."""
        with self._lock:
            return set(self._jobs)

    def close(self, seconds: float) -> None:
        """Write what is left within ``seconds``, and say how much could not be."""
        gives_up = time.monotonic() + seconds
        self._closing.set()
        self._kept.close(seconds)
        if self._teller is not None:
            self._news.put(None)
            self._teller.join(max(0.0, gives_up - time.monotonic()))

    def hurry(self) -> None:
        """Try again and again from now on: this process ends."""
        self._closing.set()
        self._kept.hurry()

    def _tell(self, then: Callable[[T], object], answer: T) -> None:
        """Have somebody told, in a thread of its own: they may wait for another service, and the ends shall not."""
        self._news.put(partial(then, answer))
        if self._teller is None:
            self._teller = threading.Thread(target=self._tell_all, name="attune-ends-told", daemon=True)
            self._teller.start()

    def _tell_all(self) -> None:
        while (tell := self._news.get()) is not None:
            try:
                tell()
            except Exception:  # the edge: one must not keep the others from hearing
                logger.exception("the end of a job is written, but not everybody could be told")

    def _room(self, characters: int) -> bool:
        return len(self._kept) < MAX_KEPT and self._characters + characters <= self._max_characters

    def _write_all(self, batch: Sequence[_Kept]) -> None:
        for kept in batch:
            try:
                kept.write()
            except ServiceUnavailableError as error:
                if not refused(error):
                    raise
                logger.exception("the end of a job could not be written")  # again would fail again
            except Exception:  # the edge: one end must not hold up the others
                logger.exception("the end of a job could not be written")
        with self._lock:
            self._characters -= sum(kept.characters for kept in batch)
            self._jobs -= Counter(kept.job_id for kept in batch)  # what is at zero is out
