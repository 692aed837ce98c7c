"""How does a decision know what the fleet knows without asking Redis? From memory, which a thread keeps fresh."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence

from attune_worker.errors import ServiceUnavailableError
from attune_worker.telemetry.store import Telemetry
from attune_worker.telemetry.views import StageView

logger = logging.getLogger(__name__)

IN_USE_SECONDS = 300.0
"""A stage that nobody asked about for so long is forgotten here, and loaded again when it is needed."""

MAX_STAGES = 1000
_STAGES_AT_ONCE = 50

Place = tuple[str, str]


class Snapshot:
    """The views of the stages in use, at most ``refresh_seconds`` old while Redis can be reached.

    Safe for use from many threads, and after a fork.
    """

    def __init__(self, telemetry: Telemetry, refresh_seconds: float) -> None:
        self._telemetry = telemetry
        self._refresh_seconds = refresh_seconds
        self._closed = threading.Event()
        self._start_afresh()
        _snapshots.add(self)

    def _start_afresh(self) -> None:
        self._views: dict[Place, StageView] = {}
        self._used: dict[Place, float] = {}
        self._loading = threading.Lock()
        self._thread: threading.Thread | None = None
        self._away_until = 0.0

    def view(self, workflow: str, stage: str) -> StageView:
        """Return what is known of a stage: at once, except for the first time, when Redis is asked.

        While Redis is away an unknown stage has an empty view, until a refresh succeeds.
        """
        place = workflow, stage
        self._used[place] = time.monotonic()
        view = self._views.get(place)
        return view if view is not None else self._load(place)

    def refresh(self) -> None:
        """Read the views of all stages in use again; raises ``ServiceUnavailableError`` when Redis is away."""
        self._forget_unused()
        places = list(self._views)
        for at in range(0, len(places), _STAGES_AT_ONCE):
            some = places[at : at + _STAGES_AT_ONCE]
            self._views.update(zip(some, self._telemetry.views(some), strict=True))

    def close(self) -> None:
        """End the thread; what is in memory can still be read."""
        self._closed.set()

    def _load(self, place: Place) -> StageView:
        with self._loading:
            view = self._views.get(place)
            if view is None:
                view = self._views[place] = self._asked(place)
                self._make_room()
                self._keep_fresh()
            return view

    def _asked(self, place: Place) -> StageView:
        if time.monotonic() >= self._away_until:
            try:
                return self._telemetry.view(*place)
            except ServiceUnavailableError as error:
                self._away_until = time.monotonic() + max(self._refresh_seconds, 1.0)
                logger.warning("models are chosen without what the fleet has learned: %s", error)
        return StageView()

    def _make_room(self) -> None:
        excess = len(self._views) - MAX_STAGES
        if excess > 0:
            self._drop(sorted(self._views, key=lambda place: self._used.get(place, 0.0))[:excess])

    def _forget_unused(self) -> None:
        before = time.monotonic() - IN_USE_SECONDS
        self._drop([place for place, used in list(self._used.items()) if used < before])

    def _drop(self, places: Sequence[Place]) -> None:
        for place in places:
            self._views.pop(place, None)
            self._used.pop(place, None)

    def _keep_fresh(self) -> None:
        if self._thread is None and not self._closed.is_set():
            arguments = (weakref.ref(self), self._closed, self._refresh_seconds)
            self._thread = threading.Thread(target=_refresh, args=arguments, name="attune-snapshot", daemon=True)
            self._thread.start()

    def after_fork(self) -> None:
        """Forget, in a child process, the thread and the lock that only its parent has."""
        self._start_afresh()


def _refresh(reference: weakref.ref[Snapshot], closed: threading.Event, every_seconds: float) -> None:
    """Keep a snapshot fresh until it is closed or nobody has it any more."""
    reached = True
    while not closed.wait(every_seconds):
        snapshot = reference()
        if snapshot is None:
            return
        try:
            snapshot.refresh()
            reached = True
        except ServiceUnavailableError as error:
            if reached:
                logger.warning("models are chosen by what was known before: %s", error)
            reached = False
        del snapshot


_snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()


def _after_fork() -> None:
    for snapshot in _snapshots:
        snapshot.after_fork()


os.register_at_fork(after_in_child=_after_fork)
