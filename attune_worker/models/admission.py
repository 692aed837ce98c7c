"""May this call be made now, and what did it do? ADMIT before each call to a provider, SETTLE after it.

Both are one round trip to Redis, for breaker, cooldowns, limits, budgets and telemetry together. While Redis is
away this process goes by what it has seen itself, and keeps its settlements until they can be written.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any, Self
from uuid import uuid4

from redis.exceptions import ResponseError

from attune_worker.budget import BudgetKey, budgets_for, nano_of, usd_of
from attune_worker.errors import ProviderError, RateLimitedError, ServiceUnavailableError
from attune_worker.jobs import Attempt, Job, ModelTier
from attune_worker.limits import Settled, want
from attune_worker.models.adaptive import place_of
from attune_worker.models.local_circuits import LocalCircuits
from attune_worker.models.registry import ModelInfo
from attune_worker.models.task_types import get_tier_for_task
from attune_worker.providers.base import Answer
from attune_worker.providers.rate_headers import Observed
from attune_worker.settings import Settings
from attune_worker.store.backlog import Backlog
from attune_worker.store.circuits import Grant, Name, rules_in_ms
from attune_worker.store.connection import connect, reaching
from attune_worker.store.keys import FleetKeys
from attune_worker.store.outage import Outage
from attune_worker.store.scripts import Script
from attune_worker.telemetry.evidence import HALF_LIFE

logger = logging.getLogger(__name__)

ADMIT = Script("admit", "values", "breaker", "limits", "budget")
SETTLE = Script("settle", "values", "breaker", "limits", "budget", "telemetry")

LEASE_MARGIN_SECONDS = 30.0
"""How much longer than a call may take its slot and its probe are held for it."""

CLOSE_SECONDS = 5.0
"""How long the end of a process may be put off by settlements that wait for Redis."""

WITHOUT_REDIS_SECONDS = 5.0
"""When to ask again for a call that only Redis can allow: one under a hard budget."""

NO_ROOM = ("OOM", "MISCONF", "READONLY", "LOADING", "BUSY", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")
"""Codes of what is wrong with Redis itself, whatever it was told; Redis 6 quotes them in a script's error."""

DAY_MS = 86_400_000

_RANK = {tier: rank for rank, tier in enumerate(ModelTier)}


@dataclass(frozen=True, slots=True)
class Quote:
    """A model that may be called: at most ``tokens`` of it, at worst for ``worst_usd`` (None: price unknown)."""

    model: ModelInfo
    tokens: int
    worst_usd: Decimal | None


