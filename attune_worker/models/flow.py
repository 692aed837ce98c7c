"""What happens between a job and its answer? Rank the models, ask leave, call, settle, and go on when it failed.

The way is written once, as a generator that asks for effects (admit this call, send this, settle that,
wait that long) and is told their outcome. Whoever drives it performs them: in a thread, or on an event loop.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from uuid import uuid4

from attune_worker.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    ExecutionError,
    NotNowError,
    ProviderError,
    StoppedError,
)
from attune_worker.jobs import Attempt, AuthMode, Decision, Job
from attune_worker.models import decisions
from attune_worker.models.adaptive import AdaptiveModelRouter, Ranking
from attune_worker.models.attempts import attempt_of, located
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.calls import Outcome, Permit, Quote, Refusal, Request
from attune_worker.models.credentials import (
    PLAIN,
    Credential,
    Resolved,
    Ways,
    Wish,
    credentials_of,
    endpoints_of,
    keyless,
    resolve,
    spread,
    wish_of,
    without_silent_spill,
)
from attune_worker.models.policy import Failure, NextCall, in_turn, next_call, seen_before
from attune_worker.models.pricing import cost, plain_cost, worst_case_cost
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import Candidates, candidates, estimate_tokens, most_tokens, must_serve, output_limit
from attune_worker.models.sizing import basis
from attune_worker.providers import adapter
from attune_worker.providers.base import Answer, ChatRequest, HttpRequest, HttpResponse, Provider
from attune_worker.providers.rate_headers import observed
from attune_worker.settings import Settings
from attune_worker.telemetry.views import StageView

logger = logging.getLogger(__name__)

MAX_KEPT = 1024
"""Kinds of jobs whose candidates are remembered."""

ADMITTED_TOGETHER = 2
"""How many candidates one ADMIT may choose from: nearly always one of the first is free, and each costs time."""


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


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a job.

    ``attempts`` were made in earlier starts. ``timeout_seconds`` is left until the job's deadline (None: it has
    none). With ``patience_seconds`` a longer wait ends the start with ``NotNowError``, as does one that would leave
    too little of the start for a call; without, the flow waits as long as its time allows. ``lease``: see ``Request``.
    """

    job: Job
    job_id: str = ""
    timeout_seconds: float | None = None
    attempts: tuple[Attempt, ...] = ()
    patience_seconds: float | None = None
    lease: str = ""


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

        ``strategy`` returns the one that says which jobs should go by a subscription; without it none should.
        """
        self.settings = settings
        self.registry = registry
        self._router = router
        self._abandon = abandon
        self._credentials = {name: credentials_of(provider) for name, provider in settings.providers.items()}
        self._endpoints = endpoints_of(settings, self._credentials)
        subscribed = any(one.subscription for found in self._credentials.values() for one in found)
        self._strategy = strategy if subscribed else None
        self._resolved = lru_cache(maxsize=16)(self._resolve)
        self._smallest_window = min((model.context_window or math.inf for model in registry.all()), default=math.inf)
        self._found: dict[tuple[object, ...], Candidates] = {}
        self._keyless = {
            name: keyless(provider) for name, provider in settings.providers.items() if not self._credentials[name]
        }

    def candidates(self, job: Job) -> Candidates:
        """Return the models that may serve ``job``, in static order, and why the others may not.

        For jobs that are alike it is worked out once; what is left of a ``max_cost`` is each job's own.
        """
        wish = self._wish(job)
        if job.max_cost is not None:
            return self._candidates(job, wish)
        tokens = estimate_tokens(job.text_bytes)
        fits_everywhere = tokens + (job.max_tokens or self.settings.default_max_tokens) <= self._smallest_window
        alike = (
            job.task_type,
            job.tier_hint,
            job.provider_hint,
            job.model,
            job.temperature,
            job.stop,
            job.max_tokens,
            0 if fits_everywhere else tokens,
            None if wish is PLAIN else wish,
        )
        found = self._found.get(alike)
        if found is None:
            if len(self._found) >= MAX_KEPT:
                self._found.clear()
            found = self._found[alike] = self._candidates(job, wish)
        return found

    def _candidates(self, job: Job, wish: Wish) -> Candidates:
        found = candidates(
            job, self.registry, self.settings.default_max_tokens, lambda model: self._obstacle(job, model, wish)
        )
        return self._as_wished(found, wish)

    def _as_wished(self, found: Candidates, wish: Wish) -> Candidates:
        if wish.spill or wish.own is not None or wish.recommended is AuthMode.API:
            return found
        return without_silent_spill(found, self._credentials)

    def _wish(self, job: Job) -> Wish:
        if self._strategy is None and job.auth_mode is None:
            return PLAIN
        strategy = None if self._strategy is None or job.auth_mode is not None else self._strategy()
        return wish_of(job, strategy, self.settings.auth.spill_to_api)

    def _resolve(self, wish: Wish) -> dict[str, Resolved]:
        return {provider: resolve(found, wish) for provider, found in self._credentials.items()}

    def rank(self, job: Job, random: Callable[[], float] | None = random.random) -> Ranking:
        """Return the models in the order in which they are asked, raising ``NoCandidateError`` if there is none.

        Where ``random`` is None no model is explored.
        """
        found = self.candidates(job)
        must_serve(found)
        return self._router.rank(job, found, random)

    def flow(self, start: Start) -> Flow:
        """Return the flow of one start of a job, which returns the answer and all attempts."""
        job, attempts = start.job, list(start.attempts)
        now = time.monotonic()
        deadline = math.inf if start.timeout_seconds is None else now + start.timeout_seconds
        ends = min(deadline, now + self.settings.timeout_seconds)
        pauses_until = self._pauses_until(start, ends, deadline)
        held_up: str | None = "the time for this start was up before a call"  # None: a call was what took it up
        ranking = yield Rank(job)
        assert isinstance(ranking, Ranking)  # noqa: S101  # the drivers answer every Rank
        if decisions.wanted():
            dropped = self.candidates(job).dropped
            decisions.tell_route(start.job_id, ranking, dropped, adaptive=self.settings.routing.adaptive)
        decision: Decision | None = None if attempts else ranking.decision
        failures = [seen_before(attempt, self.registry) for attempt in attempts]
        spent = sum((self._spent(job, attempt) for attempt in attempts), Decimal(0))
        wish = self._wish(job)
        ranked = self._as_wished(Candidates(ranking.models, ()), wish).models  # the strategy may have changed since
        while True:
            ways = self._ways(job, ranked, wish, spent)
            models = tuple(filter(ways.of, ranked)) if ways.dear else ranked
            waits_until = ends if start.patience_seconds is None else deadline
            step = self._next(models, ways, failures, waits_until)
            if step is None:
                raise _given_up(failures, attempts, time.monotonic() < waits_until)
            if step.wait_seconds > 0 and time.monotonic() < ends:
                held_up = f"{step.model.ref} failed before"
                yield from _pause(step.wait_seconds, pauses_until, start, attempts, held_up)
            if time.monotonic() >= ends:
                raise _time_up(start, deadline, attempts, held_up)
            wanted = in_turn((step.model, *step.instead), ways, failures)
            verdict = yield from self._ask(start, wanted, attempts, ranking.view)
            if isinstance(verdict, Refusal):
                if verdict.for_budget:
                    raise BudgetExceededError(
                        verdict.reason, attempts=attempts, retry_after=verdict.retry_after_seconds or None
                    )
                held_up = verdict.reason
                yield from _pause(verdict.retry_after_seconds, pauses_until, start, attempts, held_up)
                continue
            self._explain(verdict, wish)
            outcome, attempt = yield from self._call(job, verdict, ends - time.monotonic(), decision)
            decision = held_up = None
            if attempt is not None:
                attempts.append(attempt)
            _go_on_unless_stopped(outcome, attempts)
            if isinstance(outcome, Answer):
                return outcome, tuple(attempts)
            assert isinstance(outcome, ProviderError)  # noqa: S101  # all else is dealt with
            assert attempt is not None  # noqa: S101  # as with every error of a provider
            logger.debug("%s on %s failed: %s", job.task_type, verdict.model.ref, outcome.type)
            failures.append(Failure(verdict.model, outcome, time.monotonic(), credential=verdict.credential.name))
            spent += self._spent(job, attempt)

    def _pauses_until(self, start: Start, ends: float, deadline: float) -> float:
        """Return until when a wait may last: a worker's job comes again rather than have too little time for a call."""
        if start.patience_seconds is None or ends == deadline:
            return ends
        return ends - min(self.settings.http.request_timeout_seconds, self.settings.timeout_seconds / 2)

    def _ask(
        self,
        start: Start,
        wanted: Iterable[tuple[ModelInfo, Credential]],
        attempts: Sequence[Attempt],
        view: StageView,
    ) -> Generator[Effect, Reply, Permit | Refusal]:
        """Ask leave for the first of ``wanted`` that is allowed, a few at a time; refused are they all together."""
        refusals: list[Refusal] = []
        in_order = iter(wanted)
        while some := tuple(islice(in_order, ADMITTED_TOGETHER)):
            verdict = yield Admit(self._request(start, some, view))
            if isinstance(verdict, Permit):
                return verdict
            _go_on_unless_stopped(verdict, attempts)
            assert isinstance(verdict, Refusal)  # noqa: S101  # the drivers answer every Admit
            refusals.append(verdict)
        if not refusals:
            raise _routed_before(attempts)
        waits = [refusal for refusal in refusals if not refusal.for_budget]
        return min(waits, key=lambda refusal: refusal.retry_after_seconds) if waits else refusals[0]

    def _next(
        self, models: Sequence[ModelInfo], ways: Ways, failures: Sequence[Failure], until: float
    ) -> NextCall | None:
        now = time.monotonic()
        return next_call(models, failures, self.settings.retry, until - now, random.random, now, ways)

    def _ways(self, job: Job, models: Sequence[ModelInfo], wish: Wish, spent: Decimal) -> Ways:
        """Return by which credentials the models may be called for what is left of ``max_cost``."""
        dear = [] if job.max_cost is None else [model for model in models if self._too_dear(job, model, spent)]
        found = self._resolved(wish).items()
        return Ways({name: spread(one.credentials, random.random) for name, one in found}, frozenset(dear))

    def _obstacle(self, job: Job, model: ModelInfo, wish: Wish) -> str | None:
        if model.provider in self._keyless:
            return self._keyless[model.provider]
        kind = self.settings.providers[model.provider].kind
        if misfit := adapter(kind).misfit(job.temperature, job.stop):
            return misfit
        resolved = self._resolved(wish)[model.provider]
        if not resolved.credentials:
            return resolved.constraint
        free = any(one.subscription for one in resolved.credentials)
        return None if free else self._too_dear(job, model, Decimal(0))

    def _explain(self, permit: Permit, wish: Wish) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            how = "a subscription" if permit.credential.subscription else "an API key"
            constraint = self._resolved(wish)[permit.model.provider].constraint
            logger.debug("auth of a call to %s: %s, %s: %s", permit.model.ref, permit.credential.name, how, constraint)

    def _too_dear(self, job: Job, model: ModelInfo, spent: Decimal) -> str | None:
        """Say why a call could take the job over its ``max_cost`` when ``spent`` USD are gone already, or None."""
        if job.max_cost is None:
            return None
        worst = self._worst_case(job, model)
        if worst is None:
            return "its price is unknown, so max_cost cannot be kept"
        return f"may cost ${worst:f}, over max_cost" if spent + worst > job.max_cost else None

    def _spent(self, job: Job, attempt: Attempt) -> Decimal:
        """Return what an attempt cost, at worst where that is not known."""
        if attempt.cost_usd is not None:
            return attempt.cost_usd
        found = self.registry.find(f"{attempt.provider}/{attempt.model_id}")
        return (self._worst_case(job, found[0]) if found else None) or Decimal(0)

    def _worst_case(self, job: Job, model: ModelInfo) -> Decimal | None:
        tokens = estimate_tokens(job.text_bytes)
        return worst_case_cost(model, tokens, output_limit(job, model, self.settings.default_max_tokens))

    def _most_usd(self, job: Job, model: ModelInfo) -> Decimal | None:
        """Return what a call cannot go beyond, however the prompt is cut into tokens: what budgets reserve."""
        return worst_case_cost(model, most_tokens(job), output_limit(job, model, self.settings.default_max_tokens))

    def _expected_usd(self, job: Job, model: ModelInfo, credential: Credential, view: StageView) -> Decimal | None:
        """Return what a call should cost, going by those before it in its stage."""
        if credential.subscription:
            return Decimal(0)
        limit = output_limit(job, model, self.settings.default_max_tokens)
        return plain_cost(model, *basis(view, model.ref).tokens(job, limit))

    def _request(self, start: Start, wanted: Sequence[tuple[ModelInfo, Credential]], view: StageView) -> Request:
        job = start.job
        return Request(
            call_id=uuid4().hex,
            job_id=start.job_id,
            lease=start.lease,
            job=job,
            quotes=tuple(
                Quote(
                    model,
                    _reserved(job, credential) + output_limit(job, model, self.settings.default_max_tokens),
                    Decimal(0) if credential.subscription else self._most_usd(job, model),
                    credential,
                    self._expected_usd(job, model, credential, view),
                )
                for model, credential in wanted
            ),
        )

    def _call(
        self, job: Job, permit: Permit, remaining_seconds: float, decision: Decision | None
    ) -> Generator[Effect, Reply, tuple[Answer | ProviderError | StoppedError, Attempt | None]]:
        """Make a call that there is leave for, and settle it; there is no attempt when it was not made after all."""
        model = permit.model
        provider = adapter(self.settings.providers[model.provider].kind)
        endpoint = self._endpoints[model.provider, permit.credential.name]
        started = time.monotonic()
        ended = Outcome.released()
        try:  # whatever breaks it off (cancelled, interrupted, the generator closed), what was taken is settled
            request = provider.build(endpoint, self._chat(job, model, permit.call_id))
            ended = Outcome.abandoned(0)
            timeout_seconds = max(0.001, min(self.settings.http.request_timeout_seconds, remaining_seconds))
            reply = yield Send(request, timeout_seconds)
            outcome, latency_ms = self._outcome(provider, reply), _elapsed_ms(started)
        except BaseException:
            self._abandon(permit, replace(ended, latency_ms=_elapsed_ms(started)))
            raise
        if isinstance(reply, Unsent):
            yield from self._settle(permit, Outcome.released())
            return outcome, None
        headers = observed(reply.headers, datetime.now(UTC)) if isinstance(reply, HttpResponse) else None
        if isinstance(outcome, ProviderError):
            outcome = located(outcome, job, endpoint, model)
        attempt = attempt_of(model, permit.credential, outcome, latency_ms, permit.call_id, decision)
        ended = Outcome.of(outcome, attempt, headers)
        if permit.credential.subscription and isinstance(outcome, Answer) and outcome.usage is not None:
            ended = replace(ended, worth_usd=cost(model, outcome.usage))
        yield from self._settle(permit, ended)
        return outcome, attempt

    def _settle(self, permit: Permit, ended: Outcome) -> Generator[Effect, Reply, None]:
        try:
            yield Settle(permit, ended)
        except BaseException:  # written or not: twice counts once
            self._abandon(permit, ended)
            raise

    @staticmethod
    def _outcome(provider: Provider, reply: Reply) -> Answer | ProviderError | StoppedError:
        if isinstance(reply, Unsent):
            return reply.error
        if not isinstance(reply, HttpResponse):
            assert isinstance(reply, ProviderError | StoppedError)  # noqa: S101  # the drivers answer every Send
            return reply
        try:
            return provider.parse(reply) if 200 <= reply.status < 300 else provider.failure(reply)
        except ProviderError as error:
            return error

    def _chat(self, job: Job, model: ModelInfo, call_id: str) -> ChatRequest:
        return ChatRequest(
            model_id=model.id,
            messages=job.turns,
            max_tokens=output_limit(job, model, self.settings.default_max_tokens),
            system=job.system,
            temperature=job.temperature,
            stop=job.stop,
            end_user=self._opaque(job.user_id) if job.user_id else None,
            session=self._opaque(job.session_id) if job.session_id else None,
            call_id=call_id,
        )

    def _opaque(self, name: str) -> str:
        secret = f"{self.settings.namespace}\0{self.settings.user_hash_key.get_secret_value()}".encode()
        return hashlib.blake2b(name.encode(), key=hashlib.sha256(secret).digest(), digest_size=16).hexdigest()


