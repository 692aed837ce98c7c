"""What are a provider's limits, and what is left of them?

``store/lua/limits.lua`` decides and counts, inside ADMIT and SETTLE. Here is what it is told, and the reading of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from attune_worker.sections import LimitSettings, ProviderSettings
from attune_worker.settings import Settings
from attune_worker.store.connection import Command, RedisClient, connect, reaching, together
from attune_worker.store.keys import FleetKeys

if TYPE_CHECKING:
    from attune_worker.providers.rate_headers import Observed

MINUTE_MS = 60_000
LEARNED_MS = 600_000
"""How long a limit from a provider's headers is believed; as in ``limits.lua``."""

LONGEST_DEBT_MS = 3_600_000
"""No bucket is further from full than this; as in ``limits.lua``."""

SLOT_MS = 5000
WINDOW_SLOTS = 12
"""A window is the present slot and so many before it; as in ``limits.lua``, like the next two."""

WINDOW_SIZE = 1024
HIGHEST_COUNT = 10**14

LONGEST_PAUSE_MS = 120_000
DAY_MS = 86_400_000

_BUCKETS = ("requests_tat", "requests_window", "tokens_tat", "tokens_window")
_MODEL = (
    *_BUCKETS,
    "requests_limit",
    "requests_learned",
    "tokens_limit",
    "tokens_learned",
    "cooldown_ms",
    "cooldown_reason",
    "paused_ms",
)


