"""What are the tables of ``attune.toml``? Frozen values that refuse unknown keys and never print a secret."""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from attune_worker.jobs import ModelTier, Name

PROVIDER_GROUP = "attune_worker.providers"

DEFAULT_CREDENTIAL = "default"
"""The name of the key in a provider's ``api_key``."""


class Section(BaseModel):
    """One table."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class CredentialSettings(Section):
    """A further key of a provider, or the bearer token of a subscription to it.

    ``secret`` is the key or token itself, or ``env:NAME`` to read it from the environment. Of a subscription's quota
    windows the share ``keep_free`` is left to others; the share ``burst`` may be used at once, and the rest is spread
    evenly until the window ends (1: it is not).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    mode: Literal["api", "subscription"] = "api"
    secret: SecretStr
    keep_free: float = Field(default=0.0, ge=0, le=0.85)  # in less room what a window holds could not be learned
    burst: float = Field(default=0.25, gt=0, le=1)

    @field_validator("name")
    @classmethod
    def _is_not_taken(cls, name: str) -> str:
        if name == DEFAULT_CREDENTIAL:
            raise ValueError(f"{DEFAULT_CREDENTIAL!r} is the name of the key in api_key; choose another")
        return name

    @model_validator(mode="after")
    def _only_quotas_are_kept_free(self) -> Self:
        if self.mode == "api" and (self.keep_free, self.burst) != (0.0, 0.25):
            raise ValueError('keep_free and burst are of a quota, so they need mode = "subscription"')
        return self

    def key(self, environ: Mapping[str, str] = os.environ) -> str | None:
        """Return the key or token itself, or None when there is none (yet)."""
        return _read_secret(self.secret, environ)

    @property
    def quota(self) -> dict[str, float] | None:
        """How a subscription's windows may be used, as the scripts in Redis take it; None: a key has none."""
        return {"keep_free": self.keep_free, "burst": self.burst} if self.mode == "subscription" else None


