"""How does a quota stand at a given time? The credential's fragment on a real Redis, under a clock that tests set."""

from __future__ import annotations

import json
from typing import Any

from attune_worker.store.connection import RedisClient
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

DRIVER = """
local answers, now = {}, now_in_ms()
for index, step in ipairs(cjson.decode(ARGV[1])) do
  local at = step.at or now
  if step.settled then
    local settled = step.settled
    settled.at = settled.at or at
    answers[index] = { event = credential_settle(KEYS[1], at, settled) or '' }
  else
    local look = credential_look(KEYS[1], at, step.want)
    local covers = look.allowed and step.take and credential_take(look, at, step.lease_ms or 60000) or nil
    answers[index] = { allowed = look.allowed, retry_at = look.retry_at, reason = look.reason, covers = covers }
  end
end
return cjson.encode(answers)
"""

T = 1_795_392_000_000
HOUR_MS = 3_600_000
H5, D7 = 5 * HOUR_MS, 168 * HOUR_MS
RESET = T + HOUR_MS
RECHECK_MS = 600_000


class Token:
    """One subscription, whose steps a test places in time; ``quota`` is how it may be used."""

    def __init__(self, redis: RedisClient, namespace: str) -> None:
        self.redis = redis
        self.key = FleetKeys(namespace).credential("acme", "team")
        self.text = f"{Script('credentials', 'values').text}\n{DRIVER}"
        self.quota: dict[str, float] | None = {"keep_free": 0.0, "burst": 1.0}

    def run(self, step: dict[str, Any]) -> Any:
        return json.loads(self.redis.eval(self.text, 1, self.key, json.dumps([step])))[0]

    def look(self, at: int = T, tokens: int = 100, *, take: bool = False, **step: Any) -> Any:
        want = {"tokens": tokens, "recheck_ms": RECHECK_MS} | ({"quota": self.quota} if self.quota else {})
        return self.run({"want": want, "take": take, "at": at, **step})

    def take(self, at: int = T, tokens: int = 100, **step: Any) -> Any:
        return self.look(at, tokens, take=True, **step)

    def settle(self, now: int = T, tokens: int = 100, *windows: dict[str, Any], **settled: Any) -> str:
        told = {
            "quota": self.quota is not None,
            "admitted": True,
            "succeeded": True,
            "reserved_tokens": tokens,
            "used_tokens": tokens,
            **({"windows": windows} if windows else {}),
            **settled,
        }
        event: str = self.run({"settled": told, "at": now})["event"]
        return event

    def call(self, at: int, tokens: int, *windows: dict[str, Any]) -> None:
        """Make a call that is allowed, and have it answered."""
        taken = self.take(at, tokens)
        assert taken["allowed"], taken
        self.settle(at, tokens, *windows, covers=taken["covers"])

    def field(self, name: str) -> str | None:
        found = self.redis.hget(self.key, name)
        return None if found is None else found.decode()

    def set(self, **fields: Any) -> None:
        self.redis.hset(self.key, mapping={name.lstrip("_"): value for name, value in fields.items()})

    def stands(
        self, utilization: float, capacity: int | None = 100_000, reset: int = RESET, window: str = "5h"
    ) -> None:
        """Let the provider have told so much of a window, and nothing be counted besides."""
        fields = {"utilization": utilization, "reset_ms": reset, "told_ms": T - 1}
        if capacity is not None:
            fields["capacity"] = capacity
        self.redis.hset(self.key, mapping={f"{window}_{name}": value for name, value in fields.items()})


def told(utilization: float, reset: int = RESET, name: str = "5h", status: str = "allowed") -> dict[str, Any]:
    return {"name": name, "utilization": utilization, "reset_ms": reset, "status": status}