def want(provider: ProviderSettings, limits: LimitSettings, tokens: int) -> dict[str, Any]:
    """Return what ``limits_look`` is asked; ``tokens`` is the most that the call can use."""
    return _told(
        _rules(provider, limits) | {"tokens": tokens, "concurrency": provider.concurrency, "learn": limits.learn}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a call ended, for the limits.

    ``used_tokens`` is None when nobody counted: then the reservation stands. ``released``: the call was never
    made. ``admitted_ms`` is when it was admitted, by Redis' clock. ``cooldown_seconds``: the provider wants this
    model to be left alone for so long, for ``reason``.
    """

    call_id: str
    reserved_tokens: int
    used_tokens: int | None = None
    released: bool = False
    admitted_ms: int | None = None
    cooldown_seconds: float | None = None
    reason: str | None = None
    observed: Observed | None = None

    def told(self, provider: ProviderSettings, limits: LimitSettings) -> dict[str, Any]:
        """Return what ``limits_settle`` is told."""
        learned = self.observed if limits.learn else None
        seen = {} if learned is None else {"requests": learned.requests, "tokens": learned.tokens}
        fields = {
            "call": self.call_id,
            "reserved_tokens": self.reserved_tokens,
            "used_tokens": self.used_tokens,
            "released": self.released,
            "admitted_ms": self.admitted_ms,
            "cooldown_ms": None if self.cooldown_seconds is None else ceil(self.cooldown_seconds * 1000),
            "reason": self.reason,
            "observed": {name: _told(asdict(allowance)) for name, allowance in seen.items() if allowance} or None,
        }
        return _told(_rules(provider, limits) | fields)


@dataclass(frozen=True, slots=True)
class Left:
    """A limit per minute, and what could be taken of it at once now; in debt, ``left`` is 0."""

    limit: int
    left: int


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What is known of one model: until when it is left alone, and the limits its provider told of; None: nothing."""

    cooldown_until: datetime | None = None
    cooldown_reason: str | None = None
    paused_until: datetime | None = None
    requests: Left | None = None
    tokens: Left | None = None


@dataclass(frozen=True, slots=True)
class ProviderLimits:
    """Where a provider stands: the configured limits (None: not limited) and its models."""

    in_flight: int
    concurrency: int | None
    requests: Left | None
    tokens: Left | None
    models: Mapping[str, ModelLimits] = field(default_factory=dict)


class Limits:
    """The limits of one namespace, as they stand. Raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._keys = FleetKeys(settings.namespace)
        self._redis = redis or connect(settings)

    def status(self, models: Iterable[tuple[str, str]] = ()) -> dict[str, ProviderLimits]:
        """Return where each configured provider stands, with those of ``models`` (provider, id). Changes nothing."""
        asked = list(models)
        with reaching(self._settings):
            seconds, micros = self._redis.time()
            now_ms = seconds * 1000 + micros // 1000
            commands: list[tuple[str, Command]] = []
            for name in self._settings.providers:
                key, slots = self._keys.limits(name), self._keys.slots(name)
                commands.append((key, ("HMGET", key, *_BUCKETS)))
                commands.append((slots, ("ZCOUNT", slots, f"({now_ms}", now_ms + DAY_MS)))
            model_keys = [self._keys.limits(*model) for model in asked]
            commands += [(key, ("HMGET", key, *_MODEL)) for key in model_keys]
            answers = iter([_found(answer) for answer in together(self._redis, commands)])
        burst_ms = self._settings.limits.burst_seconds * 1000
        found = {
            name: _provider(provider, next(answers), next(answers), burst_ms, now_ms)
            for name, provider in self._settings.providers.items()
        }
        by_provider: dict[str, dict[str, ModelLimits]] = {}
        for name, model_id in asked:
            by_provider.setdefault(name, {})[model_id] = _model(next(answers), burst_ms, now_ms)
        return {name: replace(status, models=by_provider.get(name, {})) for name, status in found.items()}


def _rules(provider: ProviderSettings, limits: LimitSettings) -> dict[str, Any]:
    return {
        "requests_per_minute": provider.requests_per_minute,
        "tokens_per_minute": provider.tokens_per_minute,
        "burst_ms": limits.burst_seconds * 1000,
    }


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _found(answer: Any) -> Any:
    """Return an answer; None for a foreign value under our key, which counts as missing."""
    if type(answer) is ResponseError:
        return None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _provider(provider: ProviderSettings, buckets: Any, in_flight: Any, burst_ms: float, now_ms: int) -> ProviderLimits:
    found = dict(zip(_BUCKETS, buckets or [None] * len(_BUCKETS), strict=True))
    return ProviderLimits(
        in_flight=in_flight or 0,
        concurrency=provider.concurrency,
        requests=_left(provider.requests_per_minute, found, "requests", burst_ms, now_ms),
        tokens=_left(provider.tokens_per_minute, found, "tokens", burst_ms, now_ms),
    )


def _model(values: Any, burst_ms: float, now_ms: int) -> ModelLimits:
    found = dict(zip(_MODEL, values or [None] * len(_MODEL), strict=True))
    cooldown_until = _future(found["cooldown_ms"], now_ms)
    reason = found["cooldown_reason"] if cooldown_until else None
    return ModelLimits(
        cooldown_until=cooldown_until,
        cooldown_reason=reason.decode(errors="replace") if reason else None,
        paused_until=_future(found["paused_ms"], now_ms),
        requests=_left(_learned(found, "requests", now_ms), found, "requests", burst_ms, now_ms),
        tokens=_left(_learned(found, "tokens", now_ms), found, "tokens", burst_ms, now_ms),
    )


def _left(limit: int | None, found: Mapping[str, bytes | None], name: str, burst_ms: float, now_ms: int) -> Left | None:
    if limit is None:
        return None
    unit_ms = (MINUTE_MS + burst_ms) / limit
    full_at = _number(found[f"{name}_tat"], now_ms)
    behind_ms = max(full_at - now_ms, 0) if full_at <= now_ms + LONGEST_DEBT_MS else 0
    least_ms = unit_ms if name == "requests" else 0
    paced = int((max(burst_ms, least_ms) - behind_ms) / unit_ms)
    return Left(limit, max(min(paced, limit - _taken(found[f"{name}_window"], now_ms)), 0))


def _taken(window: bytes | None, now_ms: int) -> int:
    """Return what was taken in the slots that the last minute touches; text that is not ours counts as nothing."""
    if window is None or len(window) > WINDOW_SIZE:
        return 0
    present, counts = now_ms // SLOT_MS, dict[int, int]()
    for word in window.split():
        if not (parts := re.fullmatch(rb"([0-9]+):([0-9]+)", word)) or int(parts[2]) > HIGHEST_COUNT:
            return 0
        if abs(int(parts[1]) - present) <= WINDOW_SLOTS:
            counts.setdefault(int(parts[1]), int(parts[2]))
    return sum(counts.values())


def _learned(found: Mapping[str, bytes | None], name: str, now_ms: int) -> int | None:
    limit = _number(found[f"{name}_limit"], 0)
    age_ms = now_ms - _number(found[f"{name}_learned"], 0)
    return int(limit) if limit > 0 and -LONGEST_PAUSE_MS < age_ms < LEARNED_MS else None


def _future(text: bytes | None, now_ms: int) -> datetime | None:
    at_ms = _number(text, 0)
    return datetime.fromtimestamp(at_ms / 1000, UTC) if now_ms < at_ms <= now_ms + 7 * DAY_MS else None


def _number(text: bytes | None, default: float) -> float:
    try:
        number = float(text or b"")
    except ValueError:
        return default
    return number if isfinite(number) else default
