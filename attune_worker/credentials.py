"""How do the keys and subscriptions of each provider stand, and how is a refused one tried again?

``store/lua/credentials.lua`` decides and counts, inside ADMIT and SETTLE. Here is the reading of it, without secrets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from attune_worker.errors import ConfigurationError
from attune_worker.jobs import AuthMode
from attune_worker.sections import DEFAULT_CREDENTIAL, ProviderSettings
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, close_idle, connect, reaching
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

CREDENTIAL_STATUS = Script("credential_status", "values", "credentials")


@dataclass(frozen=True, slots=True)
class Refused:
    """A key that its provider did not accept: since when, how it said so, and when one call tries it again."""

    since: datetime
    error: str
    status: int | None
    recheck_at: datetime


@dataclass(frozen=True, slots=True)
class Held:
    """Why not even the smallest call may go by a credential now, in ADMIT's word for it, and when to ask again."""

    reason: str
    until: datetime


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """A quota window of a subscription.

    ``utilization`` (0 to 1) is what the provider told last, ``counted_tokens`` came after that or may have.
    ``resets_at`` is None until the provider tells of a window that has begun anew. ``capacity_tokens`` was learned;
    None: not yet. ``pace`` is the share that may be used by now: ``burst`` at first, all but ``keep_free`` in the end.
    """

    utilization: float
    counted_tokens: int
    resets_at: datetime | None
    status: str | None
    capacity_tokens: int | None
    pace: float = 1.0


@dataclass(frozen=True, slots=True)
class CredentialStatus:
    """One credential. ``present``: its secret is there, in this process's environment.

    ``variable`` is the one of the environment that the secret is read from; None: it is from none. ``held`` is None
    while a call may go by it.
    ``in_flight`` calls hold up to ``reserved_tokens`` of the quota; both are counted for subscriptions only.
    ``windows`` are named ``5h`` and ``7d``: none until the provider has told of them, nor where it ``tells_no_quota``.
    """

    name: str
    mode: AuthMode
    present: bool
    variable: str | None = None
    refused: Refused | None = None
    held: Held | None = None
    windows: Mapping[str, QuotaStatus] = field(default_factory=dict)
    in_flight: int = 0
    reserved_tokens: int = 0
    tells_no_quota: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """A configured credential whose secret is not in this process's environment; ``str`` says what that means.

    ``others`` are those of its provider that are there.
    """

    provider: str
    one: CredentialStatus
    others: tuple[CredentialStatus, ...]

    def __str__(self) -> str:
        name, empty = f"{self.provider}/{self.one.name}", f"{self.one.variable or 'its secret'} is empty"
        subscription = self.one.mode is AuthMode.SUBSCRIPTION
        what = f"the subscription {name} has no token here" if subscription else f"{name} has no key here"
        return f"{what} ({empty}): {self._effect()}"

    def _effect(self) -> str:
        if not self.others:
            return f"no call goes to {self.provider}"
        if self.one.mode is AuthMode.SUBSCRIPTION and all(one.mode is AuthMode.API for one in self.others):
            return "calls go by API keys and are paid by the token"
        return "calls go by the others"


class Credentials:
    """The credentials of one namespace. Raises ``ServiceUnavailableError`` when Redis is away."""

    def __init__(
        self, settings: Settings, redis: RedisClient | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._keys = FleetKeys(settings.namespace)
        self._redis = redis or connect(settings)

    def status(self) -> dict[str, tuple[CredentialStatus, ...]]:
        """Return how each configured credential stands, by provider. Changes nothing."""
        known = configured(self._settings, self._environ)
        calls = [self._call(provider, one.name, "0") for provider, found in known.items() for one in found]
        with reaching(self._settings):
            answers = iter(CREDENTIAL_STATUS.many(self._redis, calls))
        return {provider: tuple(_told(one, _read(next(answers))) for one in found) for provider, found in known.items()}

    def reset(self, provider: str, name: str = DEFAULT_CREDENTIAL) -> bool:
        """Have the fleet try a refused credential again at once, and return whether it was refused.

        Raises ``ConfigurationError`` for one that is not configured.
        """
        found = self._settings.providers.get(provider)
        if found is None:
            known = ", ".join(self._settings.providers)
            raise ConfigurationError(f"{provider!r} is not a provider; configured: {known}")
        if name not in _names_of(found):
            known = ", ".join(_names_of(found)) or "none"
            raise ConfigurationError(f"{provider} has no credential {name!r}; configured: {known}")
        with reaching(self._settings):
            answer = CREDENTIAL_STATUS(self._redis, *self._call(provider, name, "1"))
        return bool(_read(answer)["forgotten"])

    def _call(self, provider: str, name: str, forget: str) -> tuple[tuple[str], tuple[str, str]]:
        quotas = {one.name: one.quota for one in self._settings.providers[provider].credentials}
        quota = quotas.get(name)
        return (self._keys.credential(provider, name),), (forget, "" if quota is None else json.dumps(quota))

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self._redis)


def configured(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, tuple[CredentialStatus, ...]]:
    """Return each credential by provider, with no more than settings and environment say of it: without Redis."""
    found: dict[str, tuple[CredentialStatus, ...]] = {}
    for name, provider in settings.providers.items():
        there, variables = provider.keys(environ), provider.variables()
        found[name] = tuple(
            CredentialStatus(one, mode, one in there, variables.get(one)) for one, mode in _names_of(provider).items()
        )
    return found


def missing(settings: Settings, environ: Mapping[str, str] = os.environ) -> Iterator[Missing]:
    """Yield each configured credential whose secret is not here."""
    for provider, found in configured(settings, environ).items():
        others = tuple(one for one in found if one.present)
        for one in found:
            if not one.present:
                yield Missing(provider, one, others)


def _names_of(provider: ProviderSettings) -> dict[str, AuthMode]:
    """Return the configured credentials, present or not, with their modes."""
    own = {one.name: AuthMode(one.mode) for one in provider.credentials}
    default = provider.api_key is not None or not provider.credentials
    return {**({DEFAULT_CREDENTIAL: AuthMode.API} if default else {}), **own}


def _read(answer: bytes) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(answer.decode(errors="replace"))
    return found


def _told(one: CredentialStatus, found: Mapping[str, Any]) -> CredentialStatus:
    refused, held = found.get("refused"), found.get("held")
    return replace(
        one,
        refused=None if refused is None else _refused(refused),
        held=None if held is None else Held(held["reason"], _moment(held["ms"])),
        windows={window: _quota(told) for window, told in sorted(dict(found["windows"]).items())},
        in_flight=int(found["calls"]),
        reserved_tokens=int(found["reserved"]),
        tells_no_quota=found["windowless"],
    )


def _refused(told: Mapping[str, str]) -> Refused:
    status = told["status"]
    return Refused(
        since=_moment(told["ms"]),
        error=told["error"],
        status=int(status) if status.isdecimal() else None,
        recheck_at=_moment(told["recheck_ms"]),
    )


def _quota(told: Mapping[str, Any]) -> QuotaStatus:
    capacity = told.get("capacity")
    return QuotaStatus(
        utilization=float(told["utilization"]),
        counted_tokens=int(told["counted"]),
        resets_at=_moment(told["reset_ms"]) if "reset_ms" in told else None,
        status=told.get("status"),
        capacity_tokens=None if capacity is None else int(capacity),
        pace=float(told["pace"]),
    )


def _moment(ms: str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)
