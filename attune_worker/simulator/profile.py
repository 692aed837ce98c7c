"""How should the simulated provider behave? How fast, how broken, at what price, and for whom."""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from attune_worker.errors import ConfigurationError
from attune_worker.simulator.latency import FixedLatency, Latency, Value


class Fault(StrEnum):
    """A way in which a call can go wrong. The first seven are refusals; in the others the model ran, and is billed."""

    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    BAD_REQUEST = "bad_request"
    CREDENTIAL = "credential"
    SPEND_LIMIT = "spend_limit"
    CONTEXT_TOO_LONG = "context_too_long"
    HANG = "hang"
    DISCONNECT = "disconnect"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"

    @property
    def billed(self) -> bool:
        """Whether the model ran, so that the provider charges although no answer arrives."""
        return self in _BILLED


_BILLED = frozenset({Fault.HANG, Fault.DISCONNECT, Fault.TRUNCATED, Fault.MALFORMED})

RetryAfterForm = Literal["retry-after", "retry-after-ms", "http-date", "none"]


class Errors(Value):
    """The share of calls, 0 to 1, that each fault hits; together at most 1, and the rest are answered.

    ``hang``: the request is accepted and never answered. ``disconnect``: the connection closes in the
    middle of the answer. ``truncated``: a complete HTTP response whose JSON is cut. ``malformed``: a
    200 that holds a proxy's HTML page.
    """

    rate_limited: float = Field(default=0.0, ge=0, le=1)
    overloaded: float = Field(default=0.0, ge=0, le=1)
    server_error: float = Field(default=0.0, ge=0, le=1)
    bad_request: float = Field(default=0.0, ge=0, le=1)
    credential: float = Field(default=0.0, ge=0, le=1)
    spend_limit: float = Field(default=0.0, ge=0, le=1)
    context_too_long: float = Field(default=0.0, ge=0, le=1)
    hang: float = Field(default=0.0, ge=0, le=1)
    disconnect: float = Field(default=0.0, ge=0, le=1)
    truncated: float = Field(default=0.0, ge=0, le=1)
    malformed: float = Field(default=0.0, ge=0, le=1)

    @cached_property
    def bounds(self) -> tuple[tuple[float, Fault], ...]:
        """The faults that happen, each with the end of its share when the shares are laid side by side."""
        shares = [(fault, float(getattr(self, fault))) for fault in Fault]
        # fsum, because ten times 0.1 must be allowed to make exactly 1
        ends = [math.fsum(share for _, share in shares[: place + 1]) for place in range(len(shares))]
        return tuple((end, fault) for end, (fault, share) in zip(ends, shares, strict=True) if share)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.bounds and self.bounds[-1][0] > 1:
            raise ValueError(f"the shares add up to {self.bounds[-1][0]:g}; together they can be at most 1")
        return self

    def at(self, draw: float) -> Fault | None:
        """Return the fault that a draw from 0 to 1 (exclusive) falls on, or None for an answer."""
        return next((fault for end, fault in self.bounds if draw < end), None)


class RetryAfter(Value):
    """How long a rate-limited caller is told to wait, and in which header."""

    seconds: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    form: RetryAfterForm = "retry-after"


class Price(Value):
    """USD per million tokens; cached input costs as much as fresh input unless said otherwise."""

    input_usd: Decimal = Field(ge=0)
    output_usd: Decimal = Field(ge=0)
    cache_read_usd: Decimal | None = Field(default=None, ge=0)
    cache_write_usd: Decimal | None = Field(default=None, ge=0)


class Behaviour(Value):
    """How calls are treated: those of all models, or of one.

    ``requests_per_minute`` holds for each model by itself. Without ``context_window`` (tokens) no
    prompt is too long. ``price`` wins over the price library. ``served_as`` is the model id that
    answers name, the way an alias is answered by a dated model.
    """

    latency: Latency = FixedLatency()
    errors: Errors = Errors()
    retry_after: RetryAfter = RetryAfter()
    requests_per_minute: int | None = Field(default=None, gt=0)
    context_window: int | None = Field(default=None, gt=0)
    price: Price | None = None
    served_as: str | None = Field(default=None, min_length=1)


WindowName = Literal["5h", "7d"]


class Window(Value):
    """A quota of tokens, input and output together, that begins anew at each reset.

    ``used``: the share that is used up at the start. ``resets_in_seconds``: the first reset, counted from the start;
    without it the window begins with the simulator. After a reset the next is 5 hours, or 7 days, later.
    """

    capacity_tokens: int = Field(gt=0)
    used: float = Field(default=0.0, ge=0, le=1)
    resets_in_seconds: float | None = Field(default=None, gt=0, le=10**9)


