"""Which permits to call are out, and which thread or task asked for them?"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from attune_worker.store.circuits import Grant, Name


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave for one call: the grant of the circuits ``names``, and until when a probe's lease holds (monotonic clock).

    ``local``: it is this process's own, given while Redis was away.
    """

    call_id: str
    grant: Grant
    names: tuple[Name, ...]
    ends: float
    local: bool

    @property
    def probe(self) -> bool:
        """Whether the call finds out if the provider is well again."""
        return any(probe for _, probe in self.grant.permits)


class Permits:
    """The permits that are out; each is gone once used, and with whoever asked for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[object, dict[Name, list[Permit]]] = WeakKeyDictionary()
        self._probes: dict[str, Permit] = {}

    def add(self, permit: Permit) -> None:
        """Remember a permit; only the last one, and probes, of each thread or task and circuit."""
        with self._lock:
            mine = self._of.setdefault(_who_asks(), {})
            now = time.monotonic()
            probes = [earlier for earlier in mine.get(permit.names[0], ()) if earlier.probe and earlier.ends > now]
            mine[permit.names[0]] = [*probes, permit]
            self._probes = {call_id: probe for call_id, probe in self._probes.items() if probe.ends > now}
            if permit.probe:
                self._probes[permit.call_id] = permit

    def take(self, name: Name) -> Permit | None:
        """Return the permit that a result belongs to: the asker's own, else that of any probe, else None."""
        with self._lock:
            mine = self._of.get(_who_asks(), {}).get(name)
            while mine:
                permit = mine.pop()
                if (
                    not permit.probe or self._probes.pop(permit.call_id, None) is not None
                ):  # not yet used by another thread
                    return permit
            now = time.monotonic()
            for call_id, probe in self._probes.items():
                if probe.names[0] == name and probe.ends > now:
                    return self._probes.pop(call_id)
            return None


def _who_asks() -> object:
    with suppress(RuntimeError):  # no event loop runs in this thread
        if (task := asyncio.current_task()) is not None:
            return task
    return threading.current_thread()