@dataclass(frozen=True, slots=True)
class Request:
    """A call that is wanted, to the first of ``quotes`` that everything allows."""

    call_id: str
    job_id: str
    job: Job
    quotes: tuple[Quote, ...]


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one call to one model, to be settled once.

    ``admitted_ms`` is Redis' time. ``own_generation``: it was given without Redis, by this process's own circuit.
    """

    call_id: str
    job: Job
    quote: Quote
    budgets: tuple[BudgetKey, ...]
    admitted_ms: int
    own_generation: int | None = None

    @property
    def model(self) -> ModelInfo:
        """The model that may be called."""
        return self.quote.model


@dataclass(frozen=True, slots=True)
class Refusal:
    """No call may be made now: ``retry_after_seconds`` from now it may. ``for_budget``: money is what is missing."""

    reason: str
    retry_after_seconds: float
    for_budget: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call did.

    ``health`` is what it says of the provider: success, failure or ignored. ``cost_usd`` is None where it is not
    known: then what was reserved counts as spent.
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

    @property
    def kind(self) -> str:
        """What it says of the model: success, failure, or other (the caller's fault, or nobody's)."""
        return {"success": "success", "failure": "failure"}.get(self.health, "other")

    @property
    def tokens(self) -> int | None:
        """Tokens that the provider counts against its limit; None: not known."""
        return None if self.input_tokens is None else self.input_tokens + (self.output_tokens or 0)

    @classmethod
    def of(cls, outcome: Answer | ProviderError, attempt: Attempt, observed: Observed | None) -> Self:
        """Return the outcome of a call that has ended."""
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
            observed=observed,
        )

    @classmethod
    def abandoned(cls, latency_ms: int) -> Self:
        """Return the outcome of a call that was broken off; the provider may charge for it."""
        return cls("failed", "ignored", latency_ms, error="cancelled")

    @classmethod
    def released(cls) -> Self:
        """Return the outcome of a call that was allowed and never made."""
        return cls("released", "ignored", 0, Decimal(0), 0, 0)


class Admission:
    """Asks leave for the calls of one process and settles them; safe for use from many threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis = connect(settings)
        self._keys = FleetKeys(settings.namespace)
        self._rules = _json(rules_in_ms(settings.breaker))
        self._lease_ms = round((settings.http.request_timeout_seconds + LEASE_MARGIN_SECONDS) * 1000)
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._outage = Outage()
        self._local = LocalCircuits(settings.breaker)
        self._unsettled = Backlog(self._write_all, self._outage)
        self._clock_offset_ms = 0.0
        self._keys_of = lru_cache(maxsize=256)(self._keys_of_model)
        self._budgets_for = lru_cache(maxsize=4096)(partial(budgets_for, settings.budgets))

    def admit(self, request: Request) -> Permit | Refusal:
        """Return leave for a call to the first of the candidates that may be called, or say when to ask again."""
        charged = [
            self._budgets_for(request.job.tenant, request.job.workflow, quote.model.provider)
            for quote in request.quotes
        ]
        if self._outage.worth_trying():
            try:
                with reaching(self._settings):
                    answer = ADMIT(self._redis, *self._admit_call(request, charged))
            except ServiceUnavailableError as error:
                if _refused(error):
                    raise
                if self._outage.failed(error):
                    logger.warning("going by what this process has seen itself: %s", error)
                request = self._take_back(request, charged)
            except BaseException:  # interrupted: Redis may have given leave for a call that nobody will make
                self._take_back(request, charged)
                raise
            else:
                self._reached()
                return self._verdict(request, charged, answer)
        return self._own_verdict(request, charged)

    def settle(self, permit: Permit, outcome: Outcome) -> None:
        """Write down what a call did; while Redis is away it is kept, and written later."""
        self._remember(permit, outcome)
        settlement = self._settlement(permit, outcome)
        if not self._outage.worth_trying():
            self._unsettled.add(settlement)
            return
        try:
            self._write(settlement)
        except ServiceUnavailableError as error:
            if self._outage.failed(error):
                logger.warning("settlements are kept until Redis answers: %s", error)
            self._unsettled.add(settlement)
        else:
            self._reached()

    def give_back(self, permit: Permit) -> None:
        """Give back leave for a call that was never made, without waiting for Redis."""
        self.settle_later(permit, Outcome.released())

    def settle_later(self, permit: Permit, outcome: Outcome) -> None:
        """Settle as ``settle`` does, without waiting for Redis."""
        self._remember(permit, outcome)
        self._unsettled.add(self._settlement(permit, outcome))

    def close(self) -> None:
        """Write what is left, for a while, and give the connections back."""
        self._unsettled.close(CLOSE_SECONDS)
        self._redis.close()

    def _take_back(self, request: Request, charged: Sequence[tuple[BudgetKey, ...]]) -> Request:
        """Return the request under another id: Redis may have heard the first, or may yet, and what it took comes back.

        Which of the candidates it took nobody knows; SETTLE passes over those that it did not.
        """
        for quote, budgets in zip(request.quotes, charged, strict=True):
            unheard = Permit(request.call_id, request.job, quote, budgets, self._now_ms())
            self._unsettled.add(self._settlement(unheard, Outcome.released()))
        return replace(request, call_id=uuid4().hex)

    def _remember(self, permit: Permit, outcome: Outcome) -> None:
        """Keep this process's own view of the circuits."""
        result = _told(
            call=permit.call_id,
            outcome=outcome.health,
            latency_ms=outcome.latency_ms,
            worker=self._worker,
            generation=permit.own_generation,
            retry_after_ms=_ms(outcome.retry_after),
        )
        self._local.record({_circuits(permit.model)[0]: result})

    def _reached(self) -> None:
        if self._outage.succeeded():
            logger.info("Redis answers again")

    def _admit_call(self, request: Request, charged: Sequence[tuple[BudgetKey, ...]]) -> tuple[list[str], tuple[str]]:
        """Return ADMIT's keys and argument."""
        keys = [self._keys.call(request.call_id), self._keys.calls, self._keys.circuits]
        places: dict[str, int] = {}
        candidates = []
        for quote, budgets in zip(request.quotes, charged, strict=True):
            model, worst_nano = quote.model, _nano(quote.worst_usd)
            keys += self._keys_of(model.provider, model.tier, model.id)
            provider = self._settings.providers[model.provider]
            candidates.append(
                {
                    "ref": model.ref,
                    "want": want(provider, self._settings.limits, quote.tokens),
                    "budgets": [
                        {"key": places.setdefault(one.key(self._keys), len(places)), "want": one.want(worst_nano)}
                        for one in budgets
                    ],
                }
                | _told(estimate_nano=worst_nano)
            )
        asked = {
            "call": request.call_id,
            "job": request.job_id,
            "worker": self._worker,
            "lease_ms": self._lease_ms,
            "retention_s": self._settings.retention_seconds,
            "candidates": candidates,
        }
        return [*keys, *places], (self._with_rules(asked),)

    def _verdict(
        self, request: Request, charged: Sequence[tuple[BudgetKey, ...]], answer: list[Any]
    ) -> Permit | Refusal:
        if answer[0] == b"refused":
            now_ms, refusals = answer[1], answer[2]
            for quote, (_, at, why, *_) in zip(request.quotes, refusals, strict=True):
                if why in _OF_CIRCUITS:
                    self._local.adopt(_circuits(quote.model)[0], Grant(False, max(0, int(at) - now_ms), why.decode()))
            return _refusal(request, charged, now_ms, refusals)
        place, now_ms = (answer[1], answer[2]) if answer[0] == b"admitted" else (0, self._now_ms())
        self._clock_offset_ms = now_ms - time.time() * 1000
        self._local.adopt(_circuits(request.quotes[place].model)[0], Grant(True, 0, ""))
        return Permit(request.call_id, request.job, request.quotes[place], charged[place], now_ms)

    def _own_verdict(self, request: Request, charged: Sequence[tuple[BudgetKey, ...]]) -> Permit | Refusal:
        """Decide without Redis: by this process's own view of the circuits, and never against a hard budget."""
        if self._unsettled.full:
            return Refusal("Redis is away, and no more settlements can be kept", WITHOUT_REDIS_SECONDS)
        waits = []
        for quote, budgets in zip(request.quotes, charged, strict=True):
            if any(one.hard_nano is not None for one in budgets):
                waits.append(("a hard budget cannot be kept while Redis is away", WITHOUT_REDIS_SECONDS))
                continue
            names = _circuits(quote.model)
            grant = self._local.ask(names, request.call_id, self._lease_ms)
            if grant.allowed:
                [(generation, _), *_] = grant.permits
                return Permit(request.call_id, request.job, quote, budgets, self._now_ms(), generation)
            reason = f"{quote.model.ref}: {_WHY[grant.reason.encode()]}, as far as this process knows"
            waits.append((reason, grant.wait_ms / 1000))
        reason, wait_seconds = min(waits, key=lambda one: one[1])
        return Refusal(reason, wait_seconds)

    def _settlement(self, permit: Permit, outcome: Outcome) -> tuple[list[str], str]:
        """Return SETTLE's keys and argument."""
        model, job, keys = permit.model, permit.job, self._keys
        circuit, provider_circuit, limits, model_limits, slots = self._keys_of(model.provider, model.tier, model.id)
        day = _day(permit.admitted_ms // DAY_MS)
        workflow, stage = place_of(job)
        worst_nano, cost_nano = _nano(permit.quote.worst_usd), _nano(outcome.cost_usd)
        told = {
            "call": permit.call_id,
            "ref": model.ref,
            "retention_s": self._settings.retention_seconds,
            "outcome": outcome.outcome,
            "ended_ms": self._now_ms(),
            "names": _names(model.provider, model.tier.value),
            "result": _told(
                outcome=outcome.health,
                latency_ms=outcome.latency_ms,
                worker=self._worker,
                error=outcome.error,
                retry_after_ms=_ms(outcome.retry_after),
            ),
            "limits": self._for_limits(permit, outcome),
            "budgets": [one.settled("", worst_nano or 0, cost_nano) for one in permit.budgets],
        } | _told(cost_nano=cost_nano)
        if outcome.outcome != "released":
            told["call_of"] = _told(
                ref=model.ref,
                names=_names(workflow, stage),
                workflow=workflow,
                stage=stage,
                day=day,
                kind=outcome.kind,
                score=_score(job, model, outcome),
                latency_ms=outcome.latency_ms,
                cost_nano=cost_nano,
                input=outcome.input_tokens,
                output=outcome.output_tokens,
                half_life=HALF_LIFE,
            )
        return [
            keys.call(permit.call_id),
            keys.calls,
            keys.circuits,
            circuit,
            provider_circuit,
            limits,
            model_limits,
            slots,
            keys.stats(workflow, stage, day),
            keys.evidence(workflow, stage),
            keys.evidence(workflow),
            keys.evidence(),
            keys.stages,
            *(one.key(keys) for one in permit.budgets),
        ], self._with_rules(told)

    def _with_rules(self, fields: dict[str, Any]) -> str:
        """Return an argument's JSON with the breaker's rules, which are always the same."""
        return f'{{"rules":{self._rules},{_json(fields)[1:]}'

    def _write(self, settlement: tuple[list[str], str]) -> None:
        keys, text = settlement
        try:
            with reaching(self._settings):
                _, event, passed = SETTLE(self._redis, keys, [text])
        except ServiceUnavailableError as error:
            if not _refused(error):
                raise
            logger.exception("call %s could not be settled in full", keys[0])  # again would fail again
            return
        self._report(keys, event, passed)

    def _write_all(self, settlements: Sequence[tuple[list[str], str]]) -> None:
        try:
            with reaching(self._settings):
                answers = SETTLE.many(self._redis, [(keys, [text]) for keys, text in settlements])
        except ServiceUnavailableError as error:
            if not _refused(error):
                raise
            for settlement in settlements:  # one of them is to blame; twice is once for the others
                self._write(settlement)
        else:
            for (keys, _), (_, event, passed) in zip(settlements, answers, strict=True):
                self._report(keys, event, passed)

    @staticmethod
    def _report(keys: Sequence[str], event: bytes, passed: Sequence[int]) -> None:
        if event:
            logger.warning("circuit %s: %s", keys[3].partition(":breaker:")[2], event.decode())
        for place in passed:
            logger.warning("soft budget %s is used up", keys[13 + place])

    def _for_limits(self, permit: Permit, outcome: Outcome) -> dict[str, Any]:
        cooldown_seconds = outcome.retry_after
        if cooldown_seconds is None and outcome.rate_limited:
            cooldown_seconds = self._settings.retry.backoff_seconds
        ended = Settled(
            call_id=permit.call_id,
            reserved_tokens=permit.quote.tokens,
            used_tokens=outcome.tokens,
            released=outcome.outcome == "released",
            cooldown_seconds=cooldown_seconds,
            reason=outcome.error or None,
            observed=outcome.observed,
        )
        return ended.told(self._settings.providers[permit.model.provider], self._settings.limits)

    def _keys_of_model(self, provider: str, tier: ModelTier, model_id: str) -> tuple[str, ...]:
        keys = self._keys
        return (
            keys.circuit(provider, tier.value),
            keys.circuit(provider, None),
            keys.limits(provider),
            keys.limits(provider, model_id),
            keys.slots(provider),
        )

    def _now_ms(self) -> int:
        """Return Redis' time as far as this process knows it: the clocks differ by what they differed last."""
        return round(time.time() * 1000 + self._clock_offset_ms)


def _refusal(
    request: Request, charged: Sequence[tuple[BudgetKey, ...]], now_ms: int, refusals: Sequence[Sequence[Any]]
) -> Refusal:
    """Return the soonest wait among the refusals; where money is what every candidate lacks, the first one's."""
    waits = [
        (at, f"{quote.model.ref}: {_WHY.get(why, why.decode())}")
        for quote, (kind, at, why, *_) in zip(request.quotes, refusals, strict=True)
        if kind == b"wait"
    ]
    if waits:
        at, reason = min(waits, key=lambda wait: wait[0])
        return Refusal(reason, max(0.001, (int(at) - now_ms) / 1000))
    _, at, _, left_nano, place = refusals[0]
    budget = charged[0][place]
    resets_at = datetime.fromtimestamp(int(at) / 1000, UTC)
    needed = "an unknown amount" if request.quotes[0].worst_usd is None else f"up to ${request.quotes[0].worst_usd:f}"
    left_usd = max(usd_of(int(left_nano)), Decimal(0))
    return Refusal(
        f"the hard budget {_scope(budget)} has ${left_usd:f} left and this job needs {needed} on "
        f"{request.quotes[0].model.ref}; it starts anew at {resets_at:%Y-%m-%d %H:%M} UTC",
        max(0.001, (int(at) - now_ms) / 1000),
        for_budget=True,
    )


def _circuits(model: ModelInfo) -> tuple[Name, Name]:
    """Return the names of the circuits that a call depends on: its tier's and its provider's."""
    return (model.provider, model.tier.value), (model.provider, None)


_OF_CIRCUITS = {b"open", b"probing", b"forced_open"}
"""Refusals that this process goes by, too, when Redis goes away."""

_WHY = {
    b"open": "its circuit is open",
    b"probing": "its circuit is half-open, and another call probes it",
    b"forced_open": "an operator has opened its circuit",
    b"cooldown": "its provider asked to be left alone",
    b"provider_limit": "its provider's rate limit is used up",
    b"requests_per_minute": "requests_per_minute is used up",
    b"tokens_per_minute": "tokens_per_minute is used up",
    b"concurrency": "all of its provider's slots are taken",
    b"budget_reserved": "calls under way have reserved what a hard budget has left",
}


def _refused(error: ServiceUnavailableError) -> bool:
    """Whether Redis is there and did not like what it was told; then waiting does not help."""
    cause = error.__cause__
    return type(cause) is ResponseError and not any(code in str(cause) for code in NO_ROOM)


def _scope(budget: BudgetKey) -> str:
    scope = [
        f"of {kind} {name!r}"
        for kind, name in (("tenant", budget.tenant), ("workflow", budget.workflow), ("provider", budget.provider))
        if name is not None
    ]
    return " ".join([f"per {budget.per}", *scope])


def _score(job: Job, model: ModelInfo, outcome: Outcome) -> float | None:
    """Return what a call says of the model as such, from 0 to 1; None: nothing.

    That a model below the job's own tier answered says that the call worked, not that the work was good: only
    feedback can tell.
    """
    if outcome.kind == "failure":
        return 0.0
    tier = model.tier if job.model else job.tier_hint or get_tier_for_task(job.task_type)
    return 1.0 if outcome.kind == "success" and _RANK[model.tier] >= _RANK[tier] else None


@lru_cache(maxsize=4096)
def _names(*names: str) -> str:
    return json.dumps(names)


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=number)).strftime("%Y%m%d")


def _nano(amount_usd: Decimal | None) -> int | None:
    return None if amount_usd is None else nano_of(amount_usd)


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _told(**fields: object) -> dict[str, Any]:
    """Return the fields that are known: a null would be a value to Lua."""
    return {name: value for name, value in fields.items() if value is not None}


_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