class Subscription(Value):
    """What a bearer token pays with: ``windows`` instead of money.

    ``name`` is shown instead of the end of the token. ``decimals``: those of the utilization that callers are told.
    """

    windows: dict[WindowName, Window] = Field(min_length=1)
    name: str | None = Field(default=None, min_length=1)
    decimals: int = Field(default=2, ge=1, le=16)


class Profile(Behaviour):
    """Everything that decides how the simulator behaves; a field given under ``models`` replaces the one here, whole.

    ``seed``: the n-th call's fate follows from the seed and n alone. ``api_keys``: the keys that are
    accepted (default: any key); ``require_key = false`` accepts callers without one, as local servers
    do. ``subscriptions``, by their bearer token, are accepted as well, in the Anthropic format alone.
    ``refused_keys`` get a 401, ``unpaid_keys`` a 402, and ``spend_limited_keys`` what says that a spend limit is
    reached; each may hold API keys and subscriptions' tokens. ``cache``: repeated prefixes count as cache reads.
    ``only_listed_models``: a model without a table under ``models`` does not exist (404).
    """

    seed: int = 0
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    subscriptions: dict[str, Subscription] = Field(default_factory=dict, repr=False)
    refused_keys: tuple[str, ...] = Field(default=(), repr=False)
    unpaid_keys: tuple[str, ...] = Field(default=(), repr=False)
    spend_limited_keys: tuple[str, ...] = Field(default=(), repr=False)
    require_key: bool = True
    cache: bool = False
    only_listed_models: bool = False
    models: dict[str, Behaviour] = Field(default_factory=dict)

    @cached_property
    def _resolved(self) -> dict[str, Behaviour]:
        shared = {name: getattr(self, name) for name in Behaviour.model_fields}
        given = {
            model: {name: getattr(own, name) for name in own.model_fields_set} for model, own in self.models.items()
        }
        return {model: Behaviour.model_construct(**{**shared, **own}) for model, own in given.items()}

    def behaviour(self, model: str) -> Behaviour:
        """Return how calls of ``model`` are treated."""
        return self._resolved.get(model, self)

    def knows(self, model: str) -> bool:
        """Whether the provider offers ``model``."""
        return not self.only_listed_models or model in self.models

    def accepts(self, key: str | None) -> bool:
        """Whether a caller with this key may call."""
        if not key:
            return not self.require_key
        if key in self.refused_keys:
            return False
        return not self.api_keys or key in self.api_keys or key in self.subscriptions

    def key_name(self, key: str) -> str:
        """Return what a key is called where it may be seen: a subscription's name, or the end of the key."""
        subscription = self.subscriptions.get(key)
        return subscription.name if subscription and subscription.name else key_end(key)

    @model_validator(mode="after")
    def _tell_subscriptions_apart(self) -> Self:
        if both := [key for key in self.api_keys if key in self.subscriptions]:
            raise ValueError(f"{key_end(both[0])} is one of 'api_keys' and a subscription; it can be only one of them")
        for name, count in Counter(map(self.key_name, self.subscriptions)).items():
            if count > 1:
                raise ValueError(f"{count} 'subscriptions' are shown as {name}; give each a 'name' of its own")
        return self

    @classmethod
    def parse(cls, fields: Mapping[str, Any], *, source: str = "profile") -> Profile:
        """Return the profile that ``fields`` describe; raises ``ConfigurationError`` naming the field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(_shown(first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigurationError(f"{source}: {field!r}: {reason}" if field else f"{source}: {reason}") from None

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a ``.toml`` or ``.json`` file; raises ``ConfigurationError`` saying what is wrong and where."""
        path = Path(path)
        if path.suffix not in _READERS:
            raise ConfigurationError(f"{path}: a simulator profile is a .toml or .json file")
        try:
            fields = _READERS[path.suffix](path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigurationError(f"{path}: {error}") from None
        return cls.parse(fields, source=str(path))


KEYS = ("api_keys", "subscriptions", "refused_keys", "unpaid_keys", "spend_limited_keys")
"""The fields of a profile that hold keys or tokens, and are never shown."""


def key_end(key: str) -> str:
    """Return the last four characters of a key, or the last half of a short one."""
    return f"…{key[-min(4, max(1, len(key) // 2)) :]}"


def _shown(place: Sequence[int | str]) -> list[str]:
    """Return where in a profile something is wrong, without the token that a subscription's place has in it."""
    return [
        key_end(str(part)) if depth == 1 and place[0] == "subscriptions" else str(part)
        for depth, part in enumerate(place)
    ]


_READERS = {".toml": tomllib.loads, ".json": json.loads}
