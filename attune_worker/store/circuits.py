"""What does the fleet know of a provider's circuits, and who may change it?

Times are in milliseconds; ``lua/breaker.lua`` has the rules. Every method raises ``ServiceUnavailableError``
when Redis is away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attune_worker.sections import BreakerSettings
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, close_idle, connect, reaching
from attune_worker.store.due import DueJobs
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

BREAKER_AVAILABLE = Script("breaker_available", "values", "breaker")
BREAKER_RECORD = Script("breaker_record", "values", "breaker")
BREAKER_SET = Script("breaker_set", "values", "breaker")
BREAKER_STATUS = Script("breaker_status", "values", "breaker")

MAX_REASON_CHARACTERS = 500

Name = tuple[str, str | None]
"""Provider and tier; without a tier it is the provider's own circuit."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a request for a permit: ``permits`` are (generation, probe) of the circuits asked, in turn.

    When it is refused, ``wait_ms`` says when it is worth asking again and ``reason`` why: open, probing
    (others are finding out) or forced_open; ``place`` is that of the circuit that refuses among those asked.
    """

    allowed: bool
    wait_ms: int
    reason: str
    permits: tuple[tuple[int, bool], ...] = ()
    place: int = 0


def rules_in_ms(rules: BreakerSettings) -> dict[str, Any]:
    """Return the rules as the scripts read them: times in whole ms, and nothing where there is no rule."""
    fields = {
        "failure_threshold": rules.failure_threshold,
        "window_ms": _ms(rules.window_seconds),
        "recovery_ms": _ms(rules.recovery_timeout_seconds),
        "max_open_ms": _ms(rules.max_open_seconds),
        "half_open_calls": rules.half_open_calls,
        "failure_rate": rules.failure_rate_threshold,
        "slow_ms": None if rules.slow_call_seconds is None else _ms(rules.slow_call_seconds),
        "slow_rate": rules.slow_call_rate_threshold,
        "minimum_calls": rules.minimum_calls,
        "lone_worker_opens": rules.lone_worker_opens,
    }
    return {name: value for name, value in fields.items() if value is not None}


class Circuits:
    """The circuits of one namespace."""

    def __init__(self, settings: Settings, rules: BreakerSettings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._keys = FleetKeys(settings.namespace)
        self._rules = json.dumps(rules_in_ms(rules))
        self._redis = redis or connect(settings)
        self._owns_redis = redis is None
        self._due = DueJobs(settings, self._redis)

    def ask(self, names: Sequence[Name], call_id: str, lease_ms: int) -> Grant:
        """Ask the circuits for a permit; a probe's lease, if it is one, is held by ``call_id``."""
        with reaching(self._settings):
            answer = BREAKER_AVAILABLE(
                self._redis, [self._keys.circuit(*name) for name in names], (call_id, lease_ms, self._rules)
            )
        allowed, wait_ms, reason, *permits = answer
        if not allowed:
            return Grant(False, wait_ms, reason.decode(), place=permits[0])
        pairs = zip(permits[::2], permits[1::2], strict=True)
        return Grant(True, wait_ms, reason.decode(), tuple((number, bool(probe)) for number, probe in pairs))

    def record(self, results: Mapping[Name, Mapping[str, Any]]) -> list[str]:
        """Count one call's result in the first circuit, and in the others that it probed; return the transitions."""
        names = list(results)
        keys = [self._keys.circuits, *(self._keys.circuit(*name) for name in names)]
        texts = [json.dumps(result) for result in results.values()]
        with reaching(self._settings):
            events = BREAKER_RECORD(self._redis, keys, (_listed(names[0]), self._rules, *texts))
        return [event.decode() for event in events]

    def reset(self, name: Name, *, by: str = "", reason: str = "") -> None:
        """Close a circuit, and forget its failures and overrides; results of calls before do not count any more."""
        self._set("reset", name, by, reason)

    def open(self, name: Name, for_ms: int, *, by: str = "", reason: str = "") -> None:
        """Open a circuit for a time, after which it is probed as usual."""
        self._set("open", name, by, reason, for_ms)

    def override(self, name: Name, kind: str, for_ms: int = 0, *, by: str = "", reason: str = "") -> None:
        """Lay ``open``, ``disabled`` or ``metrics_only`` over a circuit, for good (0) or a time; ``""`` lifts it."""
        self._set("override", name, by, reason, for_ms, kind)

    def names(self) -> list[Name]:
        """Return the circuits there are, in order."""
        with reaching(self._settings):
            if self._redis.type(self._keys.circuits) != b"set":
                return []
            found = {name for member in self._redis.sscan_iter(self._keys.circuits) for name in _read_name(member)}
        return sorted(found, key=lambda name: (name[0], name[1] or ""))

    def read(self, names: Sequence[Name]) -> dict[Name, dict[str, bytes | int]]:
        """Return how circuits stand, see ``breaker_status.lua``; without those of which nothing is known."""
        calls = [((self._keys.circuit(*name),), (self._rules,)) for name in names]
        with reaching(self._settings):
            answers = BREAKER_STATUS.many(self._redis, calls)
        return {
            name: {key.decode(): value for key, value in zip(answer[::2], answer[1::2], strict=True)}
            for name, answer in zip(names, answers, strict=True)
            if answer
        }

    def hasten_waiting_jobs(self) -> None:
        """Have jobs that wait look again now: a circuit has just been let go, and many wait for one."""
        self._due.hasten()

    def close(self) -> None:
        """Give the connections back, unless they are the caller's."""
        if self._owns_redis:
            close_idle(self._redis)

    def _set(self, action: str, name: Name, by: str, reason: str, for_ms: int = 0, kind: str = "") -> None:
        with reaching(self._settings):
            BREAKER_SET(
                self._redis,
                (self._keys.circuit(*name), self._keys.circuits),
                (action, _listed(name), self._rules, _text(by), _text(reason), for_ms, kind),
            )


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _text(text: str) -> bytes:
    return text[:MAX_REASON_CHARACTERS].encode(errors="replace")


def _listed(name: Name) -> str:
    return json.dumps(name)


def _read_name(member: bytes) -> Iterator[Name]:
    try:
        name = json.loads(member)
    except (ValueError, RecursionError):  # not ours
        return
    match name:
        case [str(provider), str() | None as tier] if provider:
            yield provider, tier
