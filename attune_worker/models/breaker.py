"""May a provider be called at the moment? One circuit breaker for the whole fleet, in Redis.

breaker = CircuitBreaker()
if breaker.is_available("anthropic", "capable"):
    try:
        answer = call()
    except ProviderError as error:
        breaker.record_failure("anthropic", "capable", error)
    else:
        breaker.record_success("anthropic", "capable")
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar
from uuid import uuid4

from pydantic import ValidationError

from attune_worker.errors import AttuneError, ConfigurationError, ServiceUnavailableError
from attune_worker.jobs import ModelTier
from attune_worker.models import decisions
from attune_worker.models.local_circuits import LocalCircuits
from attune_worker.models.permits import Permit, Permits
from attune_worker.sections import BreakerSettings
from attune_worker.settings import Settings, get_settings
from attune_worker.store.circuits import Circuits, Name
from attune_worker.store.connection import RedisClient
from attune_worker.store.outage import Outage

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Override = Literal["open", "disabled", "metrics_only"]
Outcome = Literal["success", "failure", "ignored"]

_SIDES = (False, True)
"""Permits are the fleet's, or this process's own; each side is told the generation of its own ones only."""

LEASE_MARGIN_SECONDS = 30.0
"""A probe's lease outlives the longest call by this."""

LONGEST_HOLD_SECONDS = 30 * 86_400.0


