"""What goes over the wire: a job as it is submitted, and the result as it is read back?

All of it is JSON. ``Job`` refuses what it does not know, so that a typo in a field name is an
error at submission; ``JobResult`` ignores what it does not know, so that an older reader can read
a newer record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from attune_worker.errors import InvalidJobError

MAX_METADATA_DEPTH = 50
"""Far below where JSON parsers give up."""

MAX_FIELD_CHARACTERS = 100
"""Of a field's path in an error message: metadata may be nested without end."""

WIRE_VERSION = 1
"""Version of the job record; a reader refuses versions that it does not know."""

MAX_COUNT = 2**31 - 1
"""Largest number of tokens or milliseconds that a job may ask for; no provider and no clock needs more."""

MAX_DEADLINE_SECONDS = 366 * 86_400.0
"""A year: Redis keeps a deadline in milliseconds, exactly."""

NANO_USD = Decimal("1e-9")
"""Smallest amount of money that is kept; prices are per million tokens, so a token costs nano-dollars."""

Usd = Annotated[Decimal, PlainSerializer(lambda amount: format(amount, "f"), return_type=str, when_used="json")]
"""An amount in US dollars: ``Decimal`` in Python, a plain decimal string in JSON, never a float."""

Name = Annotated[str, Field(min_length=1, max_length=256)]


class AuthMode(StrEnum):
    """How a call is paid for: out of a subscription's quota, or by the token. AUTO lets the auth strategy say."""

    SUBSCRIPTION = "subscription"
    API = "api"
    AUTO = "auto"


class ModelTier(StrEnum):
    """How strong, and how dear, a model is."""

    CHEAP = "cheap"
    CAPABLE = "capable"
    PREMIUM = "premium"


