"""Who looks after jobs that no worker has in hand? One worker of the fleet at a time, from a thread that runs none."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from uuid import uuid4

from celery import Celery

from attune_worker.errors import ServiceUnavailableError
from attune_worker.store.due import RESEND_SECONDS, DueJobs
from attune_worker.wake_ups import send_wake_ups
from attune_worker.worker.lost_wake_ups import LostWakeUps
from attune_worker.worker.recovery import Recovery

logger = logging.getLogger(__name__)

LEASE_SECONDS = 3.0
"""When the worker that sweeps dies, another takes over after at most this long and an idle tick."""

TICK_SECONDS = 0.25
"""How often is looked for jobs that are due while any wait, and so how late a wake-up may be."""

IDLE_SECONDS = 1.0
"""How often when none wait, and how often the other workers look whether they are to sweep."""

STOP_SECONDS = 2.0


@dataclass(slots=True)
class Duty:
    """Something the leading worker does again and again, a bounded part of it at a time.

    ``do`` returns how many seconds to leave it at that; ``omission`` says what does not happen while it fails.
    """

    omission: str
    do: Callable[[], float]
    next_at: float = 0.0
    complaint: str = ""

    def complain(self, complaint: str, *, traceback: bool = False) -> None:
        """Log a complaint, but not the same one again and again."""
        if complaint != self.complaint:
            logger.warning("%s", complaint, exc_info=traceback)
            self.complaint = complaint

    def fulfil(self) -> None:
        """Do a part of it; what goes wrong is said, and tried again later."""
        pause_seconds = IDLE_SECONDS
        try:
            pause_seconds = self.do()
            self.complaint = ""
        except ServiceUnavailableError as error:
            self.complain(f"{self.omission}: {error}")
        except Exception:  # noqa: BLE001  # the edge: the thread lives as long as its worker, the log tells
            self.complain(f"{self.omission}: an error of attune-worker's own", traceback=True)
        self.next_at = time.monotonic() + pause_seconds


class Sweeper:
    """Sees to it, while this worker leads, that every job has a worker or a wake-up on its way.

    It sends what is due, takes over the jobs of dead workers, and sends lost wake-ups again.
    """

    def __init__(
        self, app: Celery, *, resend_seconds: float = RESEND_SECONDS, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.worker = uuid4().hex
        self._app = app
        self._resend_seconds = resend_seconds
        self._lease_seconds = lease_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attune-sweeper", daemon=True)
        self._leading = Duty(
            "jobs that are due are not woken, and those of dead workers not taken over", self._fulfil_what_is_due
        )

    def start(self) -> None:
        """Sweep from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and let another worker take over at once."""
        self._stopping.set()
        self._thread.join(STOP_SECONDS)

    def sweep(self) -> float:
        """Do what there is to do now if this worker leads, and return for how many seconds to leave it at that.

        What goes wrong in one duty is logged, and the others are done all the same.
        """
        self._leading.fulfil()
        return max(0.0, self._leading.next_at - time.monotonic())

    def _fulfil_what_is_due(self) -> float:
        for duty in self._duties:
            if duty.next_at > time.monotonic():
                continue
            if not self._due.lead(self.worker, self._lease_seconds):  # before each: one may have taken its time
                return IDLE_SECONDS
            duty.fulfil()
        return min(duty.next_at for duty in self._duties) - time.monotonic()

    def _wake_what_is_due(self) -> float:
        due = self._due.take(self._resend_seconds)
        try:
            send_wake_ups(self._app, due.jobs)
        except ServiceUnavailableError:
            self._due.again([job_id for job_id, _ in due.jobs])
            raise
        return TICK_SECONDS if due.waiting else IDLE_SECONDS

    @cached_property
    def _due(self) -> DueJobs:
        return DueJobs(self._app.attune_settings)

    @cached_property
    def _recovery(self) -> Recovery:
        return Recovery(self._app.attune_settings)

    @cached_property
    def _lost_wake_ups(self) -> LostWakeUps:
        return LostWakeUps(self._app)

    @cached_property
    def _duties(self) -> tuple[Duty, ...]:
        return (
            Duty("the jobs of dead workers are not taken over", self._recovery.step),
            Duty("jobs whose time has come are not woken", self._wake_what_is_due),
            Duty("wake-ups that were lost are not sent again", self._lost_wake_ups.look),
            Duty("calls of programs that died are not settled", self._recovery.settle_overdue),
        )

    def _run(self) -> None:
        while not self._stopping.wait(self.sweep()):
            pass
        self._end()

    def _end(self) -> None:
        made = vars(self)
        try:
            if "_due" in made:
                self._due.resign(self.worker)
        except ServiceUnavailableError as error:
            logger.debug("the lead runs out by itself: %s", error)
        for name in ("_due", "_recovery", "_lost_wake_ups"):
            if name in made:
                made[name].close()
