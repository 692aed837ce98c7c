"""What may a job's flow ask of whoever drives it, and what is it told? Values only."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from attune_worker.errors import ProviderError, StoppedError
from attune_worker.jobs import Attempt, Job
from attune_worker.models.adaptive import Ranking
from attune_worker.models.calls import Outcome, Permit, Refusal, Request
from attune_worker.providers.base import Answer, HttpRequest, HttpResponse


@dataclass(frozen=True, slots=True)
class Rank:
    """Effect: rank the models that may serve a job; answered with a ``Ranking``. It may read Redis."""

    job: Job


@dataclass(frozen=True, slots=True)
class Admit:
    """Effect: ask leave for a call; answered with a ``Permit``, a ``Refusal``, or ``StoppedError``."""

    request: Request


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: send the request; answered with the response, the error that came instead, or ``Unsent``."""

    request: HttpRequest
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Unsent:
    """Reply to ``Send``: the job was stopped before any of the request was sent, so there was no call."""

    error: StoppedError


@dataclass(frozen=True, slots=True)
class Settle:
    """Effect: write down what a call did."""

    permit: Permit
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Wait:
    """Effect: let that much time pass; answered with ``StoppedError`` when the job is stopped meanwhile."""

    seconds: float


Effect = Rank | Admit | Send | Settle | Wait
Reply = Ranking | HttpResponse | ProviderError | StoppedError | Unsent | Permit | Refusal | None
Flow = Generator[Effect, Reply, tuple[Answer, tuple[Attempt, ...]]]
