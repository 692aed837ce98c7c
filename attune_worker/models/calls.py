"""What is a call to a provider, before it is made and after it? Values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from attune_worker.budget import BudgetKey
from attune_worker.errors import CredentialError, ProviderError, RateLimitedError, StoppedError
from attune_worker.jobs import Attempt, Job
from attune_worker.models.credentials import DEFAULT, Credential
from attune_worker.models.registry import ModelInfo
from attune_worker.providers.base import Answer
from attune_worker.providers.rate_headers import Observed
from attune_worker.store.circuits import Name

PROXY_REFUSED = 407
"""It is a proxy on the way that does not let the call pass, whatever the provider thinks of the key."""

FORBIDDEN = 403

Charged = Sequence[tuple[BudgetKey, ...]]
"""The budgets that each candidate's call would count against."""


@dataclass(frozen=True, slots=True)
class Quote:
    """A model that may be called by one of its provider's credentials.

    The call takes at most ``tokens``, and costs at worst ``worst_usd`` (None: price unknown; by subscription: 0).
    ``expected_usd`` is what it should cost, going by those before it.
    """

    model: ModelInfo
    tokens: int
    worst_usd: Decimal | None
    credential: Credential = DEFAULT
    expected_usd: Decimal | None = None

    @property
    def name(self) -> str:
        """The model, and the credential where it is not the default one, in words."""
        return f"{self.model.ref}{'' if self.credential == DEFAULT else f' by {self.credential.name}'}"


@dataclass(frozen=True, slots=True)
class Request:
    """A call that is wanted, to the first of ``quotes`` that everything allows.

    ``lease`` names the worker's lease under which the job was claimed: without it, no call is allowed. Empty: the
    call is not a worker's.
    """

    call_id: str
    job_id: str
    job: Job
    quotes: tuple[Quote, ...]
    lease: str = ""


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one call to one model, to be settled once.

    ``admitted_ms`` is Redis' time. ``own_generation``: it was given without Redis, by this process's own circuit.
    ``job_id`` and ``lease`` are the request's.
    """

    call_id: str
    job: Job
    quote: Quote
    budgets: tuple[BudgetKey, ...]
    admitted_ms: int
    own_generation: int | None = None
    job_id: str = ""
    lease: str = ""

    @property
    def model(self) -> ModelInfo:
        """The model that may be called."""
        return self.quote.model

    @property
    def credential(self) -> Credential:
        """The credential by which it may be called."""
        return self.quote.credential


@dataclass(frozen=True, slots=True)
class Refusal:
    """No call may be made now: ``retry_after_seconds`` from now it may.

    ``for_budget``: money is what is missing; 0 seconds then say that time does not mend it.
    """

    reason: str
    retry_after_seconds: float
    for_budget: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call did.

    ``health`` is what it says of the provider: success, failure or ignored. ``cost_usd`` is None where it is not
    known: then what was reserved counts as spent. ``status`` is that of an HTTP answer, ``request_id`` the provider's.
    ``refused``: the provider does not accept the credential. ``worth_usd`` is what a call by subscription would have
    cost by the token, where that is known.
    """

    outcome: str
    health: str
    latency_ms: int
    cost_usd: Decimal | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str = ""
    retry_after: float | None = None
    rate_limited: bool = False
    observed: Observed | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    status: int | None = None
    request_id: str | None = None
    refused: bool = False
    worth_usd: Decimal | None = None

    @property
    def kind(self) -> str:
        """What it says of the model: success, failure, or other (the caller's fault, or nobody's)."""
        return {"success": "success", "failure": "failure"}.get(self.health, "other")

    @property
    def tokens(self) -> int | None:
        """Tokens that the provider counts against its limit; None: not known."""
        return None if self.input_tokens is None else self.input_tokens + (self.output_tokens or 0)

    @classmethod
    def of(cls, outcome: Answer | ProviderError | StoppedError, attempt: Attempt, observed: Observed | None) -> Self:
        """Return the outcome of a call that has ended."""
        if isinstance(outcome, StoppedError):
            return cls.abandoned(attempt.latency_ms)
        if isinstance(outcome, Answer):
            usage = outcome.usage
            return cls(
                "succeeded",
                "success",
                attempt.latency_ms,
                attempt.cost_usd,
                usage.input_tokens if usage else None,
                usage.output_tokens if usage else None,
                observed=observed,
                cache_read_tokens=usage.cache_read_tokens if usage else None,
                cache_write_tokens=usage.cache_write_tokens if usage else None,
                request_id=attempt.request_id,
            )
        return cls(
            "failed",
            "failure" if outcome.counts_against_breaker else "ignored",
            attempt.latency_ms,
            attempt.cost_usd,
            input_tokens=None if outcome.may_have_cost else 0,
            error=outcome.type,
            retry_after=outcome.retry_after,
            rate_limited=isinstance(outcome, RateLimitedError),
            refused=isinstance(outcome, CredentialError) and _is_of_the_key(outcome),
            observed=observed,
            status=attempt.status,
            request_id=attempt.request_id,
        )

    @classmethod
    def abandoned(cls, latency_ms: int) -> Self:
        """Return the outcome of a call that was broken off; the provider may charge for it."""
        return cls("failed", "ignored", latency_ms, error=StoppedError.type)

    @classmethod
    def released(cls) -> Self:
        """Return the outcome of a call that was allowed and never made."""
        return cls("released", "ignored", 0, Decimal(0), 0, 0)

    @classmethod
    def orphaned(cls) -> Self:
        """Return the outcome of a call whose worker died before it said what the call did."""
        return cls("orphaned", "ignored", 0)


def circuits_of(model: ModelInfo) -> tuple[Name, Name]:
    """Return the names of the circuits that a call depends on: its tier's and its provider's."""
    return (model.provider, model.tier.value), (model.provider, None)


def _is_of_the_key(error: CredentialError) -> bool:
    """Whether it is the provider that speaks, and of the key.

    A 403 in no provider's words is that of something on the way, a firewall that did not like the prompt: the key is
    good for everybody else's.
    """
    return error.status != PROXY_REFUSED and not (error.status == FORBIDDEN and error.code is None)