class ProviderSettings(Section):
    """One place that serves models.

    ``api_key`` is a key, or ``env:NAME`` to read it from the environment; a server that needs none
    has none. It is the credential named "default", beside those in ``credentials``.
    ``price_list`` names the provider whose published prices apply (default: the provider's
    own name, else its address, where the price library knows it). The fleet together sends no more
    than ``requests_per_minute`` and ``tokens_per_minute``, and has no more than ``concurrency`` calls
    in flight; without them it keeps to what the provider's own headers say.
    """

    kind: str
    base_url: str
    api_key: SecretStr | None = None
    credentials: tuple[CredentialSettings, ...] = Field(default=(), max_length=16)
    price_list: str | None = None
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, gt=0, le=100_000)

    @field_validator("kind")
    @classmethod
    def _has_an_adapter(cls, kind: str) -> str:
        known = provider_kinds()
        if kind not in known:
            raise ValueError(f"{kind!r} is not allowed; allowed: {', '.join(known)}")
        return kind

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:  # an absurd port raises
            raise ValueError("a base URL starts with http:// or https:// and names a host")
        if "@" in parts.netloc:
            raise ValueError("a base URL holds no user or password; a key belongs in api_key")
        return url.rstrip("/")

    @field_validator("credentials")
    @classmethod
    def _have_names_of_their_own(cls, credentials: tuple[CredentialSettings, ...]) -> tuple[CredentialSettings, ...]:
        names = [credential.name for credential in credentials]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two of them are named {twice!r}; each needs a name of its own")
        return credentials

    def key(self, environ: Mapping[str, str] = os.environ) -> str | None:
        """Return the API key itself, or None when there is none (yet)."""
        return None if self.api_key is None else _read_secret(self.api_key, environ)

    def keys(self, environ: Mapping[str, str] = os.environ) -> dict[str, str | None]:
        """Return the secret of each credential that is there, by name; None: the server needs no key."""
        found = {one.name: key for one in self.credentials if (key := one.key(environ)) is not None}
        default = self.key(environ)
        if default is not None or (self.api_key is None and not self.credentials):
            return {DEFAULT_CREDENTIAL: default, **found}
        return dict(found)

    def variables(self) -> dict[str, str]:
        """Return the environment variable that each credential is read from, by name; others stand here themselves."""
        secrets = {DEFAULT_CREDENTIAL: self.api_key, **{one.name: one.secret for one in self.credentials}}
        sources = {name: secret.get_secret_value() for name, secret in secrets.items() if secret is not None}
        return {name: text.removeprefix("env:") for name, text in sources.items() if text.startswith("env:")}

    def usable(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether calls can be made: no key is needed, or there is one."""
        return bool(self.keys(environ))


class ModelSettings(Section):
    """A model beyond the catalog, or the fields in which one of the catalog's should differ.

    Prices are in USD per million tokens. ``enabled = false`` takes a model out.
    """

    id: str = Field(min_length=1)
    provider: str
    tier: ModelTier | None = None
    context_window: int | None = Field(default=None, gt=0)
    max_output_tokens: int | None = Field(default=None, gt=0)
    capabilities: frozenset[str] | None = None
    input_cost_per_million: Decimal | None = Field(default=None, ge=0)
    output_cost_per_million: Decimal | None = Field(default=None, ge=0)
    cache_read_cost_per_million: Decimal | None = Field(default=None, ge=0)
    cache_write_cost_per_million: Decimal | None = Field(default=None, ge=0)
    enabled: bool = True

    @model_validator(mode="after")
    def _prices_are_whole(self) -> Self:
        if (self.input_cost_per_million is None) != (self.output_cost_per_million is None):
            raise ValueError("input_cost_per_million and output_cost_per_million go together")
        own = self.cache_read_cost_per_million is not None or self.cache_write_cost_per_million is not None
        if own and self.input_cost_per_million is None:
            raise ValueError("prices of cached tokens need input_cost_per_million and output_cost_per_million too")
        return self


class RetrySettings(Section):
    """How often one job may call providers, over all models and layers together, and how long it waits between.

    A worker whose job would have to wait longer than ``patience_seconds`` puts it back and takes another.
    """

    max_attempts: int = Field(default=4, ge=1, le=20)
    max_attempts_per_model: int = Field(default=2, ge=1, le=20)
    backoff_seconds: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    backoff_cap_seconds: float = Field(default=8.0, ge=0, allow_inf_nan=False)
    patience_seconds: float = Field(default=2.0, ge=0, allow_inf_nan=False)


class HttpSettings(Section):
    """Limits of one HTTP call, in seconds and bytes; ``proxy`` is the URL of one that all calls go through."""

    connect_timeout_seconds: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    request_timeout_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    max_response_bytes: int = Field(default=32 * 2**20, gt=0)
    proxy: SecretStr | None = None

    @field_validator("proxy")
    @classmethod
    def _is_http(cls, proxy: SecretStr | None) -> SecretStr | None:
        return proxy and with_scheme(proxy, "http", "https")


class BreakerSettings(Section):
    """When the fleet stops calling a provider's tier, and how it finds out that it is well again.

    A circuit opens at ``failure_threshold`` consecutive failures of the fleet within ``window_seconds``,
    for ``recovery_timeout_seconds``, doubled at each failed probe up to ``max_open_seconds``; then
    ``half_open_calls`` probes at a time may try. ``failure_rate_threshold`` and, for calls longer than
    ``slow_call_seconds``, ``slow_call_rate_threshold`` open it too, from ``minimum_calls`` in the window
    on. Unless ``lone_worker_opens``, failures of one worker alone do not while others succeed (in the last 30 s).
    """

    failure_threshold: int = Field(default=5, ge=1, le=100)
    window_seconds: float = Field(default=300.0, gt=0, le=86_400)
    recovery_timeout_seconds: float = Field(default=60.0, gt=0, le=86_400)
    max_open_seconds: float = Field(default=120.0, gt=0, le=86_400)
    half_open_calls: int = Field(default=1, ge=1, le=100)
    failure_rate_threshold: float | None = Field(default=None, gt=0, le=1)
    slow_call_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    slow_call_rate_threshold: float | None = Field(default=None, gt=0, le=1)
    minimum_calls: int = Field(default=20, ge=1, le=100_000)
    lone_worker_opens: bool = False

    @model_validator(mode="after")
    def _slow_calls_are_whole(self) -> Self:
        if (self.slow_call_seconds is None) != (self.slow_call_rate_threshold is None):
            raise ValueError("slow_call_seconds and slow_call_rate_threshold go together")
        return self


class LimitSettings(Section):
    """How rate limits are kept.

    At most ``burst_seconds`` worth of a minute's allowance goes out at once, and the rest is spread evenly. A
    window of the last sixty seconds, in whole slots of five, sees to it that they never see more than the limit.
    ``learn``: keep to the limits in the providers' headers too.
    """

    burst_seconds: float = Field(default=2.0, gt=0, le=60)
    learn: bool = True


class BudgetSettings(Section):
    """What may be spent in a day or a month (UTC).

    ``tenant``, ``workflow`` and ``provider`` say whose calls count: a name, ``*`` for each name its own
    budget, nothing for all of them together. A hard budget is never passed; a soft one warns.
    """

    per: Literal["day", "month"]
    limit_usd: Decimal = Field(ge=0, le=1_000_000, decimal_places=9)
    tenant: Name | None = None
    workflow: Name | None = None
    provider: Name | None = None
    hard: bool = True


class AuthSettings(Section):
    """How it is decided whether a call is paid for out of a subscription or by the token.

    The strategy is kept in ``file`` (default: ``attune-worker/auth.json`` in the user's configuration folder) or,
    with ``store = "redis"``, where the whole fleet shares it. A job that is to go by a subscription whose quota is
    used up waits for the quota, unless ``spill_to_api`` lets it go by a key that is paid by the token. A key that its
    provider has refused is tried again by one call every ``recheck_seconds``.
    """

    store: Literal["file", "redis"] = "file"
    file: Path | None = None
    spill_to_api: bool = False
    recheck_seconds: float = Field(default=60.0, gt=0, le=86_400)


class RoutingSettings(Section):
    """How models are chosen from what the fleet has learned.

    With ``adaptive`` the cheapest model wins that succeeds often enough (``min_success_rate``, unless the job
    says otherwise); about ``exploration`` of the jobs try another one. What was learned is read again every
    ``refresh_seconds``.
    """

    adaptive: bool = True
    min_success_rate: float = Field(default=0.8, ge=0, le=1)
    exploration: float = Field(default=0.05, ge=0, le=0.5)
    refresh_seconds: float = Field(default=1.0, gt=0, le=3600)


class RecoverySettings(Section):
    """How the jobs of a worker that died go on elsewhere, and how a worker ends.

    A worker that has not been heard of for ``lease_seconds`` is dead: others take over its jobs. A job that
    ``max_crashes`` workers died with is dead, too. A worker that is told to end goes on for up to
    ``shutdown_grace_seconds`` with what it runs, and hands back the rest.
    """

    lease_seconds: float = Field(default=7.0, ge=1, le=600)
    max_crashes: int = Field(default=3, ge=1, le=100)
    shutdown_grace_seconds: float = Field(default=60.0, ge=0, le=86_400)


class LedgerSettings(Section):
    """How long the records of calls and their costs are kept.

    Each call's record is kept for ``retention_days``, but no more than about ``max_records`` of all; the sums of
    each day for ``sums_retention_days``.
    """

    retention_days: int = Field(default=35, ge=1, le=3660)
    max_records: int = Field(default=1_000_000, ge=1000, le=1_000_000_000)
    sums_retention_days: int = Field(default=400, ge=2, le=3660)


@cache
def provider_kinds() -> tuple[str, ...]:
    """Return the wire formats that are installed, without loading any of them."""
    return tuple(sorted({point.name for point in entry_points(group=PROVIDER_GROUP)}))


def _read_secret(secret: SecretStr, environ: Mapping[str, str]) -> str | None:
    value = secret.get_secret_value()
    if value.startswith("env:"):
        value = environ.get(value.removeprefix("env:"), "")
    key = value.strip()  # keys that were read from files end in a line break
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the API key holds characters that no HTTP header can carry; is it the real one?")
    return key or None


def with_scheme(url: SecretStr, *schemes: str) -> SecretStr:
    """Return ``url``, or raise ``ValueError`` unless it begins with one of these; its text may be a secret."""
    if url.get_secret_value().partition("://")[0] not in schemes or "://" not in url.get_secret_value():
        raise ValueError(f"the URL should start with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    return url
