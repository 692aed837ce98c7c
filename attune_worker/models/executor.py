"""How is an LLM job answered from Python? One object that routes, calls, settles, and falls back.

``models/flow.py`` says what happens; here it is driven, by a thread or by an event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from decimal import Decimal
from types import TracebackType
from typing import Any, Self

from pydantic import JsonValue

from attune_worker.errors import (
    ConfigurationError,
    NotNowError,
    ProviderError,
    ServiceUnavailableError,
    StoppedError,
)
from attune_worker.interruption import Interruption
from attune_worker.jobs import Attempt, Job, ModelTier, Usage, total_cost
from attune_worker.models.adaptive import AdaptiveModelRouter
from attune_worker.models.admission import Admission
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.auth_current import get_auth_strategy
from attune_worker.models.calls import Permit, Refusal, Request
from attune_worker.models.effects import Admit, Effect, Rank, Reply, Send, Settle, Unsent, Wait
from attune_worker.models.flow import Caller
from attune_worker.models.pricing import cost
from attune_worker.models.progress import Start
from attune_worker.models.registry import Registry
from attune_worker.providers.base import Answer, HttpRequest
from attune_worker.providers.http import HttpSender
from attune_worker.settings import Settings, get_settings

STRATEGY_SECONDS = 5.0
"""When to ask again for a strategy that could not be read: an operator mends its file, or Redis comes back."""

_OVERRIDES = {
    "workflow": "workflow_name",
    "stage": "step_name",
    "user_id": "user_id",
    "session_id": "session_id",
    "provider_hint": "provider_hint",
    "tier_hint": "tier_hint",
}
"""Job field, and the field of ``ExecutionContext`` that sets it."""


@dataclass(frozen=True, slots=True)
class ExecutionContext:
    """Where a call stands in the caller's program, and what the caller wishes for it.

    ``timeout_seconds`` bounds all calls and waits together. ``user_id`` reaches the provider only as
    a hash, for its abuse detection; ``session_id`` groups calls for its prompt cache.
    """

    workflow_name: str | None = None
    step_name: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    provider_hint: str | None = None
    tier_hint: ModelTier | str | None = None
    timeout_seconds: float | None = None
    metadata: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LLMResponse:
    """An answer, the model that gave it, and every attempt on the way.

    ``cost_usd`` is what is known of all attempts together; None: no price is known. ``latency_ms`` is
    the answering call's.
    """

    content: str
    model_id: str
    provider: str
    tier: ModelTier
    usage: Usage | None
    cost_usd: Decimal | None
    latency_ms: int
    finish_reason: str
    attempts: tuple[Attempt, ...]
    auth_mode: str = "api"
    request_id: str | None = None
    metadata: dict[str, JsonValue] = field(default_factory=dict)


class EmpathyLLMExecutor:
    """Routes a request to a model and calls its provider, with fallback; safe for use from many threads.

    It shares breaker, limits, budgets and what it learns with the whole fleet through Redis; while Redis is
    away it goes by what this process has seen. ``run`` and ``arun`` wait where a model has to be left alone
    for a while. They raise ``InvalidJobError`` for a request that makes no sense, ``NoCandidateError`` when no
    model may serve it, ``BudgetExceededError`` when a hard budget has no room, ``DeadlineExceededError`` when
    its time is up, and the last ``ProviderError`` when every attempt failed; each carries the ``attempts`` made.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        registry: Registry | None = None,
        strategy: Callable[[], AuthStrategy] | None = None,
    ) -> None:
        """``strategy`` returns the auth strategy to go by; without it, the one that is kept as the settings say."""
        self.settings = settings or get_settings()
        self.registry = registry or Registry.from_settings(self.settings)
        self.router = AdaptiveModelRouter(self.settings, self.registry)
        self._sender = HttpSender(self.settings.http)
        self._admission = Admission(self.settings)
        self._caller = Caller(
            self.settings, self.registry, self.router, self._admission.settle_later, strategy or self._strategy
        )

    def _strategy(self) -> AuthStrategy:
        """Return the strategy that holds now; jobs that it would decide about wait while it cannot be read."""
        try:
            return get_auth_strategy(self.settings)
        except (ConfigurationError, ServiceUnavailableError) as error:
            raise NotNowError(f"the auth strategy cannot be read: {error}", retry_after=STRATEGY_SECONDS) from error

    def run(
        self,
        task_type: str,
        prompt: str,
        system: str | None = None,
        context: ExecutionContext | None = None,
        **options: Any,
    ) -> LLMResponse:
        """Answer ``prompt``; ``options`` are further fields of ``Job``, such as ``max_tokens`` or ``model``."""
        job = _job(task_type, prompt, system, context, options)
        return self.execute(job, _time_for(job, context))

    async def arun(
        self,
        task_type: str,
        prompt: str,
        system: str | None = None,
        context: ExecutionContext | None = None,
        **options: Any,
    ) -> LLMResponse:
        """Answer as ``run`` does, without blocking the event loop."""
        job = _job(task_type, prompt, system, context, options)
        flow = self._caller.flow(Start(job, timeout_seconds=_time_for(job, context)))
        reply: Reply = None
        try:
            while True:
                reply = await self._aperform(flow.send(reply))
        except StopIteration as end:
            return _response(job, *end.value)
        finally:
            flow.close()  # a task that is cancelled leaves no call unsettled

    def execute(
        self,
        job: Job,
        timeout_seconds: float | None = None,
        *,
        job_id: str = "",
        attempts: Sequence[Attempt] = (),
        patience_seconds: float | None = None,
        lease: str = "",
        interruption: Interruption | None = None,
    ) -> LLMResponse:
        """Answer ``job`` within ``timeout_seconds``, or within the configured time if that is shorter.

        ``attempts`` were made in earlier starts of the job. With ``patience_seconds``, ``NotNowError`` is raised
        instead of a longer wait. Under a worker's ``lease`` no call begins once that is lost, nor while Redis is
        away. ``StoppedError`` is raised when ``interruption`` stops the job: a call under way is cut off, and one that
        has not begun is not made.
        """
        interruption = interruption or Interruption()
        flow = self._caller.flow(Start(job, job_id, timeout_seconds, tuple(attempts), patience_seconds, lease))
        reply: Reply = None
        try:
            while True:
                reply = self._perform(flow.send(reply), interruption)
        except StopIteration as end:
            return _response(job, *end.value)
        finally:
            flow.close()
            if isinstance(reply, Permit):  # interrupted before the call was made; one that was made is settled already
                self._admission.give_back(reply)

    def get_model_for_task(self, task_type: str) -> str:
        """Return the id of the model that would be asked first."""
        return self._caller.rank(Job(task_type=task_type, prompt="?"), None).models[0].id

    def estimate_cost(self, task_type: str, input_tokens: int, output_tokens: int) -> Decimal | None:
        """Return what a call of that size would cost in USD on the model asked first; None: price unknown."""
        model = self._caller.rank(Job(task_type=task_type, prompt="?"), None).models[0]
        return cost(model, Usage(input_tokens=input_tokens, output_tokens=output_tokens))

    def close(self) -> None:
        """Write down what Redis has not been told yet, and give connections back."""
        self._admission.close()
        self.router.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _perform(self, effect: Effect, interruption: Interruption) -> Reply:
        match effect:
            case Rank(job):
                return self._caller.rank(job)
            case Admit(request):
                return interruption.error() if interruption.stopped else self._admission.admit(request)
            case Send(request, timeout_seconds):
                return self._send(request, timeout_seconds, interruption)
            case Settle(permit, outcome):
                self._admission.settle(permit, outcome)
            case Wait(seconds):
                return interruption.error() if interruption.wait(seconds) else None
        return None

    def _send(self, request: HttpRequest, timeout_seconds: float, interruption: Interruption) -> Reply:
        if not interruption.may_begin():  # asked last: this process may have stood still since there was leave
            return Unsent(interruption.error())
        try:
            return self._sender.send(request, timeout_seconds, interruption)
        except (ProviderError, StoppedError) as error:
            return error

    async def _aperform(self, effect: Effect) -> Reply:
        match effect:
            case Admit(request):
                return await self._aadmit(request)
            case Send(request, timeout_seconds):
                try:
                    return await self._sender.asend(request, timeout_seconds)
                except ProviderError as error:
                    return error
            case Wait(seconds):
                await asyncio.sleep(seconds)
                return None
        return await asyncio.to_thread(self._perform, effect, Interruption())

    async def _aadmit(self, request: Request) -> Permit | Refusal:
        verdict: Future[Permit | Refusal] = Future()

        def ask() -> Permit | Refusal:
            verdict.set_result(self._admission.admit(request))
            return verdict.result()

        try:
            return await asyncio.to_thread(ask)
        except asyncio.CancelledError:  # the thread goes on, and nobody would make the call that it gets leave for
            verdict.add_done_callback(self._give_back)
            raise

    def _give_back(self, verdict: Future[Permit | Refusal]) -> None:
        if isinstance(permit := verdict.result(), Permit):
            self._admission.give_back(permit)


