"""How do the tests of what the fleet learns tell it of calls? Through a script that does nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import pytest
from redis import Redis

from attune_worker.settings import Settings
from attune_worker.store.keys import FleetKeys
from attune_worker.telemetry.evidence import HALF_LIFE
from attune_worker.telemetry.store import Telemetry

SETTLE = "\n".join(
    [
        *(files("attune_worker.store").joinpath("lua", f"{name}.lua").read_text() for name in ("values", "telemetry")),
        "local keys = { stats = KEYS[1], stage = KEYS[2], workflow = KEYS[3], fleet = KEYS[4], stages = KEYS[5] }",
        "local n, n_workflow, n_fleet = telemetry_settle(keys, now_in_ms(), cjson.decode(ARGV[1]))",
        "return { n, n_workflow, n_fleet }",
    ]
)
SHA = hashlib.sha1(SETTLE.encode(), usedforsecurity=False).hexdigest()


@dataclass
class Learning:
    """The fleet of one test, which is told of calls that nobody made."""

    redis: Redis
    keys: FleetKeys

    def call(self, ref: str, *, workflow: str = "w", stage: str = "s", call_id: str = "", **fields: Any) -> list[Any]:
        """Settle one call, a success that counts unless ``fields`` say otherwise; with an id, as SETTLE records it."""
        call = {
            "ref": ref,
            "names": json.dumps([workflow, stage]),
            "kind": "success",
            "score": 1,
            "latency_ms": 100,
            "cost_nano": 1000,
            "input": 10,
            "output": 20,
            "half_life": HALF_LIFE,
        } | fields
        day = f"{datetime.now(UTC):%Y%m%d}"
        self.redis.script_load(SETTLE)
        numbers = self.redis.evalsha(
            SHA,
            5,
            self.keys.stats(workflow, stage, day),
            self.keys.evidence(workflow, stage),
            self.keys.evidence(workflow),
            self.keys.evidence(),
            self.keys.stages,
            json.dumps({name: value for name, value in call.items() if value is not None}),
        )
        if call_id:
            n, n_workflow, n_fleet = (number or "" for number in numbers)
            score = "" if call["score"] is None else call["score"]
            settled = {"state": "settled", "ref": ref, "workflow": workflow, "stage": stage, "day": day, "score": score}
            self.redis.hset(
                self.keys.call(call_id), mapping=settled | {"n": n, "n_workflow": n_workflow, "n_fleet": n_fleet}
            )
        return numbers


@pytest.fixture
def learning(redis: Redis, settings: Settings) -> Learning:
    """Return what tells this test's fleet of calls."""
    return Learning(redis, FleetKeys(settings.namespace))


@pytest.fixture
def telemetry(settings: Settings) -> Iterator[Telemetry]:
    """Return what this test's fleet has learned."""
    found = Telemetry(settings)
    yield found
    found.close()