class JobStatus(StrEnum):
    """Where a job is.

    ``unknown``: no record of it, which is not the same as waiting. ``waiting``: it was started, and goes on later.
    ``dead``: too many workers died while they ran it, so no other is risked.
    """

    UNKNOWN = "unknown"
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the job."""
        return self in _ENDED


_ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED, JobStatus.DEAD})


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Message(_Value):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)

    @field_validator("content")
    @classmethod
    def _has_text(cls, content: str) -> str:
        if not content.strip():
            raise ValueError("it is empty; it must hold some text")
        return content


def _depth(value: object) -> int:
    """Return how many objects and arrays stand within each other."""
    depth, level = 0, [value]
    while level:
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        depth += bool(inner)
        level = [part for one in inner for part in one]
    return depth


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _plain(amount: Decimal) -> Decimal:
    return amount.normalize()  # 0.1 and 0.10 are one amount, and so one job


def _no_float_dust(value: object) -> object:
    return str(value) if isinstance(value, float) else value


def _nobodys_wish(mode: AuthMode | None) -> AuthMode | None:
    return None if mode is AuthMode.AUTO else mode  # so that both ways to wish for nothing are one job


MaxCost = Annotated[
    Usd, BeforeValidator(_no_float_dust), Field(ge=0, le=1_000_000, decimal_places=9), AfterValidator(_plain)
]


class Job(_Value):
    """A request for one answer from a language model.

    Give either ``prompt`` or ``messages``. ``task_type`` decides the tier unless ``tier_hint`` or
    ``model`` says otherwise; ``workflow`` and ``stage`` name the place in the caller's program, for
    routing and reports (``stage`` defaults to the task type). ``max_cost`` is in USD for the whole
    job. ``max_latency_ms`` bounds the time that 95 of 100 answers of the model take, and ``min_success_rate``
    (0 to 1) is what its stage should achieve on average; both go by what the fleet has seen there. Where no
    model meets them, the one that comes closest serves the job with ``best_effort``; without it the job fails.
    ``auth_mode`` is how its calls are to be paid for, where the auth strategy should not say; ``spill_to_api`` says
    whether it may go by a key that is paid by the token when it was to go by a subscription that has no quota left
    (None: as the settings say). ``module_lines`` is the size of the module it is about, for the strategy.
    ``priority`` runs from 0 (first) to 9 (last). ``deadline_seconds`` counts from submission.
    ``idempotency_key`` makes submission repeatable: same tenant, same key, same job.
    ``metadata`` is any JSON object; it comes back with the result and is never sent to a provider.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    task_type: Name
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    system: str | None = None
    workflow: Name = "default"
    stage: Name | None = None
    model: Name | None = None
    tier_hint: ModelTier | None = None
    provider_hint: Name | None = None
    max_cost: MaxCost | None = None
    max_latency_ms: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    min_success_rate: float | None = Field(default=None, ge=0, le=1)
    best_effort: bool = True
    max_tokens: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    temperature: float | None = Field(default=None, ge=0, le=2)
    stop: Annotated[
        tuple[Name, ...], BeforeValidator(_one_or_many, json_schema_input_type=Name | tuple[Name, ...])
    ] = ()
    tenant: Name | None = None
    user_id: Name | None = None
    session_id: Name | None = None
    idempotency_key: Name | None = None
    auth_mode: Annotated[AuthMode | None, AfterValidator(_nobodys_wish)] = None
    spill_to_api: bool | None = None
    module_lines: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    priority: int = Field(default=5, ge=0, le=9)
    deadline_seconds: float | None = Field(default=None, gt=0, le=MAX_DEADLINE_SECONDS, allow_inf_nan=False)
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _is_json(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        json.dumps(metadata, allow_nan=False)
        if _depth(metadata) > MAX_METADATA_DEPTH:
            raise ValueError(f"it is nested more than {MAX_METADATA_DEPTH} levels deep")
        return metadata

    @model_validator(mode="after")
    def _has_one_question(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages', and not both")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("'prompt' is empty; it must hold some text")
        if self.messages is not None and not any(message.role == "user" for message in self.messages):
            raise ValueError("'messages' must hold at least one message with role 'user'")
        return self

    @cached_property
    def turns(self) -> tuple[Message, ...]:
        """The conversation, whichever way it was given."""
        if self.messages is not None:
            return self.messages
        return (Message(role="user", content=self.prompt or ""),)

    @cached_property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text that the provider has to read."""
        texts = [turn.content for turn in self.turns] + [self.system or ""]
        return sum(len(text.encode(errors="surrogatepass")) for text in texts)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], *, index: int | None = None) -> Job:
        """Return the job that ``fields`` describe, or raise ``InvalidJobError`` saying what is allowed."""
        if not isinstance(fields, Mapping):
            raise InvalidJobError(f"a job is an object with fields, not {type(fields).__name__}", index=index)
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            field, message = _explain(error)
            raise InvalidJobError(message, field=field, index=index) from None

    def to_json(self) -> str:
        """Return the record's JSON: the version, and the fields that differ from their defaults.

        Raises ``InvalidJobError`` for text that UTF-8 cannot carry (lone surrogates).
        """
        try:
            fields = self.model_dump_json(exclude_defaults=True)
        except PydanticSerializationError:
            raise InvalidJobError("the job holds text that is not valid Unicode (a lone surrogate)") from None
        return f'{{"v":{WIRE_VERSION},{fields[1:]}'

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """Read a record's JSON; raises ``InvalidJobError`` for a version or fields it does not know."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidJobError("the job record is not JSON") from None
        if not isinstance(fields, dict) or fields.pop("v", None) != WIRE_VERSION:
            raise InvalidJobError(f"the job record is not of version {WIRE_VERSION}; upgrade this worker")
        return cls.parse(fields)


class Usage(_Value):
    """Tokens of one call, as the provider counted them.

    ``input_tokens`` is all of the prompt, including what was read from or written to the provider's
    cache; ``cache_write_1h_tokens`` is the part of ``cache_write_tokens`` kept for an hour, which
    Anthropic charges more for. ``output_tokens`` is all that was generated, including
    ``reasoning_tokens``.
    """

    input_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)
    cache_read_tokens: int = Field(default=0, ge=0)
    cache_write_tokens: int = Field(default=0, ge=0)
    cache_write_1h_tokens: int = Field(default=0, ge=0)
    reasoning_tokens: int = Field(default=0, ge=0)


class Candidate(_Value):
    """A model that was weighed for a job: what was known of it there, and what became of it.

    ``probability`` is the chance that it had of being chosen; the others are None where nothing is
    known. ``expected_success`` lies with 90 % certainty between ``lower`` and ``upper``.
    """

    model_id: str
    provider: str
    tier: ModelTier
    probability: float = 0.0
    expected_success: float | None = None
    lower: float | None = None
    upper: float | None = None
    expected_cost_usd: Usd | None = None
    calls: int = 0
    verdict: str = ""


class Decision(_Value):
    """How the model of a job's first call was chosen.

    ``rule``: pinned (the job named the model), static (nothing was known yet) or adaptive. ``propensity``
    is the probability with which ``chosen`` (a place in ``candidates``) was drawn. ``best_effort``: no
    candidate met what the job asks for.
    """

    rule: Literal["pinned", "static", "adaptive"]
    workflow: str
    stage: str
    floor: float
    candidates: tuple[Candidate, ...] = ()
    chosen: int = 0
    propensity: float = 1.0
    explored: bool = False
    best_effort: bool = False


class Attempt(_Value):
    """One call to a provider: what was asked, how it went, and what it cost.

    ``cost_usd`` is None where it is not known: the model has no known price, or the connection broke
    and the provider may or may not have charged for the call. ``call_id`` names the call in Redis and in the ledger.
    ``orphaned``: its worker died before it said how the call went. ``auth_mode`` says how it was paid for, and
    ``credential`` by which of the provider's keys (None: not recorded); a call by subscription costs 0.
    ``decision`` says how its model was chosen; None: the calls before it had failed.
    """

    model_id: str
    provider: str
    tier: ModelTier
    outcome: Literal["succeeded", "failed", "orphaned"]
    error_type: str | None = None
    latency_ms: int
    cost_usd: Usd | None = None
    status: int | None = None
    request_id: str | None = None
    call_id: str | None = None
    auth_mode: AuthMode = AuthMode.API
    credential: str | None = None
    decision: Decision | None = None


class JobError(_Value):
    """Why a job has no answer. ``retry_after`` is in seconds, where the provider gave it."""

    type: str
    message: str
    retry_after: float | None = None


class JobResult(_Value):
    """How a job ended. ``usage`` and ``cost_usd`` are None where they are not known, which is not 0.

    ``cost_usd`` adds up what is known of all attempts.
    ``latency_ms`` is the time of the call that answered, ``queue_ms`` from submission to the start. ``auth_mode`` is
    how the answer was paid for.
    """

    job_id: str
    status: JobStatus
    content: str | None = None
    model_id: str | None = None
    provider: str | None = None
    tier: ModelTier | None = None
    auth_mode: str | None = None
    usage: Usage | None = None
    cost_usd: Usd | None = None
    latency_ms: int | None = None
    queue_ms: int | None = None
    finish_reason: str | None = None
    attempts: tuple[Attempt, ...] = ()
    error: JobError | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        """Whether there is an answer in ``content``."""
        return self.status is JobStatus.SUCCEEDED


def total_cost(attempts: Sequence[Attempt]) -> Decimal | None:
    """Add up what is known of the attempts' costs: 0 when there were none, None when nothing is known."""
    if not attempts:
        return Decimal(0)
    known = [attempt.cost_usd for attempt in attempts if attempt.cost_usd is not None]
    return sum(known, Decimal(0)) if known else None


def _explain(error: ValidationError) -> tuple[str | None, str]:
    """Turn pydantic's first complaint into one line that never repeats the input's text."""
    first = error.errors(include_url=False, include_context=True, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])[:MAX_FIELD_CHARACTERS] or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = Message if first["loc"][0] == "messages" else Job
        message = f"unknown field; allowed: {', '.join(known.model_fields)}"
    elif first["type"] == "missing":
        message = "this field is required"
    return field, f"{field!r}: {message}" if field else message
