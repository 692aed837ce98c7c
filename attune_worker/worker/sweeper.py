"""Who wakes jobs that are due? One worker of the fleet at a time, from a thread that runs no jobs itself."""

from __future__ import annotations

import logging
import threading
from functools import cached_property
from uuid import uuid4

from celery import Celery

from attune_worker.errors import ServiceUnavailableError
from attune_worker.store.due import RESEND_SECONDS, DueJobs
from attune_worker.wake_ups import send_wake_ups

logger = logging.getLogger(__name__)

LEASE_SECONDS = 3.0
"""When the worker that sweeps dies, another takes over after at most this long and an idle tick."""

TICK_SECONDS = 0.25
"""How often is looked for jobs that are due while any wait, and so how late a wake-up may be."""

IDLE_SECONDS = 1.0
"""How often when none wait, and how often the other workers look whether they are to sweep."""

STOP_SECONDS = 2.0


class Sweeper:
    """Sends the wake-ups of waiting jobs whose time has come, while this worker leads."""

    def __init__(
        self, app: Celery, *, resend_seconds: float = RESEND_SECONDS, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.worker = uuid4().hex
        self._app = app
        self._resend_seconds = resend_seconds
        self._lease_seconds = lease_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attune-sweeper", daemon=True)
        self._complaint = ""

    def start(self) -> None:
        """Sweep from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and let another worker take over at once."""
        self._stopping.set()
        self._thread.join(STOP_SECONDS)

    def sweep(self) -> float:
        """Send what is due if this worker leads, and return for how many seconds to leave it at that.

        Raises ``ServiceUnavailableError`` when Redis or the broker is away; what was not sent is due again later.
        """
        if not self._due.lead(self.worker, self._lease_seconds):
            return IDLE_SECONDS
        due = self._due.take(self._resend_seconds)
        send_wake_ups(self._app, due.jobs)
        return TICK_SECONDS if due.waiting else IDLE_SECONDS

    @cached_property
    def _due(self) -> DueJobs:
        return DueJobs(self._app.attune_settings)

    def _run(self) -> None:
        pause_seconds = 0.0
        while not self._stopping.wait(pause_seconds):
            try:
                pause_seconds = self.sweep()
                self._complaint = ""
            except ServiceUnavailableError as error:
                pause_seconds = IDLE_SECONDS
                self._complain(f"jobs that are due are not woken: {error}")
            except Exception:  # noqa: BLE001  # the edge: the thread lives as long as its worker, the log tells
                pause_seconds = IDLE_SECONDS
                self._complain("an error of attune-worker's own while jobs that are due were woken", traceback=True)
        try:
            self._due.resign(self.worker)
            self._due.close()
        except ServiceUnavailableError as error:
            logger.debug("the lease runs out by itself: %s", error)

    def _complain(self, complaint: str, *, traceback: bool = False) -> None:
        """Log a complaint, but not the same one again and again."""
        if complaint != self._complaint:
            logger.warning("%s", complaint, exc_info=traceback)
            self._complaint = complaint
