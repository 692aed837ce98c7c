"""Is a piece of work of some size better paid for out of a subscription, or by the token?

strategy = AuthStrategy(subscription_tier="max", medium_module_threshold=3000)
strategy.get_recommended_mode(1200)  # AuthMode.SUBSCRIPTION
strategy.save()

The strategy is a value: what it decides follows from its fields and the number of lines alone. ``get_auth_strategy``
(``auth_current.py``) returns the one that a process goes by.
"""

from __future__ import annotations

import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from attune_worker.errors import ConfigurationError, InvalidJobError
from attune_worker.jobs import MAX_COUNT, AuthMode, ModelTier
from attune_worker.models.auth_costs import estimate, model_for, pros_and_cons
from attune_worker.models.auth_json import Complaint, entries, explain
from attune_worker.models.auth_store import FileStore, RedisStore, auth_store
from attune_worker.models.learned_lines import LearnedLines
from attune_worker.models.registry import Registry, get_registry
from attune_worker.settings import Settings, get_settings

logger = logging.getLogger(__name__)

DEFAULT_TOKENS_PER_LINE = 12.0
"""The top modules of Python 3.11's standard library have 46.7 bytes for each line of code, with comments and blank
lines, and a token is about four bytes (``routing.BYTES_PER_TOKEN``)."""

MIN_TOKENS_PER_LINE = 0.1
"""With fewer, the longest prompt would be more lines than ``MAX_COUNT``, and no mode could be recommended: Redis keeps
a text of 512 MiB, which is 2**27 tokens. What is learned (``learned_lines``) stays above, and below the following."""

MAX_TOKENS_PER_LINE = 10_000.0


class SubscriptionTier(StrEnum):
    """The plan that is paid for at the provider. FREE and API_ONLY have no quota that a fleet could use."""

    FREE = "free"
    PRO = "pro"
    MAX = "max"
    ENTERPRISE = "enterprise"
    API_ONLY = "api_only"

    @property
    def has_subscription(self) -> bool:
        """Whether calls can be paid for out of the plan."""
        return self not in {SubscriptionTier.FREE, SubscriptionTier.API_ONLY}


WINDOW_TOKENS = {SubscriptionTier.PRO: 19_000, SubscriptionTier.MAX: 88_000}
"""An assumption, as of 2026-11: tokens of a plan's window of five hours. Providers publish no such numbers, and change
what they are. These are from what monitors of Claude Code assume, which differ among themselves (44,000 for Pro is
common, too): low ones, and for MAX the smaller of its two sizes, because a share of the quota had better be shown too
high. Of other plans nothing is known. ``AuthStrategy.window_tokens`` overrides them."""


class Recommendation(NamedTuple):
    """A mode, never AUTO, and the constraint that decided."""

    mode: AuthMode
    reason: str


class Multiplier(NamedTuple):
    """Tokens of the prompt for each line of code; ``jobs`` is how many it was learned from."""

    tokens_per_line: float
    source: Literal["set", "learned", "default"]
    jobs: int = 0


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    subscription_tier: SubscriptionTier = SubscriptionTier.PRO
    default_mode: AuthMode = AuthMode.AUTO
    small_module_threshold: int = Field(default=500, ge=0, le=MAX_COUNT, strict=True)
    medium_module_threshold: int = Field(default=2000, ge=0, le=MAX_COUNT, strict=True)
    prefer_subscription: bool = Field(default=True, strict=True)
    tokens_per_line: float | None = Field(
        default=None, ge=MIN_TOKENS_PER_LINE, le=MAX_TOKENS_PER_LINE, allow_inf_nan=False, strict=True
    )
    window_tokens: int | None = Field(default=None, gt=0, le=10**12, strict=True)

    @model_validator(mode="after")
    def _thresholds_ascend(self) -> Self:
        if self.small_module_threshold > self.medium_module_threshold:
            raise ValueError(
                f"small_module_threshold: {self.small_module_threshold} is more than medium_module_threshold, "
                f"{self.medium_module_threshold}; it should be at most that"
            )
        return self


