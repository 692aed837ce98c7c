"""Which workers live? Each that runs jobs has a lease, and says again and again that it holds it: BEAT and JUDGE."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, close_idle, connect, reaching, together
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

BEAT = Script("beat", "values", "vigil")
JUDGE = Script("judge", "values", "vigil")

UNWATCHED_SECONDS = 5.0
"""Nothing was heard of any worker for so long: what ran out meanwhile says nothing of who held it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Who lives at a moment of Redis' clock, and whose lease has just been taken away for not being renewed.

    A lease that has been held once and is not among ``live`` never holds again. Without ``steady`` nobody was
    judged: leases have not been watched for long enough.
    """

    at: datetime
    live: frozenset[str]
    died: tuple[str, ...]
    steady: bool


class Leases:
    """The leases of one namespace's workers. Every method raises ``ServiceUnavailableError`` when Redis is away.

    A lease is named by its worker, and a name is used once: one that was lost is not taken again.
    """

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._redis = redis or connect(settings, max_connections=1)
        self._keys = FleetKeys(settings.namespace)

    def beat(self, lease: str, seconds: float, *, again: bool) -> bool:
        """Hold ``lease`` for so long from now; False: it was held before (``again``) and has been taken away."""
        with reaching(self._settings):
            return bool(self._beat(lease, seconds, int(again)))

    def drop(self, lease: str) -> None:
        """Give the lease up: its worker ends."""
        with reaching(self._settings):
            self._beat(lease, 0.0, 0)

    def judge(self, seconds: float) -> Judgement:
        """Take the leases away that were not renewed in time; ``seconds`` is how long one lasts.

        After a silence of ``UNWATCHED_SECONDS``, or half a lease, in which no worker was heard of, nobody is judged
        for a quarter of one: those that live renew theirs meanwhile.
        """
        with reaching(self._settings):
            now_ms, steady, died, live = JUDGE(
                self._redis, (self._keys.workers, self._keys.sweep), (round(seconds * 1000), _unwatched_ms(seconds))
            )
        return Judgement(
            datetime.fromtimestamp(now_ms / 1000, UTC),
            frozenset(map(_text, live)),
            tuple(map(_text, died)),
            steady == b"1",
        )

    def live(self) -> dict[str, float]:
        """Return the leases there are, with the seconds left of each; less than 0: not renewed, and not judged yet."""
        key = self._keys.workers
        with reaching(self._settings):
            [time] = together(self._redis, [(key, ("TIME",))])
            if isinstance(time, Exception):
                raise time
            found: Any = self._redis.zrange(key, 0, -1, withscores=True)
        now_seconds = int(time[0]) + int(time[1]) / 1_000_000
        return {_text(lease): end_ms / 1000 - now_seconds for lease, end_ms in found}

    def _beat(self, lease: str, seconds: float, again: int) -> int:
        arguments = (lease, round(seconds * 1000), again, _unwatched_ms(seconds))
        answer: int = BEAT(self._redis, (self._keys.workers, self._keys.sweep), arguments)
        return answer

    def close(self) -> None:
        """Give the connection back."""
        close_idle(self._redis)


def _unwatched_ms(lease_seconds: float) -> int:
    return round(min(UNWATCHED_SECONDS, lease_seconds / 2) * 1000)


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
