"""Which auth strategy does this process go by now? The one that is kept, read again when it changes."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

from attune_worker.errors import AttuneError, ConfigurationError, ServiceUnavailableError
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.auth_store import Stamp, auth_store
from attune_worker.models.learned_lines import LearnedLines
from attune_worker.settings import Settings, get_settings
from attune_worker.store.outage import Outage

logger = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = {"file": 1.0, "redis": 5.0}

_MAX_KEPT = 16
"""Settings at a time, of which a process has one and tests have many."""


def get_auth_strategy(settings: Settings | None = None) -> AuthStrategy:
    """Return the strategy of this process, the same object until what is kept changes.

    Whether its file has changed is looked at once a second, whether Redis has another every five; in between nothing
    is read. While Redis is away the last known one holds, which is said once. Threads may share it, and child
    processes begin afresh. Raises ``ConfigurationError`` for what cannot be read, until it can, and
    ``ServiceUnavailableError`` while Redis is away and nothing was known before.
    """
    return _current(settings or get_settings()).get()


_UNREAD = b""
"""The stamp of what could not be read; no strategy has it."""


class _Seen(NamedTuple):
    """What the last look has found: a strategy, or why there is none, and the stamp of what was read."""

    strategy: AuthStrategy | None = None
    error: AttuneError | None = None
    stamp: Stamp | None = _UNREAD

    def told(self) -> AuthStrategy:
        if self.error is not None:
            raise copy(self.error)  # an error collects the traceback of each thread that raises it
        assert self.strategy is not None  # noqa: S101  # get has waited for the first look
        return self.strategy


class CurrentStrategy:
    """The strategy that ``settings.auth`` says is kept, and that ``get_auth_strategy`` describes.

    ``clock`` returns seconds that only grow.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        self._store = auth_store(settings)
        self._every_seconds = LOOK_EVERY_SECONDS[self._store.kind]
        self._learned = LearnedLines(settings)
        self._outage = Outage(clock)
        self._lock = threading.Lock()
        self._seen: _Seen | None = None
        self._look_at = 0.0

    def get(self) -> AuthStrategy:
        """Return the strategy that holds now; raises as ``get_auth_strategy`` does."""
        seen = self._seen
        if seen is not None and self._clock() < self._look_at:
            return seen.told()
        # Only the first look is waited for: while one thread asks Redis the others go by what was known.
        if self._lock.acquire(blocking=seen is None):
            try:
                if self._seen is None or self._clock() >= self._look_at:
                    self._seen = self._looked(self._seen)
                    self._look_at = self._clock() + self._every_seconds
            finally:
                self._lock.release()
        return (self._seen or _Seen()).told()

    def _looked(self, before: _Seen | None) -> _Seen:
        if before is not None and not self._outage.worth_trying():
            return before
        try:
            seen = self._read(before)
        except ServiceUnavailableError as error:
            if self._outage.failed(error) and before is not None:
                logger.warning("the auth strategy that was known last holds: %s", error)
            return before or _Seen(error=error)
        if self._outage.succeeded():
            logger.info("the auth strategy can be read again")
        return seen

    def _read(self, before: _Seen | None) -> _Seen:
        stamp: Stamp | None = _UNREAD
        try:
            if before is not None and before.stamp == self._store.stamp():
                return before
            saved = self._store.read()
            stamp = None if saved is None else saved.stamp
            strategy = AuthStrategy() if saved is None else AuthStrategy.from_json(saved.raw, self._store.place)
        except ConfigurationError as error:
            return _Seen(error=error, stamp=stamp)
        return _Seen(strategy.bound(self.settings, self._learned), stamp=stamp)


_kept: dict[int, CurrentStrategy] = {}
_keeping = threading.Lock()


def _current(settings: Settings) -> CurrentStrategy:
    current = _kept.get(id(settings))
    if current is not None:  # it holds its settings, so no others have their id
        return current
    with _keeping:
        if len(_kept) >= _MAX_KEPT:
            _kept.pop(next(iter(_kept)), None)
        return _kept.setdefault(id(settings), CurrentStrategy(settings))


def _after_fork() -> None:
    """Forget, in a child process, locks that only a thread of its parent would open."""
    global _keeping  # noqa: PLW0603  # a lock cannot be opened for somebody else
    _keeping = threading.Lock()
    _kept.clear()


os.register_at_fork(after_in_child=_after_fork)
