"""What happens between a job and its answer? Rank the models, ask leave, call, settle, and go on when it failed.

The way is written once, as a generator that asks for effects (admit this call, send this, settle that,
wait that long) and is told their outcome. Whoever drives it performs them: in a thread, or on an event loop.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from uuid import uuid4

from attune_worker.errors import ProviderError, StoppedError
from attune_worker.jobs import Attempt, Decision, Job
from attune_worker.models import decisions
from attune_worker.models.adaptive import AdaptiveModelRouter, Ranking
from attune_worker.models.attempts import attempt_of, located
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.calls import Outcome, Permit, Refusal, Request
from attune_worker.models.credentials import Credential, Ways, endpoints_of
from attune_worker.models.effects import Admit, Effect, Flow, Rank, Reply, Send, Settle, Unsent
from attune_worker.models.offers import Offers
from attune_worker.models.policy import NextCall, in_turn, next_call, seen_before
from attune_worker.models.pricing import cost
from attune_worker.models.progress import Progress, Start
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import Candidates, must_serve, output_limit
from attune_worker.providers import adapter
from attune_worker.providers.base import Answer, ChatRequest, HttpResponse, Provider
from attune_worker.providers.rate_headers import observed
from attune_worker.settings import Settings
from attune_worker.telemetry.views import StageView

logger = logging.getLogger(__name__)

ADMITTED_TOGETHER = 2
"""How many candidates one ADMIT may choose from: nearly always one of the first is free, and each costs time."""


class Caller:
    """Makes the flows of one executor; what it holds follows from settings and registry."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        router: AdaptiveModelRouter,
        abandon: Callable[[Permit, Outcome], None],
        strategy: Callable[[], AuthStrategy] | None = None,
    ) -> None:
        """``abandon`` settles, without blocking, a call that was broken off in the middle.

        ``strategy`` is that of ``Offers``.
        """
        self.offers = Offers(settings, registry, strategy)
        self._settings = settings
        self._registry = registry
        self._router = router
        self._abandon = abandon
        self._endpoints = endpoints_of(settings, self.offers.credentials)

    def rank(self, job: Job, random: Callable[[], float] | None = random.random) -> Ranking:
        """Return the models in the order in which they are asked, raising ``NoCandidateError`` if there is none.

        Where ``random`` is None no model is explored.
        """
        found = self.offers.candidates(job)
        must_serve(found)
        return self._router.rank(job, found, random)

    def flow(self, start: Start) -> Flow:
        """Return the flow of one start of a job, which returns the answer and all attempts."""
        job, progress = start.job, self._begun(start)
        ranking = yield Rank(job)
        assert isinstance(ranking, Ranking)  # noqa: S101  # the drivers answer every Rank
        self._tell(start, ranking)
        wish = self.offers.wish(job)
        ranked = self.offers.as_wished(Candidates(ranking.models, ()), wish).models  # the strategy may have changed
        while True:
            ways = self.offers.ways(job, ranked, wish, progress.spent_usd)
            step = self._next(ranked, ways, progress)
            yield from progress.wait_for(step)
            wanted = in_turn((step.model, *step.instead), ways, progress.failures)
            verdict = yield from self._ask(wanted, progress, ranking.view)
            if isinstance(verdict, Refusal):
                yield from progress.put_off(verdict)
                continue
            if decisions.wanted():
                decisions.tell_way(verdict, self.offers.resolved(wish)[verdict.model.provider].constraint)
            decision = None if progress.attempts else ranking.decision
            outcome, attempt = yield from self._call(job, verdict, progress.seconds_left, decision)
            progress.called(attempt)
            progress.go_on_unless_stopped(outcome)
            if isinstance(outcome, Answer):
                return outcome, tuple(progress.attempts)
            assert isinstance(outcome, ProviderError)  # noqa: S101  # all else is dealt with
            assert attempt is not None  # noqa: S101  # as with every error of a provider
            logger.debug("%s on %s failed: %s", job.task_type, verdict.model.ref, outcome.type)
            progress.failed(verdict, outcome, self.offers.spent_usd(job, attempt))

    def _begun(self, start: Start) -> Progress:
        failures = [seen_before(attempt, self._registry) for attempt in start.attempts]
        spent_usd = sum((self.offers.spent_usd(start.job, attempt) for attempt in start.attempts), Decimal(0))
        return Progress(start, failures, spent_usd, self._settings)

    def _tell(self, start: Start, ranking: Ranking) -> None:
        if decisions.wanted():
            dropped = self.offers.candidates(start.job).dropped
            decisions.tell_route(start.job_id, ranking, dropped, adaptive=self._settings.routing.adaptive)
            if (recommended := self.offers.recommendation(start.job)) is not None:
                decisions.tell_mode(start.job_id, *recommended)

    def _next(self, ranked: Sequence[ModelInfo], ways: Ways, progress: Progress) -> NextCall:
        """Return the next call to make, or raise how the job ends after which none makes sense."""
        models = tuple(filter(ways.of, ranked)) if ways.dear else ranked
        now = time.monotonic()
        remaining_seconds = progress.next_call_by - now
        step = next_call(models, progress.failures, self._settings.retry, remaining_seconds, random.random, now, ways)
        if step is None:
            raise progress.given_up()
        return step

    def _ask(
        self, wanted: Iterable[tuple[ModelInfo, Credential]], progress: Progress, view: StageView
    ) -> Generator[Effect, Reply, Permit | Refusal]:
        """Ask leave for the first of ``wanted`` that is allowed, a few at a time; refused are they all together."""
        refusals: list[Refusal] = []
        in_order = iter(wanted)
        while some := tuple(islice(in_order, ADMITTED_TOGETHER)):
            verdict = yield Admit(self._request(progress.start, some, view))
            if isinstance(verdict, Permit):
                return verdict
            progress.go_on_unless_stopped(verdict)
            assert isinstance(verdict, Refusal)  # noqa: S101  # the drivers answer every Admit
            refusals.append(verdict)
        if not refusals:
            raise progress.routed_before()
        waits = [refusal for refusal in refusals if not refusal.for_budget]
        return min(waits, key=lambda refusal: refusal.retry_after_seconds) if waits else refusals[0]

    def _request(self, start: Start, wanted: Sequence[tuple[ModelInfo, Credential]], view: StageView) -> Request:
        quotes = self.offers.quotes(start.job, wanted, view)
        return Request(uuid4().hex, start.job_id, start.job, quotes, start.lease)

    def _call(
        self, job: Job, permit: Permit, remaining_seconds: float, decision: Decision | None
    ) -> Generator[Effect, Reply, tuple[Answer | ProviderError | StoppedError, Attempt | None]]:
        """Make a call that there is leave for, and settle it; there is no attempt when it was not made after all."""
        reply, outcome, latency_ms = yield from self._exchange(job, permit, remaining_seconds)
        if isinstance(reply, Unsent):
            yield from self._settle(permit, Outcome.released())
            return outcome, None
        model, credential = permit.model, permit.credential
        if isinstance(outcome, ProviderError):
            outcome = located(outcome, job, self._endpoints[model.provider, credential.name], model)
        attempt = attempt_of(model, credential, outcome, latency_ms, permit.call_id, decision)
        yield from self._settle(permit, _ended(permit, reply, outcome, attempt))
        return outcome, attempt

    def _exchange(
        self, job: Job, permit: Permit, remaining_seconds: float
    ) -> Generator[Effect, Reply, tuple[Reply, Answer | ProviderError | StoppedError, int]]:
        """Send the request; return the reply, what it means, and after how many milliseconds it was there."""
        model = permit.model
        provider = adapter(self._settings.providers[model.provider].kind)
        endpoint = self._endpoints[model.provider, permit.credential.name]
        started = time.monotonic()
        ended = Outcome.released()
        try:  # whatever breaks it off (cancelled, interrupted, the generator closed), what was taken is settled
            request = provider.build(endpoint, self._chat(job, model, permit.call_id))
            ended = Outcome.abandoned(0)
            timeout_seconds = max(0.001, min(self._settings.http.request_timeout_seconds, remaining_seconds))
            reply = yield Send(request, timeout_seconds)
            outcome, latency_ms = _read(provider, reply), _elapsed_ms(started)
        except BaseException:
            self._abandon(permit, replace(ended, latency_ms=_elapsed_ms(started)))
            raise
        return reply, outcome, latency_ms

    def _settle(self, permit: Permit, ended: Outcome) -> Generator[Effect, Reply, None]:
        try:
            yield Settle(permit, ended)
        except BaseException:  # written or not: twice counts once
            self._abandon(permit, ended)
            raise

    def _chat(self, job: Job, model: ModelInfo, call_id: str) -> ChatRequest:
        return ChatRequest(
            model_id=model.id,
            messages=job.turns,
            max_tokens=output_limit(job, model, self._settings.default_max_tokens),
            system=job.system,
            temperature=job.temperature,
            stop=job.stop,
            end_user=self._opaque(job.user_id) if job.user_id else None,
            session=self._opaque(job.session_id) if job.session_id else None,
            call_id=call_id,
        )

    def _opaque(self, name: str) -> str:
        secret = f"{self._settings.namespace}\0{self._settings.user_hash_key.get_secret_value()}".encode()
        return hashlib.blake2b(name.encode(), key=hashlib.sha256(secret).digest(), digest_size=16).hexdigest()


def _read(provider: Provider, reply: Reply) -> Answer | ProviderError | StoppedError:
    """Return what a reply to ``Send`` means."""
    if isinstance(reply, Unsent):
        return reply.error
    if not isinstance(reply, HttpResponse):
        assert isinstance(reply, ProviderError | StoppedError)  # noqa: S101  # the drivers answer every Send
        return reply
    try:
        return provider.parse(reply) if 200 <= reply.status < 300 else provider.failure(reply)
    except ProviderError as error:
        return error


def _ended(permit: Permit, reply: Reply, outcome: Answer | ProviderError | StoppedError, attempt: Attempt) -> Outcome:
    """Return what is settled of a call that was made; by subscription also what it would have cost by the token."""
    headers = observed(reply.headers, datetime.now(UTC)) if isinstance(reply, HttpResponse) else None
    ended = Outcome.of(outcome, attempt, headers)
    if permit.credential.subscription and isinstance(outcome, Answer) and outcome.usage is not None:
        return replace(ended, worth_usd=cost(permit.model, outcome.usage))
    return ended


def _elapsed_ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
