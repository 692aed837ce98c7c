"""How is a job broken off from another thread, in the middle of a call or a wait?"""

from __future__ import annotations

import threading
from collections.abc import Callable

from attune_worker.errors import StoppedError


class Interruption:
    """Stops one start of a job: once ``stop`` was called, waits end, calls are cut off, and no other is begun.

    Made before the job starts and dropped after it; safe to use from many threads.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._cut: Callable[[], object] | None = None
        self.reason = ""

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped.is_set()

    def stop(self, reason: str) -> None:
        """Stop the job; the first reason given is the one that stands. Returns at once."""
        with self._lock:
            if self._stopped.is_set():
                return
            self.reason = reason
            self._stopped.set()
            if self._cut is not None:
                self._cut()

    def wait(self, seconds: float) -> bool:
        """Let that much time pass, or less: return whether the job was stopped."""
        return self._stopped.wait(seconds)

    def cut_with(self, cut: Callable[[], object] | None) -> None:
        """Have ``cut`` called in the thread that stops the job, or at once if it was stopped already.

        None: there is nothing to cut off any more. A ``cut`` that has begun ends before this returns, so it never
        hits what comes after.
        """
        with self._lock:
            self._cut = cut
            if cut is not None and self._stopped.is_set():
                cut()

    def error(self) -> StoppedError:
        """Return the error that says why the job was stopped."""
        return StoppedError(self.reason or "stopped")
