"""What is configured, and where did each value come from?

Values are looked up in the environment (``ATTUNE_*``, ``__`` between levels), then in ``attune.toml``
(or the file that ``ATTUNE_CONFIG`` names), then in the defaults below. Settings are frozen; unknown
keys are refused, in the file and in the environment; secrets never print.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from attune_worker.errors import ConfigurationError
from attune_worker.sections import (
    AuthSettings,
    BreakerSettings,
    BudgetSettings,
    CredentialSettings,
    HttpSettings,
    LedgerSettings,
    LimitSettings,
    ModelSettings,
    ProviderSettings,
    RecoverySettings,
    RetrySettings,
    RoutingSettings,
    with_scheme,
)

PREFIX = "ATTUNE_"
DEFAULT_FILE = "attune.toml"

CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
"""What the URL of a Redis Cluster begins with; it names one of its nodes, or several with commas between."""

DEFAULT_PROVIDERS: Mapping[str, Mapping[str, str]] = {
    "anthropic": {
        "kind": "anthropic",
        "base_url": "https://api.anthropic.com",
        "api_key": "env:ANTHROPIC_API_KEY",
    },
    "openai": {
        "kind": "openai",
        "base_url": "https://api.openai.com/v1",
        "api_key": "env:OPENAI_API_KEY",
    },
    "google": {
        "kind": "openai",
        "base_url": "https://generativelanguage.googleapis.com/v1beta/openai",
        "api_key": "env:GEMINI_API_KEY",
    },
}
"""Providers that are there without being configured; each is used once its key is in the environment."""


class Settings(BaseSettings):
    """All settings. Times are in seconds; ``redis_url`` holds the shared state.

    ``broker_url`` and ``result_backend`` default to ``redis_url``, unless that is a Redis Cluster
    (``redis+cluster://host:port,host:port``), which Celery cannot use. ``timeout_seconds`` bounds a job's calls and the
    waits between them, all together, from the moment it starts. ``provider_order`` says which
    provider is asked first when several serve a tier. ``user_hash_key`` is mixed into the hashes by
    which providers know your users: without it, whoever knows a user's name can recognise its hash.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    broker_url: SecretStr | None = None
    result_backend: SecretStr | None = None
    namespace: str = Field(default="attune", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    queue: str = Field(default="attune", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    retention_seconds: int = Field(default=86_400, gt=0, le=10 * 366 * 86_400)
    timeout_seconds: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    default_max_tokens: int = Field(default=4096, gt=0)
    concurrency: int = Field(default=500, ge=1, le=10_000)
    redis_timeout_seconds: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    retry: RetrySettings = RetrySettings()
    http: HttpSettings = HttpSettings()
    breaker: BreakerSettings = BreakerSettings()
    limits: LimitSettings = LimitSettings()
    auth: AuthSettings = AuthSettings()
    routing: RoutingSettings = RoutingSettings()
    recovery: RecoverySettings = RecoverySettings()
    ledger: LedgerSettings = LedgerSettings()
    budgets: tuple[BudgetSettings, ...] = Field(default=(), max_length=64)
    provider_order: tuple[str, ...] = ("anthropic", "openai", "google")
    providers: dict[str, ProviderSettings] = Field(default_factory=dict, validate_default=True)
    models: tuple[ModelSettings, ...] = ()
    user_hash_key: SecretStr = SecretStr("")

    @field_validator("redis_url")
    @classmethod
    def _is_redis_or_a_cluster(cls, url: SecretStr) -> SecretStr:
        return with_scheme(url, "redis", "rediss", *CLUSTER_SCHEMES)

    @field_validator("result_backend")
    @classmethod
    def _is_redis(cls, url: SecretStr | None) -> SecretStr | None:
        return url and with_scheme(url, "redis", "rediss")

    @field_validator("broker_url")
    @classmethod
    def _is_a_broker(cls, url: SecretStr | None) -> SecretStr | None:
        return url and with_scheme(url, "redis", "rediss", "amqp", "amqps")

    @model_validator(mode="before")
    @classmethod
    def _with_default_providers(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = values.get("providers") or {}
        if isinstance(given, dict) and all(isinstance(table, dict) for table in given.values()):
            merged = {name: dict(table) for name, table in DEFAULT_PROVIDERS.items()}
            for name, table in given.items():
                merged[name] = merged.get(name, {}) | table
            values["providers"] = merged
        return values

    @model_validator(mode="after")
    def _celery_has_no_cluster(self) -> Self:
        missing = [name for name in ("broker_url", "result_backend") if getattr(self, name) is None]
        if missing and is_cluster(self.redis_url.get_secret_value()):
            raise ValueError(
                f"{missing[0]}: set {' and '.join(missing)}, because redis_url is a Redis Cluster, "
                "which Celery cannot use as its broker or result backend"
            )
        return self

    @model_validator(mode="after")
    def _providers_exist(self) -> Self:
        known = ", ".join(sorted(self.providers))
        for name in self.provider_order:
            if name not in self.providers:
                raise ValueError(f"provider_order: {name!r} is not a provider; configured: {known}")
        for index, model in enumerate(self.models):
            if model.provider not in self.providers:
                raise ValueError(f"models.{index}.provider: {model.provider!r} is not a provider; configured: {known}")
        for index, budget in enumerate(self.budgets):
            if budget.provider not in (None, "*", *self.providers):
                raise ValueError(
                    f"budgets.{index}.provider: {budget.provider!r} is not a provider; configured: {known}"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # pydantic-settings fixes the signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller passed: ``load`` has already laid the environment over the file."""
        return (init_settings,)

    @classmethod
    def load(cls, file: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the file and the environment; raises ``ConfigurationError`` in one line that says what to change.

        Without ``file`` it is the one that ``ATTUNE_CONFIG`` names, else ``attune.toml`` in the current folder if
        there is one.
        """
        path, in_file = _read_file(file or environ.get(f"{PREFIX}CONFIG"))
        in_environ = _read_environ(cls, environ)
        try:
            settings = cls(**_laid_over(in_file, in_environ))
        except ValidationError as error:
            raise ConfigurationError(_explain(error, path, in_environ)) from None
        settings._check_keys(environ)
        return settings

    def _check_keys(self, environ: Mapping[str, str]) -> None:
        for name, provider in self.providers.items():
            places = {"api_key": provider} | {f"credentials.{one.name}.secret": one for one in provider.credentials}
            for place, holder in places.items():
                try:
                    holder.key(environ)
                except ValueError as error:
                    raise ConfigurationError(f"providers.{name}.{place}: {error}") from None

    @property
    def broker(self) -> str:
        """The broker's URL, with its password."""
        return (self.broker_url or self.redis_url).get_secret_value()

    @property
    def backend(self) -> str:
        """The result backend's URL, with its password."""
        return (self.result_backend or self.redis_url).get_secret_value()


@cache
def get_settings() -> Settings:
    """Return this process's settings, read once."""
    return Settings.load()


def is_cluster(url: str) -> bool:
    """Whether ``url`` is that of a Redis Cluster."""
    return url.partition("://")[0] in CLUSTER_SCHEMES


def masked(url: str) -> str:
    """Return ``url`` without its password, for messages.

    Cut by hand, because URL parsers give up on passwords with unescaped characters, and know neither
    several servers in one URL nor ``?password=``.
    """
    scheme, _, rest = re.sub(r"(?i)(password=)[^&]*", r"\1***", url).partition("://")
    credentials, _, host = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{scheme}://{user}:***@{host}" if colon else f"{scheme}://{rest}"


def _read_file(file: Path | str | None) -> tuple[str, dict[str, Any]]:
    path = Path(file or DEFAULT_FILE)
    try:
        with path.open("rb") as stream:
            return str(path), tomllib.load(stream)
    except FileNotFoundError:
        if file is None:
            return str(path), {}
        raise ConfigurationError(f"{path}: there is no such file; ATTUNE_CONFIG must name an existing one") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: is not valid TOML: {error}") from None


def _read_environ(cls: type[Settings], environ: Mapping[str, str]) -> dict[str, Any]:
    names = {name for name in environ if name.startswith(PREFIX) and name != f"{PREFIX}CONFIG"}
    for name in sorted(names):
        top = name.removeprefix(PREFIX).partition("__")[0].lower()
        if top not in cls.model_fields:
            close = get_close_matches(top, cls.model_fields, n=1)
            allowed = ", ".join(f"{PREFIX}{field.upper()}" for field in cls.model_fields)
            hint = f"did you mean {PREFIX}{close[0].upper()}?" if close else f"allowed: {allowed}"
            raise ConfigurationError(f"environment {name}: unknown setting; {hint}")
    source = EnvSettingsSource(cls, case_sensitive=False)
    values: dict[str, Any] = {}
    for name in sorted(names):  # one by one, so that an error can name the variable
        source.env_vars = {name.lower(): environ[name]}
        try:
            values = _laid_over(values, source())
        except (SettingsError, ValueError):
            raise ConfigurationError(f"environment {name}: it should be valid JSON") from None
    return values


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError, path: str, in_environ: Mapping[str, Any]) -> str:
    errors = error.errors(include_url=False, include_input=False)
    # An unknown key goes first: it may be the misspelt name of one that is missing.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    keys = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if not keys:  # a rule over several keys, which begins with the key it is about
        head, _, message = message.partition(": ")
        keys = head.split(".")
    if first["type"] == "extra_forbidden":
        message = _unknown_key(keys)
    elif first["type"] == "tuple_type":
        table = keys[0] in _SECTIONS
        message = f"it should be a list of tables: [[{keys[0]}]]" if table else "it should be a list"
    return f"{_origin(keys, path, in_environ)}: {message}"


def _origin(keys: list[str], path: str, in_environ: Mapping[str, Any]) -> str:
    """Return the variable that a value came from, with the way to it inside the variable's JSON, else file and key."""
    found: Any = in_environ
    depth = 0
    while depth < len(keys) and isinstance(found, Mapping) and keys[depth] in found:
        found = found[keys[depth]]
        depth += 1
    if depth < len(keys) and isinstance(found, Mapping):
        return f"{path}: {'.'.join(keys)}"
    variable = f"environment {PREFIX}{'__'.join(keys[:depth]).upper()}"
    return f"{variable}: {'.'.join(keys[depth:])}" if depth < len(keys) else variable


def _unknown_key(keys: list[str]) -> str:
    section: type[BaseModel] = _SECTIONS.get(keys[0], Settings) if len(keys) > 1 else Settings
    if section is ProviderSettings and "credentials" in keys[2:-1]:
        section = CredentialSettings
    close = get_close_matches(keys[-1], section.model_fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(section.model_fields)}"
    return f"unknown key; {hint}"


_SECTIONS: dict[str, type[BaseModel]] = {
    "providers": ProviderSettings,
    "models": ModelSettings,
    "retry": RetrySettings,
    "http": HttpSettings,
    "breaker": BreakerSettings,
    "limits": LimitSettings,
    "auth": AuthSettings,
    "routing": RoutingSettings,
    "recovery": RecoverySettings,
    "ledger": LedgerSettings,
    "budgets": BudgetSettings,
}
