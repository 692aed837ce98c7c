"""How does one job become one answer? Choose a model, call it, and go on to the next one when it fails.

The way is written once, as a generator that asks for effects (send this, wait that long) and is told
their outcome. ``run`` performs the effects in the calling thread, ``arun`` on an event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from pydantic import JsonValue

from attune_worker.errors import DeadlineExceededError, ProviderError
from attune_worker.jobs import Attempt, Job, ModelTier, Usage, total_cost
from attune_worker.models.attempts import attempt_of, located
from attune_worker.models.policy import Failure, next_call
from attune_worker.models.pricing import cost, worst_case_cost
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import candidates, estimate_tokens, must_serve, output_limit
from attune_worker.providers import adapter
from attune_worker.providers.base import Answer, ChatRequest, Endpoint, HttpRequest, HttpResponse
from attune_worker.providers.http import HttpSender
from attune_worker.settings import Settings, get_settings

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: send the request; answered with the response, or the error that came instead."""

    request: HttpRequest
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Effect: let that much time pass."""

    seconds: float


Flow = Generator[Send | Wait, HttpResponse | ProviderError | None, LLMResponse]


class EmpathyLLMExecutor:
    """Routes a request to a model and calls its provider, with fallback; safe for use from many threads.

    ``run`` and ``arun`` raise ``InvalidJobError`` for a request that makes no sense,
    ``NoCandidateError`` when no model may serve it, ``DeadlineExceededError`` when its time is up, and
    the last ``ProviderError`` when every attempt failed; each carries the ``attempts`` made.
    """

    def __init__(self, settings: Settings | None = None, registry: Registry | None = None) -> None:
        self.settings = settings or get_settings()
        self.registry = registry or Registry.from_settings(self.settings)
        self._sender = HttpSender(self.settings.http)
        self._endpoints = {
            name: Endpoint(name, provider.base_url, provider.key())
            for name, provider in self.settings.providers.items()
            if provider.usable()
        }

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
        flow = self._flow(job, _time_for(job, context))
        outcome: HttpResponse | ProviderError | None = None
        while True:
            try:
                effect = flow.send(outcome)
            except StopIteration as end:
                response: LLMResponse = end.value
                return response
            outcome = None
            if isinstance(effect, Wait):
                await asyncio.sleep(effect.seconds)
                continue
            try:
                outcome = await self._sender.asend(effect.request, effect.timeout_seconds)
            except ProviderError as error:
                outcome = error

    def execute(self, job: Job, timeout_seconds: float | None = None) -> LLMResponse:
        """Answer ``job`` within ``timeout_seconds``, or within the configured time if that is shorter."""
        flow = self._flow(job, timeout_seconds)
        outcome: HttpResponse | ProviderError | None = None
        while True:
            try:
                effect = flow.send(outcome)
            except StopIteration as end:
                response: LLMResponse = end.value
                return response
            outcome = None
            if isinstance(effect, Wait):
                time.sleep(effect.seconds)
                continue
            try:
                outcome = self._sender.send(effect.request, effect.timeout_seconds)
            except ProviderError as error:
                outcome = error

    def get_model_for_task(self, task_type: str) -> str:
        """Return the id of the model that would be asked first."""
        return self._candidates(Job(task_type=task_type, prompt="?"))[0].id

    def estimate_cost(self, task_type: str, input_tokens: int, output_tokens: int) -> Decimal | None:
        """Return what a call of that size would cost in USD on the model asked first; None: price unknown."""
        model = self._candidates(Job(task_type=task_type, prompt="?"))[0]
        return cost(model, Usage(input_tokens=input_tokens, output_tokens=output_tokens))

    def _candidates(self, job: Job) -> tuple[ModelInfo, ...]:
        found = candidates(
            job, self.registry, self.settings.default_max_tokens, lambda model: self._obstacle(job, model)
        )
        return must_serve(found)

    def _obstacle(self, job: Job, model: ModelInfo) -> str | None:
        if model.provider not in self._endpoints:
            secret = self.settings.providers[model.provider].api_key
            source = secret.get_secret_value() if secret else ""
            return (
                f"has no API key (set {source.removeprefix('env:')})" if source.startswith("env:") else "has no API key"
            )
        kind = self.settings.providers[model.provider].kind
        return adapter(kind).misfit(job.temperature, job.stop) or self._too_dear(job, model, Decimal(0))

    def _too_dear(self, job: Job, model: ModelInfo, spent: Decimal) -> str | None:
        """Say why a call could take the job over its ``max_cost`` when ``spent`` USD are gone already, or None."""
        if job.max_cost is None:
            return None
        worst = self._worst_case(job, model)
        if worst is None:
            return "its price is unknown, so max_cost cannot be kept"
        return f"may cost ${worst:f}, over max_cost" if spent + worst > job.max_cost else None

    def _worst_case(self, job: Job, model: ModelInfo) -> Decimal | None:
        tokens = estimate_tokens(job.text_bytes)
        return worst_case_cost(model, tokens, output_limit(job, model, self.settings.default_max_tokens))

    def _flow(self, job: Job, timeout_seconds: float | None) -> Flow:
        ends = time.monotonic() + (_shortest(timeout_seconds, self.settings.timeout_seconds) or 0)
        models = self._candidates(job)
        failures: list[Failure] = []
        attempts: list[Attempt] = []
        spent = Decimal(0)
        while True:
            remaining = ends - time.monotonic()
            step = next_call(models, failures, self.settings.retry, remaining, random.random, time.monotonic())
            if step is None and (remaining > 0 or not failures[-1].error.retryable):
                raise _with_attempts(failures[-1].error, attempts)
            if step is not None and step.wait_seconds:
                yield Wait(step.wait_seconds)
            remaining = ends - time.monotonic()
            if step is None or remaining <= 0:
                raise DeadlineExceededError("the time for this job was up before an answer came", attempts=attempts)
            outcome, attempt = yield from self._call(job, step.model, remaining)
            attempts.append(attempt)
            if isinstance(outcome, Answer):
                return _response(job, outcome, attempts)
            logger.debug("%s on %s failed: %s", job.task_type, step.model.ref, outcome.type)
            failures.append(Failure(step.model, outcome, time.monotonic()))
            spent += (self._worst_case(job, step.model) or 0) if attempt.cost_usd is None else attempt.cost_usd
            models = tuple(model for model in models if self._too_dear(job, model, spent) is None)

    def _call(
        self, job: Job, model: ModelInfo, remaining_seconds: float
    ) -> Generator[Send, HttpResponse | ProviderError | None, tuple[Answer | ProviderError, Attempt]]:
        provider = adapter(self.settings.providers[model.provider].kind)
        endpoint = self._endpoints[model.provider]
        request = provider.build(endpoint, self._chat(job, model))
        started = time.monotonic()
        reply = yield Send(request, min(self.settings.http.request_timeout_seconds, remaining_seconds))
        latency_ms = round((time.monotonic() - started) * 1000)
        outcome: Answer | ProviderError
        if isinstance(reply, HttpResponse):
            try:
                outcome = provider.parse(reply) if 200 <= reply.status < 300 else provider.failure(reply)
            except ProviderError as error:
                outcome = error
        else:
            assert reply is not None  # noqa: S101  # the drivers answer every Send
            outcome = reply
        if isinstance(outcome, ProviderError):
            outcome = located(outcome, job, endpoint, model)
        return outcome, attempt_of(model, outcome, latency_ms)

    def _chat(self, job: Job, model: ModelInfo) -> ChatRequest:
        return ChatRequest(
            model_id=model.id,
            messages=job.turns,
            max_tokens=output_limit(job, model, self.settings.default_max_tokens),
            system=job.system,
            temperature=job.temperature,
            stop=job.stop,
            end_user=self._opaque(job.user_id) if job.user_id else None,
            session=self._opaque(job.session_id) if job.session_id else None,
        )

    def _opaque(self, name: str) -> str:
        secret = f"{self.settings.namespace}\0{self.settings.user_hash_key.get_secret_value()}".encode()
        return hashlib.blake2b(name.encode(), key=hashlib.sha256(secret).digest(), digest_size=16).hexdigest()


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


def _response(job: Job, answer: Answer, attempts: list[Attempt]) -> LLMResponse:
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
        request_id=answer.request_id,
        metadata=job.metadata,
    )


def _with_attempts(error: ProviderError, attempts: list[Attempt]) -> ProviderError:
    error.attempts = tuple(attempts)
    return error