class CircuitBreaker:
    """Stops calls to a provider, or one of its tiers, after too many failures of the fleet, until it is well again.

    Circuits are shared by all processes with the same Redis and namespace. Each (provider, tier) has one, and
    each provider one of its own (tier None), which is asked as well. Arguments that are not given come from the
    settings: ``failure_threshold`` failures in a row open a circuit for ``recovery_timeout_seconds``, and then
    ``half_open_calls`` probes at a time may try; ``rules`` sets everything at once. ``owner`` names the worker whose
    results these are (default: host and process), ``lease_seconds`` is how long a probe may take before
    another one is let through. While Redis is away the breaker decides by what this process sees.
    Raises ``ConfigurationError`` for numbers that make no sense. Threads and tasks may share one.
    """

    def __init__(
        self,
        failure_threshold: int | None = None,
        recovery_timeout_seconds: float | None = None,
        half_open_calls: int | None = None,
        *,
        settings: Settings | None = None,
        redis: RedisClient | None = None,
        rules: BreakerSettings | None = None,
        owner: str | None = None,
        lease_seconds: float | None = None,
    ) -> None:
        settings = settings or get_settings()
        given = {
            "failure_threshold": failure_threshold,
            "recovery_timeout_seconds": recovery_timeout_seconds,
            "half_open_calls": half_open_calls,
        }
        self.rules = _with(
            rules or settings.breaker, {name: value for name, value in given.items() if value is not None}
        )
        self.owner = (owner or f"{socket.gethostname()}:{os.getpid()}").encode(errors="replace").decode()
        if lease_seconds is None:
            lease_seconds = settings.http.request_timeout_seconds + LEASE_MARGIN_SECONDS
        self._lease_seconds = _duration("lease_seconds", lease_seconds)
        self._shared = Circuits(settings, self.rules, redis)
        self._local = LocalCircuits(self.rules)
        self._outage = Outage()
        self._permits = Permits()
        self._providers = tuple(settings.providers)

    def is_available(self, provider: str, tier: ModelTier | str | None = None) -> bool:
        """Return whether a call may be made now. While a circuit recovers, True is a probe's turn: make the call."""
        names = _asked(provider, tier)
        call_id = uuid4().hex
        lease_ms = round(self._lease_seconds * 1000)
        ends = time.monotonic() + self._lease_seconds
        grant = self._try(lambda: self._shared.ask(names, call_id, lease_ms))
        if local := grant is None:
            grant = self._local.ask(names, call_id, lease_ms)
        else:
            for name in names if grant.allowed else names[:1]:
                self._local.adopt(name, grant)
        decisions.tell_circuit(names, grant)
        if grant.allowed:
            self._permits.add(Permit(call_id, grant, names, ends, local))
        return grant.allowed

    def record_success(
        self, provider: str, tier: ModelTier | str | None = None, *, latency_seconds: float | None = None
    ) -> None:
        """Note that a call was answered, after ``latency_seconds``."""
        self._record(provider, tier, "success", latency_seconds=latency_seconds)

    def record_failure(
        self,
        provider: str,
        tier: ModelTier | str | None = None,
        error: BaseException | None = None,
        *,
        latency_seconds: float | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        """Note that a call failed.

        An ``error`` that says nothing about the provider's health (a bad request, a cancelled call) does not
        count. ``retry_after_seconds`` (default: the error's own) is how long the provider asks to be left alone.
        """
        if retry_after_seconds is None:
            retry_after_seconds = getattr(error, "retry_after", None)
        self._record(
            provider,
            tier,
            "failure" if _counts(error) else "ignored",
            error=type(error).__name__ if error is not None else None,
            latency_seconds=latency_seconds,
            retry_after_seconds=retry_after_seconds,
        )

    def release(self, provider: str, tier: ModelTier | str | None = None) -> None:
        """Give the permit back: the call was not made, or says nothing about the provider."""
        self._record(provider, tier, "ignored")

    def get_status(self) -> dict[str, dict[str, Any]]:
        """Return how each circuit stands, as ``provider:tier``, or ``provider:*`` for the provider's own.

        Times are ISO 8601 in UTC. ``is_open``: calls are refused; ``forced``: the override, if any, laid over it
        ``by`` somebody at ``forced_at``, and until ``forced_until`` (None: until ``reset``); ``reset_at``: somebody
        closed it; ``probes``: calls that are finding out now; ``next_probe``: from when on another may. Raises
        ``ServiceUnavailableError``.
        """
        found = self._shared.read(self._shared.names())
        return {f"{_label(provider)}:{_label(tier)}": _status(fields) for (provider, tier), fields in found.items()}

    def circuits(self, provider: str | None = None) -> dict[Name, dict[str, Any]]:
        """Return the same by provider and tier, of one provider or all, and with what the index may have lost."""
        found = self._shared.read(sorted(self._all_of(provider), key=lambda name: (name[0], name[1] or "")))
        return {name: _status(fields) for name, fields in found.items()}

    def reset(
        self,
        provider: str | None = None,
        tier: ModelTier | str | None = None,
        *,
        reason: str = "",
        by: str | None = None,
    ) -> None:
        """Close circuits and lift their overrides: one, all of a provider, or all; jobs that wait look again at once.

        All are those that Redis lists, and every tier's and the provider's own of the configured providers.
        Raises ``ServiceUnavailableError``.
        """
        if provider is None and tier is not None:
            raise ValueError("tier: it needs its provider")
        for name in self._all_of(provider) if provider is None or tier is None else [_name(provider, tier)]:
            self._shared.reset(name, by=by or self.owner, reason=reason)
            self._local.forget(name)
        self._shared.hasten_waiting_jobs()

    def trip(
        self,
        provider: str,
        tier: ModelTier | str | None = None,
        seconds: float | None = None,
        reason: str = "",
        by: str | None = None,
    ) -> None:
        """Stop calls for ``seconds``, after which they are tried as usual, or until ``reset``.

        Without ``tier`` it holds for the whole provider. Raises ``ServiceUnavailableError``.
        """
        if seconds is None:
            self.override(provider, tier, "open", reason=reason, by=by)
        else:
            for_ms = round(_duration("seconds", seconds) * 1000)
            self._shared.open(_name(provider, tier), for_ms, by=by or self.owner, reason=reason)

    def override(
        self,
        provider: str,
        tier: ModelTier | str | None = None,
        kind: Override | None = None,
        *,
        seconds: float | None = None,
        reason: str = "",
        by: str | None = None,
    ) -> None:
        """Lay an override over a circuit, for ``seconds`` or until ``reset``; None lifts it.

        ``open`` refuses, ``disabled`` allows everything and records nothing, ``metrics_only`` allows
        everything and counts, but never opens. Where it does not refuse, jobs that wait look again at once. Raises
        ``ServiceUnavailableError``.
        """
        if kind not in {None, "open", "disabled", "metrics_only"}:
            raise ValueError(f"kind: {kind!r} is not allowed; allowed: open, disabled, metrics_only, None")
        for_ms = 0 if seconds is None else round(_duration("seconds", seconds) * 1000)
        self._shared.override(_name(provider, tier), kind or "", for_ms, by=by or self.owner, reason=reason)
        if kind != "open":
            self._shared.hasten_waiting_jobs()

    def close(self) -> None:
        """Give the connections to Redis back, unless they are the caller's."""
        self._shared.close()

    def _all_of(self, provider: str | None) -> list[Name]:
        """Return the circuits there are of a provider (None: of all), also where the index has lost them."""
        own = [] if provider is None else [_name(provider, None)]
        listed = [name for name in self._shared.names() if provider is None or name[0] == provider]
        providers = self._providers if provider is None else (provider,)
        possible = [_name(one, tier) for one in providers for tier in (*ModelTier, None)]
        return list({*own, *listed, *self._shared.read(possible)})

    def _record(
        self,
        provider: str,
        tier: ModelTier | str | None,
        outcome: Outcome,
        *,
        error: str | None = None,
        latency_seconds: float | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        names = _asked(provider, tier)
        permit = self._permits.take(names[0])
        result = {
            "call": permit.call_id if permit else uuid4().hex,
            "outcome": outcome,
            "worker": self.owner,
            "error": error,
            "latency_ms": _ms(latency_seconds),
            "retry_after_ms": _ms(retry_after_seconds),
        }
        result = {key: value for key, value in result.items() if value is not None}
        told = {
            local: _results(result, names, permit if permit and permit.local is local else None) for local in _SIDES
        }
        shared_events = self._try(lambda: self._shared.record(told[False]))
        local_events = self._local.record(told[True])
        self._announce(names, local_events if shared_events is None else shared_events)

    def _announce(self, names: tuple[Name, ...], events: list[str]) -> None:
        for (provider, tier), event in zip(names, events, strict=False):
            if event:
                level = logging.INFO if event == "closed" else logging.WARNING
                logger.log(level, "circuit %s:%s: %s", _label(provider), _label(tier), event)

    def _try(self, ask: Callable[[], Answer]) -> Answer | None:
        """Return the fleet's answer, or None while Redis is away; it is said once when it goes, and when it is back."""
        if not self._outage.worth_trying():
            return None
        try:
            answer = ask()
        except ServiceUnavailableError as error:
            if self._outage.failed(error):
                logger.warning("%s; until it answers, the breaker goes by what this process sees", error)
            return None
        if self._outage.succeeded():
            logger.info("Redis answers again; the breaker goes by what the fleet sees")
        return answer


def _results(result: dict[str, Any], names: tuple[Name, ...], permit: Permit | None) -> dict[Name, dict[str, Any]]:
    """Return what each circuit is told: the first one always, the provider's own only where the call was its probe."""
    if permit is None:
        return {names[0]: result}
    permits = zip(names, permit.grant.permits, strict=True)
    return {
        name: {**result, "generation": generation} for name, (generation, probe) in permits if probe or name == names[0]
    }


def _with(rules: BreakerSettings, given: dict[str, Any]) -> BreakerSettings:
    try:
        return BreakerSettings.model_validate({**rules.model_dump(), **given})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigurationError(f"{first['loc'][0]}: {first['msg']}") from None


def _name(provider: str, tier: ModelTier | str | None) -> Name:
    if not isinstance(provider, str) or not provider:
        raise ValueError("provider: it should be the name of a provider, such as 'anthropic'")
    return str(provider), None if tier is None else str(tier)


def _asked(provider: str, tier: ModelTier | str | None) -> tuple[Name, ...]:
    """Return the circuits that a call needs: its own, and the provider's."""
    name = _name(provider, tier)
    return (name,) if tier is None else (name, (name[0], None))


def _label(name: str | None) -> str:
    """Return a name as a part of ``provider:tier``; no two pairs look the same."""
    if name is None:
        return "*"
    return "%2A" if name == "*" else name.replace("%", "%25").replace(":", "%3A")


def _duration(what: str, seconds: float) -> float:
    if not 0 < seconds <= LONGEST_HOLD_SECONDS:
        raise ValueError(f"{what}: {seconds!r} is not allowed; allowed: more than 0, up to 30 days")
    return seconds


def _ms(seconds: float | None) -> int | None:
    return round(seconds * 1000) if seconds is not None and math.isfinite(seconds) and seconds >= 0 else None


def _counts(error: BaseException | None) -> bool:
    """Whether an error says something about the provider's health: a foreign one does, a cancellation does not."""
    if isinstance(error, AttuneError):
        return error.counts_against_breaker
    return error is None or isinstance(error, Exception)


def _status(fields: dict[str, bytes | int]) -> dict[str, Any]:
    text = {name: value.decode(errors="replace") for name, value in fields.items() if isinstance(value, bytes)}
    override = text["override"]
    return {
        "state": text["state"],
        "is_open": override == "open" or (text["state"] == "open" and not override),
        "failure_count": int(fields["failures"]),
        "last_failure": _iso(text.get("last_failure_ms")),
        "last_success": _iso(text.get("last_success_ms")),
        "opened_at": _iso(text.get("opened_ms")),
        "reset_at": _iso(text.get("reset_ms")),
        "retry_at": _iso(text.get("retry_ms")),
        "reason": text["reason"],
        "error": text.get("error"),
        "forced": override or None,
        "by": text["by"],
        "forced_at": _iso(text.get("forced_ms")),
        "forced_until": _iso(text.get("until_ms")),
        "probes": int(fields["probes"]),
        "next_probe": _iso(text.get("probe_ms")),
    }


def _iso(ms: str | None) -> str | None:
    return None if ms is None else datetime.fromtimestamp(int(ms) / 1000, UTC).isoformat(timespec="milliseconds")
