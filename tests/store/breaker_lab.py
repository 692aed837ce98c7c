"""How does a circuit behave at a given time? The breaker's fragment on a real Redis, under a clock that tests set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

from attune_worker.sections import BreakerSettings
from attune_worker.store.circuits import Grant, Name, rules_in_ms
from attune_worker.store.scripts import Script

START_MS = 1_800_000_000_000

MAIN = """
local now, rules = tonumber(ARGV[1]), cjson.decode(ARGV[2])
if ARGV[3] == 'ask' then
  local circuit = breaker_look(KEYS[1], now, rules, ARGV[4])
  if not circuit.allowed then
    return { 0, circuit.retry_at - now, circuit.reason }
  end
  return { 1, 0, '', breaker_take(circuit, now, ARGV[4], tonumber(ARGV[5]), rules), circuit.probe and 1 or 0 }
elseif ARGV[3] == 'look' then
  local circuit = breaker_look(KEYS[1], now, rules)
  return { circuit.state, circuit.failures, circuit.probes, integer(circuit.generation), circuit.allowed and 1 or 0 }
end
return breaker_settle(KEYS[1], now, cjson.decode(ARGV[4]), rules) or ''
"""


class Lab:
    """One circuit. ``now`` is Redis' time in ms, as far as the fragment is concerned."""

    def __init__(self, redis: Redis, key: str, rules: BreakerSettings) -> None:
        self.redis = redis
        self.key = key
        self.now = START_MS
        self.rules = json.dumps(rules_in_ms(rules))
        self._text = Script("breaker", "values").text + MAIN
        self._calls = 0

    def ask(self, names: Sequence[Name] = (), call_id: str = "", lease_ms: int = 1000) -> Grant:
        allowed, wait_ms, reason, *permit = self._run("ask", call_id or self.new_call(), lease_ms)
        permits = ((permit[0], bool(permit[1])),) if permit else ()
        return Grant(bool(allowed), wait_ms, reason.decode(), permits)

    def permit(self, lease_ms: int = 1000) -> tuple[str, int]:
        """Get a permit, and return its call and its generation."""
        call = self.new_call()
        grant = self.ask(call_id=call, lease_ms=lease_ms)
        assert grant.allowed
        return call, grant.permits[0][0]

    def settle(self, outcome: str, permit: tuple[str, int] | None = None, **fields: Any) -> str:
        result: dict[str, Any] = {"call": self.new_call(), "outcome": outcome, "worker": "w", **fields}
        if permit is not None:
            result["call"], result["generation"] = permit
        return self.record({("p", None): result})[0]

    def record(self, results: Mapping[Name, Mapping[str, Any]]) -> list[str]:
        """Return what has changed, without the reason."""
        events = [self._run("settle", json.dumps(result)).decode() for result in results.values()]
        return [event.partition(":")[0] for event in events]

    def fail(self, times: int = 1, **fields: Any) -> list[str]:
        """Fail in calls with permits, one after the other, and return the events there were."""
        events = [self.settle("failure", self.permit(), **fields) for _ in range(times)]
        return [event for event in events if event]

    @property
    def state(self) -> str:
        return self._run("look")[0].decode()

    @property
    def failures(self) -> int:
        return self._run("look")[1]

    @property
    def allowed(self) -> bool:
        return bool(self._run("look")[4])

    def new_call(self) -> str:
        self._calls += 1
        return f"call-{self._calls}"

    def _run(self, *arguments: Any) -> Any:
        return self.redis.eval(self._text, 1, self.key, self.now, self.rules, *arguments)