class AuthStrategy(_Fields):
    """How it is decided whether a call goes by a subscription or by the token.

    ``default_mode`` other than AUTO always wins. With AUTO and a plan that has a subscription, fewer lines than
    ``small_module_threshold`` go by it, fewer than ``medium_module_threshold`` if ``prefer_subscription``, and the
    rest by the token. ``tokens_per_line`` (None: what the fleet has learned, else ``DEFAULT_TOKENS_PER_LINE``) and
    ``window_tokens``, the quota of five hours (None: the assumption in ``WINDOW_TOKENS``), are for estimates alone.

    Fields can be assigned. Raises ``ConfigurationError``, and changes nothing, for a value that makes no sense. To
    change several that depend on each other, make a new one: ``AuthStrategy(**dict(strategy) | {...})``.
    """

    _settings: Settings | None = PrivateAttr(default=None)
    _learned: LearnedLines | None = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            key, problem = _complaint(error)
            raise ConfigurationError(f"{key}: {problem}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        # Not validate_assignment: it leaves a value in place that a rule over several fields has refused.
        if name in _Fields.model_fields:
            value = getattr(type(self)(**{**dict(self), name: value}), name)
        elif not name.startswith("_"):
            raise ConfigurationError(f"{name}: {explain('extra_forbidden', name, '', _Fields.model_fields)}")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AuthStrategy) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]  # fields can be assigned

    def get_recommended_mode(self, module_lines: int) -> AuthMode:
        """Return SUBSCRIPTION or API for a module of so many lines; one DEBUG line says why.

        Raises ``InvalidJobError`` for what is no number of lines.
        """
        mode, reason = self.recommend(module_lines)
        logger.debug("auth mode of a module of %d lines: %s, because %s", module_lines, mode, reason)
        return mode

    def recommend(self, module_lines: int) -> Recommendation:
        """Return the mode with the constraint that decided; raises ``InvalidJobError`` as above."""
        lines = _lines(module_lines)
        small, medium = self.small_module_threshold, self.medium_module_threshold
        if self.default_mode is not AuthMode.AUTO:
            return Recommendation(self.default_mode, f"default_mode is {self.default_mode}")
        if not self.subscription_tier.has_subscription:
            return Recommendation(AuthMode.API, f"the plan {self.subscription_tier} has no subscription")
        if lines < small:
            return Recommendation(AuthMode.SUBSCRIPTION, f"it is below small_module_threshold ({small})")
        if lines >= medium:
            return Recommendation(AuthMode.API, f"it is not below medium_module_threshold ({medium})")
        if self.prefer_subscription:
            reason = f"it is below medium_module_threshold ({medium}), and prefer_subscription is on"
            return Recommendation(AuthMode.SUBSCRIPTION, reason)
        reason = f"it is not below small_module_threshold ({small}), and prefer_subscription is off"
        return Recommendation(AuthMode.API, reason)

    def estimate_cost(
        self,
        module_lines: int,
        mode: AuthMode | str | None = None,
        *,
        model: str | None = None,
        tier: ModelTier | str | None = None,
        output_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Return what one call about a module of so many lines takes; AUTO and None mean the recommended mode.

        It is for ``model`` (``id`` or ``provider/id``), else the preferred model of ``tier`` (default: capable).
        Without ``output_tokens`` the answer is a quarter of the prompt long, at most ``default_max_tokens``. The keys:

        - ``mode``: SUBSCRIPTION or API; ``model``: ``provider/id``
        - ``monetary_cost``: USD, ``Decimal``; 0 by subscription; None: the model's price is not known
        - ``quota_cost``: the share of the plan's window of five hours, ``Decimal``; 0 by API; None: it is not known
        - ``tokens_used``, and of them ``input_tokens`` and ``output_tokens``
        - ``fits_in_context``: whether they fit the model's window, ``context_window``; None: it is not known
        - ``window_tokens``: what ``quota_cost`` is a share of
        - ``tokens_per_line``, and where it comes from, ``tokens_source``: ``set``, ``learned`` or ``default``

        Raises ``InvalidJobError`` for what is no number, ``ConfigurationError`` for an unknown mode, model or tier.
        """
        lines = _lines(module_lines)
        found = model_for(self._registry(), model, tier)
        multiplier = self.multiplier()
        if output_tokens is not None:
            output_tokens = _count("output_tokens", output_tokens)
        return estimate(
            self._resolved(lines, mode),
            found,
            input_tokens=_tokens(lines, multiplier.tokens_per_line),
            output_tokens=output_tokens,
            default_max_tokens=(self._settings or get_settings()).default_max_tokens,
            window_tokens=self.quota_window(),
        ) | {"tokens_per_line": multiplier.tokens_per_line, "tokens_source": multiplier.source}

    def get_pros_cons(self, module_lines: int, **model: Any) -> dict[str, Any]:
        """Compare both modes for a module of so many lines; ``model`` and the errors are those of ``estimate_cost``.

        The keys: ``module_lines``; ``subscription`` and ``api``, each with ``name``, ``cost`` (what ``estimate_cost``
        returns), ``pros`` and ``cons`` (lists of sentences); ``recommendation``, the mode, and its ``reason``.
        """
        mode, reason = self.recommend(module_lines)
        subscription = self.estimate_cost(module_lines, AuthMode.SUBSCRIPTION, **model)
        api = self.estimate_cost(module_lines, AuthMode.API, **model)
        compared = pros_and_cons(subscription, api, has_plan=self.subscription_tier.has_subscription)
        return {"module_lines": module_lines, **compared, "recommendation": mode, "reason": reason}

    def bound(self, settings: Settings, learned: LearnedLines | None = None) -> Self:
        """Say whose models, prices and place to keep it, and whose experience with tokens, this strategy goes by."""
        self._settings, self._learned = settings, learned
        return self

    def multiplier(self) -> Multiplier:
        """Return how many tokens a line is taken for, and who says so: these settings, the fleet's jobs, or nobody."""
        if self.tokens_per_line is not None:
            return Multiplier(self.tokens_per_line, "set")
        learned = None if self._learned is None else self._learned.latest()
        if learned is not None:
            return Multiplier(learned.tokens_per_line, "learned", learned.jobs)
        return Multiplier(DEFAULT_TOKENS_PER_LINE, "default")

    def quota_window(self) -> int | None:
        """Return the tokens that the plan's window of five hours is taken for; None: it is not known."""
        return self.window_tokens or WINDOW_TOKENS.get(self.subscription_tier)

    def save(self, file: Path | str | None = None, *, settings: Settings | None = None) -> None:
        """Keep it where ``settings.auth`` says, or in ``file``: all of it or nothing, for its owner's eyes alone.

        Raises ``ConfigurationError`` where the file cannot be written, ``ServiceUnavailableError`` where Redis is away.
        """
        _store(file, settings or self._settings).write(self.to_json().encode())

    @classmethod
    def load(cls, file: Path | str | None = None, *, settings: Settings | None = None) -> AuthStrategy:
        """Return the strategy that is kept; the defaults where none is.

        Raises ``ConfigurationError`` naming the file, the line and what is wrong there, and
        ``ServiceUnavailableError`` where Redis is away.
        """
        store = _store(file, settings)
        saved = store.read()
        strategy = cls() if saved is None else cls.from_json(saved.raw, store.place)
        return strategy if settings is None else strategy.bound(settings)

    def to_json(self) -> str:
        """Return the text that is kept."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: bytes | str, place: str) -> AuthStrategy:
        """Read a text that was kept at ``place``; raises ``ConfigurationError`` as ``load`` does."""
        found = entries(text, place)
        fields = {key: entry.value for key, entry in found.items()}
        try:
            _Fields(**fields)
        except ValidationError as error:
            key, problem = _complaint(error)
            line = found[key].line if key in found else 1
            raise ConfigurationError(f"{place}, line {line}: {key}: {problem}") from None
        return cls(**fields)

    def _resolved(self, lines: int, mode: AuthMode | str | None) -> AuthMode:
        try:
            wanted = AuthMode.AUTO if mode is None else AuthMode(mode)
        except ValueError:
            raise ConfigurationError(f"mode: {mode!r} is not allowed; allowed: {', '.join(AuthMode)}") from None
        return self.recommend(lines).mode if wanted is AuthMode.AUTO else wanted

    def _registry(self) -> Registry:
        return get_registry() if self._settings is None else Registry.from_settings(self._settings)


def _store(file: Path | str | None, settings: Settings | None) -> FileStore | RedisStore:
    return auth_store(settings or get_settings()) if file is None else FileStore(Path(file))


def _lines(module_lines: object) -> int:
    return _count("module_lines", module_lines)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise InvalidJobError(f"{name!r}: {value!r} is not allowed; it should be a whole number from 0", field=name)
    return value


def _tokens(lines: int, tokens_per_line: float) -> int:
    return max(1, round(lines * tokens_per_line)) if lines else 0


def _complaint(error: ValidationError) -> Complaint:
    """Return the key at fault and what is wrong with it."""
    errors = error.errors(include_url=False, include_input=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule over several fields, which begins with the field it is about
        key, _, message = message.partition(": ")
        return Complaint(key, message)
    key = str(first["loc"][0])
    return Complaint(key, explain(first["type"], key, message, _Fields.model_fields))
