"""What becomes of the calls of a worker that died? They are settled as orphaned, and its jobs get their history."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from redis.exceptions import ResponseError

from attune_worker.jobs import Attempt
from attune_worker.models.admission import SETTLE
from attune_worker.models.attempts import attempt_in
from attune_worker.models.intent import Fields, Intent
from attune_worker.models.settle_wire import Settlement, SettleWire
from attune_worker.settings import Settings
from attune_worker.store.connection import Command, RedisClient, close_idle, connect, reaching, together
from attune_worker.store.keys import FleetKeys

logger = logging.getLogger(__name__)

_ENDED = (b"settled", b"orphaned")


class Orphans:
    """Settles calls that their own worker will not settle any more, each of them once.

    What a call had reserved counts as spent, and its slot and its probe are free. Every method may be repeated, and
    raises ``ServiceUnavailableError`` when Redis is away.
    """

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._keys = FleetKeys(settings.namespace)
        self._redis = redis or connect(settings)
        self._wire = SettleWire(settings, "")

    def of_job(self, job_id: str, lease: str) -> tuple[Attempt, ...]:
        """Do for one job what ``of_jobs`` does."""
        [attempts] = self.of_jobs([(job_id, lease)])
        return attempts

    def of_jobs(self, lost: Sequence[tuple[str, str]]) -> list[tuple[Attempt, ...]]:
        """Settle the calls that were under way for jobs under leases, and return all calls of each, in their order.

        ``lost`` are job ids with their leases, which have ended: no call is allowed under them any more. Calls that
        were allowed and never made are left out, as are those whose retention time has passed. A few round trips,
        however many jobs these are.
        """
        with reaching(self._settings):
            keys = [self._keys.job_calls(job_id) for job_id, _ in lost]
            found = self._read([(key, ("LRANGE", key, 0, -1)) for key in keys])
            ids = [[member.decode(errors="replace") for member in members or ()] for members in found]
            calls = self._calls(list(dict.fromkeys(chain.from_iterable(ids))))
            lease_of = {one: lease for (_, lease), own in zip(lost, ids, strict=True) for one in own}
            unsettled = [one for one, lease in lease_of.items() if _is_open(calls[one], lease)]
            if unsettled:
                self._settle(self._settlements({one: calls[one] for one in unsettled}))
                calls |= self._calls(unsettled)  # one of them may have been settled by its worker just before
        attempts = {one: attempt_in(one, call) for one, call in calls.items()}
        return [tuple(told for one in dict.fromkeys(own) if (told := attempts[one]) is not None) for own in ids]

    def overdue(self, limit: int = 100) -> int:
        """Settle up to ``limit`` calls that should have ended by now as orphaned, and return how many those were.

        A call's own lease ends half a minute after the time that it may take. Past it are calls of programs that
        died, or that cannot write their settlements.
        """
        with reaching(self._settings):
            key = self._keys.calls
            [(seconds, micros)] = self._read([(key, ("TIME",))])
            now_ms = seconds * 1000 + micros // 1000
            found = self._read([(key, ("ZRANGEBYSCORE", key, "-inf", now_ms, "LIMIT", 0, limit))])[0]
            ids = [member.decode(errors="replace") for member in found or ()]
            calls = self._calls(ids)
            settlements = self._settlements({one: call for one, call in calls.items() if _is_open(call)})
            settled = self._settle(settlements)
            if found:  # SETTLE has taken out its own
                self._read([(key, ("ZREM", key, *found))])
            self._give_up([one for one in ids if one not in settlements and calls[one].get(b"state") not in _ENDED])
        return settled

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)

    def _settlements(self, calls: Mapping[str, Fields]) -> dict[str, Settlement]:
        """Return what settles calls as orphaned, without those that cannot be."""
        settlements: dict[str, Settlement] = {}
        for call_id, call in calls.items():
            try:
                settlements[call_id] = self._settlement(call_id, call)
            except ValueError:
                logger.warning("call %s cannot be settled: what Redis knows of it cannot be read", call_id)
        return settlements

    def _settle(self, settlements: Mapping[str, Settlement]) -> int:
        """Return how many of the calls nobody else had settled before."""
        answers = SETTLE.many(self._redis, list(settlements.values())) if settlements else []
        return sum(answer[0] == b"settled" for answer in answers)

    def _give_up(self, ids: Sequence[str]) -> None:
        """Say which calls nobody can settle, and let what is left of them go: open ones have no end of their own."""
        for one in ids:
            logger.warning(
                "call %s is given up, its record in Redis has gone or cannot be read: it may have cost something, and "
                "what it reserved stays reserved until the windows of its budgets end",
                one,
            )
        keys = [self._keys.call(one) for one in ids]
        self._read([(key, ("EXPIRE", key, self._wire.kept_seconds)) for key in keys])

    def _settlement(self, call_id: str, call: Fields) -> Settlement:
        intent = Intent.of(call)
        reserved = call.get(b"estimate_nano", b"")
        return self._wire.orphan(
            call_id, intent, int(call.get(b"admitted_ms", b"")), int(reserved) if reserved else None
        )

    def _calls(self, ids: Sequence[str]) -> dict[str, Fields]:
        """Read calls; one that is gone has no fields."""
        keys = [self._keys.call(one) for one in ids]
        answers = self._read([(key, ("HGETALL", key)) for key in keys])
        return {one: answer or {} for one, answer in zip(ids, answers, strict=True)}

    def _read(self, commands: Sequence[tuple[str, Command]]) -> list[Any]:
        """Read in one round trip; None for a key that holds another type: somebody else's."""
        answers = together(self._redis, commands)
        for answer in answers:
            if isinstance(answer, Exception) and type(answer) is not ResponseError:  # WRONGTYPE has no class
                raise answer
        return [None if isinstance(answer, Exception) else answer for answer in answers]


def _is_open(call: Fields, lease: str | None = None) -> bool:
    """Whether a call is under way as far as is known; with ``lease``, under that one."""
    if call.get(b"state") != b"open":
        return False
    return lease is None or call.get(b"lease", b"").decode(errors="replace") == lease
