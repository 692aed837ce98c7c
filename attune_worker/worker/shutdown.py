"""How does a worker end? It begins nothing more, gives its calls some time, and hands back what is left."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

logger = logging.getLogger(__name__)


class Shutdown:
    """Ends the jobs of one process in a thread of its own, once somebody has asked for it."""

    def __init__(
        self, grace_seconds: float | None, wind_down: Callable[[], object], hand_back: Callable[[], object]
    ) -> None:
        """``wind_down`` is called at once, ``hand_back`` after ``grace_seconds`` or at the second request.

        None: there is no end to the patience.
        """
        self._grace_seconds = grace_seconds
        self._wind_down = wind_down
        self._hand_back = hand_back
        self._requests: SimpleQueue[bool] = SimpleQueue()
        self.requested = False
        self._thread = threading.Thread(target=self._run, name="attune-shutdown", daemon=True)

    def start(self) -> None:
        """Wait for a request, in a thread."""
        self._thread.start()

    def request(self, *, at_once: bool = False) -> None:
        """Ask for the end, or again for a quicker one. A signal handler may: it takes no lock."""
        self.requested = True
        self._requests.put(at_once)

    def _run(self) -> None:
        at_once = self._requests.get()
        self._wind_down()
        if not at_once:
            try:
                self._requests.get(timeout=self._grace_seconds)
            except Empty:
                logger.info("the time for this shutdown is up: jobs that still run are handed back")
        self._hand_back()
