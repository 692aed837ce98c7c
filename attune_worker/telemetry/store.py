"""What has the fleet learned of its models, and what does a caller think of an answer?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from redis.exceptions import ResponseError

from attune_worker.errors import InvalidJobError, JobNotFoundError
from attune_worker.settings import Settings
from attune_worker.store.connection import Command, RedisClient, close_idle, connect, reaching, together
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script
from attune_worker.telemetry.evidence import HALF_LIFE
from attune_worker.telemetry.views import Fields, Place, StageView, Traffic, merged, traffic

FEEDBACK = Script("feedback", "values", "telemetry")

RETENTION_DAYS = 35
"""How long the counters of a day are kept."""

VIEW_DAYS = 2
"""Latencies are those of today and yesterday."""

_KEYS_AT_ONCE = 500


class Telemetry:
    """What one namespace's fleet has learned. Every method raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._keys = FleetKeys(settings.namespace)
        self._redis = redis or connect(settings)

    def view(self, workflow: str, stage: str) -> StageView:
        """Read all that a decision about one stage needs, in one round trip."""
        return self.views([(workflow, stage)])[0]

    def views(self, places: Sequence[tuple[str, str]]) -> list[StageView]:
        """Read the views of several ``(workflow, stage)``, in one round trip."""
        days = _days(VIEW_DAYS)
        workflows = list(dict.fromkeys(workflow for workflow, _ in places))
        keys = [self._keys.evidence(), *map(self._keys.evidence, workflows)]
        for workflow, stage in places:
            keys += [self._keys.evidence(workflow, stage), *(self._keys.stats(workflow, stage, day) for day in days)]
        hashes = iter(self._hashes(keys))
        fleet = Place.read(next(hashes), HALF_LIFE["fleet"])
        known = {workflow: Place.read(next(hashes), HALF_LIFE["workflow"]) for workflow in workflows}
        views = []
        for workflow, _ in places:
            stage_place = Place.read(next(hashes), HALF_LIFE["stage"])
            calls = merged([traffic(next(hashes)) for _ in days])
            views.append(StageView(stage_place, known[workflow], fleet, calls))
        return views

    def stats(self, workflow: str, stage: str | None, days: int) -> dict[str, Traffic]:
        """Return the traffic of each model in the last ``days`` days (UTC); without ``stage``, of all stages."""
        stages = self.stages(workflow) if stage is None else [stage]
        keys = [self._keys.stats(workflow, name, day) for name in stages for day in _days(min(days, RETENTION_DAYS))]
        found: dict[str, Traffic] = {}
        for at in range(0, len(keys), _KEYS_AT_ONCE):
            found = merged([found, *map(traffic, self._hashes(keys[at : at + _KEYS_AT_ONCE]))])
        return found

    def stages(self, workflow: str) -> list[str]:
        """Return the workflow's stages that have called a model in the last weeks, sorted."""
        (members,) = self._read([(self._keys.stages, ("ZRANGE", self._keys.stages, 0, -1))])
        places = [_place(member) for member in members or ()]
        return sorted(place[1] for place in places if place is not None and place[0] == workflow)

    def feedback(self, call_id: str, score: float) -> bool:
        """Say how good the answer of a call was, from 0 to 1; False when that had been said before, which stands.

        Raises ``InvalidJobError`` for any other score and ``JobNotFoundError`` when the call is not known, has
        not ended, or its retention time has passed.
        """
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise InvalidJobError(f"'score': {score!r} is not a number from 0 (useless) to 1 (good)", field="score")
        key = self._keys.call(call_id)
        with reaching(self._settings):
            call = self._hashes([key])[0]
            workflow, stage, day = (call.get(name, b"").decode() for name in (b"workflow", b"stage", b"day"))
            if not (workflow and stage and day):
                raise JobNotFoundError(call_id)
            evidence = (self._keys.evidence(workflow, stage), self._keys.evidence(workflow), self._keys.evidence())
            answer = FEEDBACK(
                self._redis,
                (key, *evidence, self._keys.stats(workflow, stage, day)),
                (repr(float(score)), HALF_LIFE["stage"], HALF_LIFE["workflow"], HALF_LIFE["fleet"]),
            )
        if answer == b"unknown":
            raise JobNotFoundError(call_id)
        return bool(answer == b"applied")

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _hashes(self, keys: Sequence[str]) -> list[Fields]:
        return [answer or {} for answer in self._read([(key, ("HGETALL", key)) for key in keys])]

    def _read(self, commands: Sequence[tuple[str, Command]]) -> list[Any]:
        """Read in one round trip; None for a key that holds another type: somebody else's."""
        with reaching(self._settings):
            answers = together(self._redis, commands)
            for answer in answers:
                if isinstance(answer, Exception) and type(answer) is not ResponseError:  # WRONGTYPE has no class
                    raise answer
        return [None if isinstance(answer, Exception) else answer for answer in answers]


def _days(count: int) -> list[str]:
    """Return the names of the last ``count`` days, and of tomorrow: it may have begun by Redis' clock."""
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    return [f"{tomorrow - timedelta(days=back):%Y%m%d}" for back in range(count + 1)]


def _place(member: Any) -> tuple[str, str] | None:
    try:
        workflow, stage = json.loads(member)
    except (ValueError, TypeError, RecursionError):
        return None
    return (workflow, stage) if isinstance(workflow, str) and isinstance(stage, str) else None