def _job(
    task_type: str, prompt: str, system: str | None, context: ExecutionContext | None, options: dict[str, Any]
) -> Job:
    fields: dict[str, Any] = {"task_type": task_type, "prompt": prompt, "system": system}
    if context is not None:
        fields["metadata"] = context.metadata
        for name, source in _OVERRIDES.items():
            if (value := getattr(context, source)) is not None:
                fields[name] = value
    job = Job.parse(fields | options)
    job.to_json()  # refuses text that could not be sent
    return job


def _time_for(job: Job, context: ExecutionContext | None) -> float | None:
    return _shortest(context.timeout_seconds if context else None, job.deadline_seconds)


def _shortest(*seconds: float | None) -> float | None:
    return min((value for value in seconds if value is not None), default=None)


def _response(job: Job, answer: Answer, attempts: Sequence[Attempt]) -> LLMResponse:
    last = attempts[-1]
    return LLMResponse(
        content=answer.content,
        model_id=last.model_id,
        provider=last.provider,
        tier=last.tier,
        usage=answer.usage,
        cost_usd=total_cost(attempts) if last.cost_usd is not None else None,
        latency_ms=last.latency_ms,
        finish_reason=answer.finish_reason,
        attempts=tuple(attempts),
        auth_mode=last.auth_mode.value,
        request_id=answer.request_id,
        metadata=job.metadata,
    )