def _reserved(job: Job, credential: Credential) -> int:
    """Return the prompt's tokens: at most by subscription, as nothing may go over a quota, else about how many."""
    return most_tokens(job) if credential.subscription else estimate_tokens(job.text_bytes)


def _elapsed_ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def _pause(
    seconds: float, until: float, start: Start, attempts: Sequence[Attempt], reason: str
) -> Generator[Wait, Reply, None]:
    """Wait, or raise ``NotNowError`` or ``DeadlineExceededError`` where that would take too long."""
    if seconds <= 0:
        return
    too_long = seconds >= until - time.monotonic()
    if start.patience_seconds is not None and (too_long or seconds > start.patience_seconds):
        raise NotNowError(reason, attempts=attempts, retry_after=seconds)
    if too_long:
        raise DeadlineExceededError(
            f"no answer can come in the time for this job: {reason}; earliest in {seconds:.1f} s",
            attempts=attempts,
            retry_after=seconds,
        )
    _go_on_unless_stopped((yield Wait(seconds)), attempts)


def _go_on_unless_stopped(reply: object, attempts: Sequence[Attempt]) -> None:
    if isinstance(reply, StoppedError):
        reply.attempts = tuple(attempts)
        raise reply


def _time_up(start: Start, deadline: float, attempts: Sequence[Attempt], held_up: str | None) -> ExecutionError:
    """Return how a start ends whose time is up: a worker's job that was only held up comes again until its deadline."""
    if start.patience_seconds is not None and held_up is not None and time.monotonic() < deadline:
        return NotNowError(held_up, attempts=attempts)
    return DeadlineExceededError("the time for this job was up before an answer came", attempts=attempts)


def _routed_before(attempts: Sequence[Attempt]) -> NotNowError:
    """Return how a start ends that has no way to call any model, though there was one when the models were ranked."""
    return NotNowError("the auth strategy has changed since the job was routed", attempts=attempts)


def _given_up(failures: Sequence[Failure], attempts: Sequence[Attempt], in_time: bool) -> ExecutionError:
    if not failures:
        return _routed_before(attempts)
    last = failures[-1].error
    if in_time or not last.retryable:
        last.attempts = tuple(attempts)
        return last
    return DeadlineExceededError("the time for this job was up before an answer came", attempts=attempts)
