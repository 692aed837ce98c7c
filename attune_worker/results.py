"""How does a caller wait until a job has ended? Blocking, awaiting, or for many jobs at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from queue import Empty, Queue
from typing import Protocol, Self, TypeVar

from attune_worker.errors import JobNotFoundError, ResultTimeoutError
from attune_worker.inbox import Inbox
from attune_worker.jobs import JobStatus
from attune_worker.store.records import WAITER_SECONDS, Record, Records

T = TypeVar("T")

RECHECK_SECONDS = 30.0
"""A waiting caller looks again after this long even if it was told nothing, should a message be lost."""

RENEW_SECONDS = WAITER_SECONDS / 2
"""Who waits for many jobs looks at all of them this often, also while others end: a waiter's name is forgotten."""

BATCH = 500
"""Most jobs that are looked at in one round trip."""


class Caller(Protocol):
    """Runs a blocking function for a coroutine, in some thread."""

    async def __call__(self, function: Callable[[], T], ends: float | None) -> T:
        """Return what ``function`` returns; not much later than ``ends``, by the loop's clock, raise instead.

        ``TimeoutError`` says that there was no thread for it in time.
        """
        ...


def wait_for(records: Records, inbox: Inbox, job_id: str, timeout_seconds: float | None) -> Record:
    """Wait in this thread until the job has ended, and return its record.

    Raises ``JobNotFoundError`` for an unknown job, ``ResultTimeoutError`` when the time is up.
    """
    ends = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    told = threading.Event()
    inbox.add(job_id, told.set)
    try:
        while True:
            told.clear()
            [record] = records.watch([job_id], inbox.ready())
            if record.status is JobStatus.UNKNOWN:
                raise JobNotFoundError(job_id)
            if record.status.ended:
                return record
            left = RECHECK_SECONDS if ends is None else ends - time.monotonic()
            if left <= 0:
                raise ResultTimeoutError(job_id, timeout_seconds or 0)
            told.wait(min(left, RECHECK_SECONDS))
    finally:
        inbox.remove(job_id, told.set)


async def await_for(
    records: Records,
    inbox: Inbox,
    job_id: str,
    timeout_seconds: float | None,
    call: Caller,
) -> Record:
    """Wait as ``wait_for`` does, without blocking the event loop: ``call`` runs a round trip in a thread."""
    loop = asyncio.get_running_loop()
    ends = None if timeout_seconds is None else loop.time() + max(0.0, timeout_seconds)
    told = asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(told.set)

    inbox.add(job_id, tell)
    try:
        while True:
            told.clear()
            try:
                [record] = await call(lambda: records.watch([job_id], inbox.ready()), ends)
            except TimeoutError:
                raise ResultTimeoutError(job_id, timeout_seconds or 0) from None
            if record.status is JobStatus.UNKNOWN:
                raise JobNotFoundError(job_id)
            if record.status.ended:
                return record
            left = RECHECK_SECONDS if ends is None else ends - loop.time()
            if left <= 0:
                raise ResultTimeoutError(job_id, timeout_seconds or 0)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, RECHECK_SECONDS)):
                    await told.wait()
    finally:
        inbox.remove(job_id, tell)


class Gathering:
    """Waits for many jobs at once, to which more can be added; used as a context."""

    def __init__(self, records: Records, inbox: Inbox) -> None:
        self._records = records
        self._inbox = inbox
        self._told: Queue[str] = Queue()
        self._callbacks: dict[str, Callable[[], None]] = {}
        self._look_at: list[str] = []
        self._heard = self._looked = time.monotonic()

    @property
    def waiting(self) -> int:
        """How many jobs have not ended yet."""
        return len(self._callbacks)

    def add(self, job_ids: Iterable[str]) -> None:
        """Wait for these jobs too."""
        for job_id in job_ids:
            if job_id not in self._callbacks:
                self._callbacks[job_id] = partial(self._told.put, job_id)
                self._inbox.add(job_id, self._callbacks[job_id])
                self._look_at.append(job_id)

    def ended(self, timeout_seconds: float | None = None) -> list[Record]:
        """Wait until at least one job has ended, and return the records of those that have.

        The record of an unknown job is returned as such. Raises ``ResultTimeoutError`` when none has
        ended for ``timeout_seconds``: all are looked at then, as of some ends nothing may have been heard.
        """
        while self._callbacks:
            patience = RECHECK_SECONDS if timeout_seconds is None else timeout_seconds
            if records := self.ended_within(patience):
                return records
            if timeout_seconds is not None:
                self._look_at = self._all()
                if records := self._look():
                    return records
                raise ResultTimeoutError(next(iter(self._callbacks)), timeout_seconds)
        return []

    def ended_within(self, seconds: float) -> list[Record]:
        """Return the records of jobs that have ended, as far as was heard; wait up to ``seconds`` for the first."""
        ends = time.monotonic() + seconds
        while self._callbacks:
            if records := self._look():
                return records
            left = ends - time.monotonic()
            if left <= 0:
                break
            self._look_at = self._hear(left)
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for job_id in list(self._callbacks):
            self._forget(job_id)

    def _look(self) -> list[Record]:
        found: list[Record] = []
        for start in range(0, len(self._look_at), BATCH):
            batch = [job_id for job_id in self._look_at[start : start + BATCH] if job_id in self._callbacks]
            seen = self._records.watch(batch, self._inbox.ready())
            found += [record for record in seen if record.status.ended or record.status is JobStatus.UNKNOWN]
        for record in found:  # not before: if Redis goes away between two batches, both are looked at again
            self._forget(record.job_id)
        self._look_at = []
        return found

    def _hear(self, patience_seconds: float) -> list[str]:
        """Return the jobs to look at: those we were told of, or all after a long silence or a long time."""
        try:
            told = {self._told.get(timeout=min(patience_seconds, RECHECK_SECONDS))}
        except Empty:
            return self._all() if time.monotonic() - self._heard >= RECHECK_SECONDS else []
        self._heard = time.monotonic()
        if self._heard - self._looked >= RENEW_SECONDS:
            return self._all()
        while not self._told.empty() and len(told) < BATCH:
            told.add(self._told.get_nowait())
        return list(told)

    def _all(self) -> list[str]:
        self._heard = self._looked = time.monotonic()
        return list(self._callbacks)

    def _forget(self, job_id: str) -> None:
        self._inbox.remove(job_id, self._callbacks.pop(job_id))
