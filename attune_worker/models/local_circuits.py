"""May a call be made, going by what this process alone has seen? For as long as Redis is away.

The rules are those of ``store/lua/breaker.lua``, without overrides, which only the fleet knows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attune_worker.sections import BreakerSettings
from attune_worker.store.circuits import Grant, Name, rules_in_ms

MAX_CIRCUITS = 1000
DAY_MS = 86_400_000
BUCKETS = 10
OTHERS_MS = 30_000
"""Others succeed if one of them did so within this time; as in ``breaker.lua``."""


@dataclass(slots=True)
class _Bucket:
    """A tenth of the window; ``trouble``: the workers whose calls failed or were slow."""

    start: int
    calls: int = 0
    failures: int = 0
    slow: int = 0
    trouble: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Circuit:
    state: str = "closed"
    generation: int = 0
    retry_ms: int = 0
    reopens: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    leases: dict[str, int] = field(default_factory=dict)
    successes: dict[str, int] = field(default_factory=dict)
    buckets: dict[int, _Bucket] = field(default_factory=dict)

    def become(self, state: str, now: int) -> None:
        """Change the state; every result of before is void."""
        self.state = state
        self.generation = max(self.generation + 1, now)
        self.leases, self.buckets = {}, {}

    def live_leases(self, now: int) -> dict[str, int]:
        """Return the probes under way, with the ends of their leases."""
        return {call: ends for call, ends in self.leases.items() if ends > now}


class LocalCircuits:
    """Circuits in memory, asked and told like ``store.circuits.Circuits``; ``clock`` returns seconds."""

    def __init__(self, rules: BreakerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules = rules_in_ms(rules)
        self._clock = clock
        self._lock = threading.Lock()
        self._circuits: dict[Name, _Circuit] = {}

    def ask(self, names: Sequence[Name], call_id: str, lease_ms: int) -> Grant:
        """Ask the circuits for a permit; a probe's lease, if it is one, is held by ``call_id``."""
        with self._lock:
            now = self._now()
            circuits = [self._circuit(name) for name in names]
            for place, circuit in enumerate(circuits):
                if refusal := self._refusal(circuit, call_id, now):
                    return replace(refusal, place=place)
            return Grant(True, 0, "", tuple(_take(circuit, call_id, lease_ms, now) for circuit in circuits))

    def record(self, results: Mapping[Name, Mapping[str, Any]]) -> list[str]:
        """Count one call's result in each circuit, and return the transitions, ``""`` where there is none."""
        with self._lock:
            now = self._now()
            return [self._settle(self._circuit(name), result, now) for name, result in results.items()]

    def adopt(self, name: Name, grant: Grant) -> None:
        """Take over what the fleet says of a circuit, so that this process goes on from there when Redis is away."""
        with self._lock:
            circuit = self._circuits.get(name)
            if grant.allowed:
                if circuit is not None and circuit.state != "closed":
                    self._circuits[name] = _Circuit()
            else:
                circuit = self._circuit(name)
                now = self._now()
                circuit.become("open", now)
                circuit.retry_ms = now + grant.wait_ms

    def forget(self, name: Name) -> None:
        """Forget a circuit: it is closed."""
        with self._lock:
            self._circuits.pop(name, None)

    def _now(self) -> int:
        return round(self._clock() * 1000)

    def _circuit(self, name: Name) -> _Circuit:
        if name not in self._circuits and len(self._circuits) >= MAX_CIRCUITS:
            del self._circuits[next(iter(self._circuits))]
        return self._circuits.setdefault(name, _Circuit())

    def _refusal(self, circuit: _Circuit, call_id: str, now: int) -> Grant | None:
        if circuit.state == "closed":
            return None
        if circuit.state == "open":
            return Grant(False, circuit.retry_ms - now, "open") if now < circuit.retry_ms else None
        leases = circuit.live_leases(now)
        if call_id in leases or len(leases) < self._rules["half_open_calls"]:
            return None
        return Grant(False, min(leases.values()) - now, "probing")

    def _settle(self, circuit: _Circuit, result: Mapping[str, Any], now: int) -> str:
        generation, outcome = result.get("generation"), result["outcome"]
        if generation is not None and generation != circuit.generation:
            return ""
        slow = "slow_rate" in self._rules and (result.get("latency_ms") or 0) > self._rules.get("slow_ms", DAY_MS)
        if circuit.state == "closed":
            opens = outcome != "ignored" and self._count(circuit, result, slow, now)
            return self._open(circuit, result, 0, now) if opens else ""
        if generation is None or result["call"] not in circuit.live_leases(now):
            return ""
        if outcome == "ignored":
            del circuit.leases[result["call"]]
            return ""
        if outcome == "failure" or slow:
            return self._open(circuit, result, circuit.reopens + 1, now)
        circuit.become("closed", now)
        circuit.reopens, circuit.failures = 0, []
        _succeed(circuit, result.get("worker") or "", now)
        return "closed"

    def _open(self, circuit: _Circuit, result: Mapping[str, Any], reopens: int, now: int) -> str:
        recovery = self._rules["recovery_ms"]
        open_ms = min(max(self._rules["max_open_ms"], recovery), recovery * 2 ** min(reopens, 40))
        open_ms = max(open_ms, min(result.get("retry_after_ms") or 0, DAY_MS))
        circuit.become("open", now)
        circuit.retry_ms, circuit.reopens, circuit.failures = now + open_ms, reopens, []
        return "reopened" if reopens else "opened"

    def _count(self, circuit: _Circuit, result: Mapping[str, Any], slow: bool, now: int) -> bool:
        """Count a result, and return whether it opens the circuit."""
        worker, call, threshold = result.get("worker") or "", result["call"], self._rules["failure_threshold"]
        opens = False
        if result["outcome"] == "failure":
            window = now - self._rules["window_ms"]
            recent = [failure for failure in circuit.failures if failure[0] > window]
            if call and any(call == told for _, _, told in recent):
                return False
            circuit.failures = [*recent, (now, worker, call)][-threshold:]
            workers = {by for _, by, _ in circuit.failures}
            opens = len(circuit.failures) >= threshold and not self._lone(circuit, workers, now)
        else:
            _succeed(circuit, worker, now)
            circuit.failures = []
        if "failure_rate" in self._rules or "slow_rate" in self._rules:
            return self._rates(circuit, result, slow, now) or opens
        return opens

    def _lone(self, circuit: _Circuit, workers: set[str], now: int) -> bool:
        if self._rules["lone_worker_opens"] or len(workers) > 1:
            return False
        lately = now - min(self._rules["window_ms"], OTHERS_MS)
        return any(by not in workers and at > lately for by, at in circuit.successes.items())

    def _rates(self, circuit: _Circuit, result: Mapping[str, Any], slow: bool, now: int) -> bool:
        width = max(1, self._rules["window_ms"] // BUCKETS)
        slot, failed = now // width, result["outcome"] == "failure"
        bucket = circuit.buckets.get(slot % BUCKETS)
        if bucket is None or bucket.start != slot * width:
            bucket = circuit.buckets[slot % BUCKETS] = _Bucket(slot * width)
        bucket.calls += 1
        bucket.failures += failed
        bucket.slow += slow
        if failed or slow:
            bucket.trouble.add(result.get("worker") or "")
        live = [bucket for bucket in circuit.buckets.values() if bucket.start > now - self._rules["window_ms"]]
        calls = sum(bucket.calls for bucket in live)
        trouble = set[str]().union(*(bucket.trouble for bucket in live))
        if calls < self._rules["minimum_calls"] or not trouble or self._lone(circuit, trouble, now):
            return False
        failure_rate = sum(bucket.failures for bucket in live) / calls
        slow_rate = sum(bucket.slow for bucket in live) / calls
        return bool(failure_rate >= self._rules.get("failure_rate", 2) or slow_rate >= self._rules.get("slow_rate", 2))


def _take(circuit: _Circuit, call_id: str, lease_ms: int, now: int) -> tuple[int, bool]:
    """Take the permit that was asked for, and return its generation and whether it is a probe."""
    if circuit.state == "closed":
        return circuit.generation, False
    if circuit.state == "open":
        circuit.become("half_open", now)
    circuit.leases = {**circuit.live_leases(now), call_id: now + min(lease_ms, DAY_MS)}
    return circuit.generation, True


def _succeed(circuit: _Circuit, worker: str, now: int) -> None:
    """Remember the last success of two workers: whoever is in trouble, the other one is somebody else."""
    circuit.successes.pop(worker, None)
    circuit.successes = dict([*circuit.successes.items(), (worker, now)][-2:])
