"""Is this process still taken for alive? It holds a lease, which a thread of its own renews."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import weakref
from uuid import uuid4

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.store.leases import Leases

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 4
"""How often a lease is renewed: two answers in a row may be late or lost, and it still holds."""

PATIENCE_PER_LEASE = 1 / 8
"""How long an answer is waited for: after an outage JUDGE gives a quarter of a lease to be heard of, by then twice."""

RETRY_SECONDS = 0.25
"""When to try again after an answer that did not come: the lease runs on."""

STOP_SECONDS = 2.0


class Lease:
    """The lease under which one process runs jobs; safe to use from many threads.

    A process that was not heard of for ``recovery.lease_seconds`` is dead to the others, who take over its jobs.
    Should it go on after all, it takes a new lease for the jobs it claims from then on. After a fork the child
    begins without one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seconds = settings.recovery.lease_seconds
        self._begin()
        _leases.add(self)

    def _begin(self) -> None:
        self._leases: Leases | None = None
        self._id = ""
        self._next_id = ""
        self._held_until = -math.inf  # by this process's monotonic clock
        self._renewing = threading.Lock()  # one at a time talks to Redis
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def id(self) -> str:
        """The lease to claim a job under: it holds now, and there is no other of this name.

        Costs no round trip while it holds. Raises ``ServiceUnavailableError`` when it has to be renewed and Redis is
        away.
        """
        if not self.holds(self._id):
            self._renew(unless_held=True)
        return self._id

    def start(self) -> None:
        """Renew the lease from now on, in a thread; may be called again."""
        with self._renewing:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="attune-lease", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Give the lease up, so that nobody has to wait for its end."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        with self._renewing:
            lease, self._id, self._held_until = self._id, "", -math.inf
            if not lease or self._leases is None:
                return
            try:
                self._leases.drop(lease)
                self._leases.close()
            except ServiceUnavailableError as error:
                logger.debug("the lease runs out by itself: %s", error)

    def holds(self, lease_id: str) -> bool:
        """Return whether this is the lease held now, as far as this process can tell by itself."""
        return bool(lease_id) and lease_id == self._id and time.monotonic() < self._held_until

    def _renew(self, *, unless_held: bool = False) -> None:
        with self._renewing:
            if unless_held and self.holds(self._id):
                return
            if self._leases is None:
                self._leases = Leases(_impatient(self._settings))
            asked_at = time.monotonic()  # before the question: Redis' idea of the end is later than ours
            if self._id and self._leases.beat(self._id, self._seconds, again=True):
                self._held_until = asked_at + self._seconds
                return
            if self._id:
                logger.warning("this worker was taken for dead: its jobs go on elsewhere, and it takes a new lease")
                self._id, self._held_until = "", -math.inf
            self._next_id = self._next_id or _new_id()  # the same again, should the answer have been lost
            self._leases.beat(self._next_id, self._seconds, again=False)
            self._held_until = asked_at + self._seconds
            self._id, self._next_id = self._next_id, ""

    def _run(self) -> None:
        complaint = ""
        while True:
            try:
                self._renew()
                complaint = ""
            except ServiceUnavailableError as error:
                if str(error) != complaint:
                    complaint = str(error)
                    logger.warning("this worker's lease is not renewed: %s", error)
            if self._stopping.wait(RETRY_SECONDS if complaint else self._seconds / BEATS_PER_LEASE):
                return


def _impatient(settings: Settings) -> Settings:
    """Return settings in which one answer that does not come leaves time for others before the lease is over."""
    seconds = min(settings.redis_timeout_seconds, settings.recovery.lease_seconds * PATIENCE_PER_LEASE)
    return settings.model_copy(update={"redis_timeout_seconds": seconds})


def _new_id() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


_leases: weakref.WeakSet[Lease] = weakref.WeakSet()


def _after_fork() -> None:
    for lease in _leases:
        lease._begin()  # noqa: SLF001  # the parent's lease, lock and thread are the parent's


os.register_at_fork(after_in_child=_after_fork)
