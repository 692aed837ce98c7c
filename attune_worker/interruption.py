"""How is a job broken off from another thread, in the middle of a call or a wait?"""

from __future__ import annotations

import threading
from collections.abc import Callable

from attune_worker.errors import StoppedError


class Interruption:
    """Stops one start of a job, in one of two ways: with what it does just now, or right through it.

    Made before the job starts and dropped after it; safe to use from many threads.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._cut: Callable[[], object] | None = None
        self._entitled: Callable[[], bool] = _always
        self._without = ""
        self.cut_off = False
        """Whether a call under way is broken off as well."""
        self.reason = ""

    @property
    def stopped(self) -> bool:
        """Whether no further call is to be made, and no wait begun."""
        return self._stopped.is_set()

    def wind_down(self, reason: str) -> None:
        """Have the job end its wait, or its call, and begin nothing after it. Returns at once."""
        with self._lock:
            self._give(reason)

    def stop(self, reason: str) -> None:
        """Stop the job at once, cutting off a call under way. Returns at once."""
        with self._lock:
            if self.cut_off:
                return
            self._give(reason)
            self.cut_off = True
            if self._cut is not None:
                self._cut()

    def only_while(self, entitled: Callable[[], bool], reason: str) -> None:
        """Have a call begin only while ``entitled`` says so; else the job winds down for ``reason``.

        It is asked just before each call, so it must not wait for anything.
        """
        with self._lock:
            self._entitled, self._without = entitled, reason

    def may_begin(self) -> bool:
        """Return whether a call may begin now: from here on nothing but time is between the answer and the call."""
        with self._lock:
            if not self._entitled():
                self._give(self._without)
        return not self.stopped

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
            if cut is not None and self.cut_off:
                cut()

    def error(self) -> StoppedError:
        """Return the error that says why the job was stopped; of several reasons, the first."""
        return StoppedError(self.reason or "stopped")

    def _give(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._stopped.set()


def _always() -> bool:
    return True
