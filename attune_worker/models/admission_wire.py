"""How are ADMIT and SETTLE asked, and how are ADMIT's answers read? Keys, JSON and words; nothing is sent here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any

from attune_worker.budget import BudgetKey, budgets_for, nano_of, usd_of
from attune_worker.jobs import AuthMode, Job, ModelTier
from attune_worker.limits import Settled, want
from attune_worker.models.adaptive import place_of
from attune_worker.models.calls import Outcome, Permit, Quote, Refusal, Request
from attune_worker.models.credentials import DEFAULT, Credential
from attune_worker.models.intent import Intent
from attune_worker.models.registry import ModelInfo
from attune_worker.models.task_types import get_tier_for_task
from attune_worker.settings import Settings
from attune_worker.store.circuits import Name, rules_in_ms
from attune_worker.store.keys import FleetKeys
from attune_worker.telemetry.evidence import HALF_LIFE

DAY_MS = 86_400_000

CREDENTIAL = 16
"""Where the credential stands among SETTLE's keys."""

FIRST_BUDGET = 17
"""Where the budgets begin among SETTLE's keys."""

SETTLED_SECONDS = 600
"""How long a settled call is known at least. A settlement whose answer was lost in an outage is sent again when Redis
answers; by its age it is known for one even later. But a call without an intent may be one whose intent a failover has
lost: it counts if it was allowed no longer ago than this."""

Charged = Sequence[tuple[BudgetKey, ...]]
"""The budgets that each candidate's call would count against."""

Settlement = tuple[list[str], tuple[str, str]]
"""SETTLE's keys and arguments."""

_RANK = {tier: rank for rank, tier in enumerate(ModelTier)}


class Wire:
    """Speaks with both scripts for one worker of one namespace; ``lease_ms`` is how long a call holds its place."""

    def __init__(self, settings: Settings, worker: str, lease_ms: int) -> None:
        self._settings = settings
        self._worker = worker
        self._lease_ms = lease_ms
        self._keys = FleetKeys(settings.namespace)
        self.kept_seconds = max(settings.retention_seconds, SETTLED_SECONDS)
        self._rules = _json(rules_in_ms(settings.breaker))
        self._keep = _json(
            {
                "ledger_ms": settings.ledger.retention_days * DAY_MS,
                "records": settings.ledger.max_records,
                "sums_s": settings.ledger.sums_retention_days * DAY_MS // 1000,
            }
        )
        self._keys_of = lru_cache(maxsize=256)(self._keys_of_model)
        self._quotas = {
            (name, one.name): one.quota for name, provider in settings.providers.items() for one in provider.credentials
        }
        self._recheck_ms = round(settings.auth.recheck_seconds * 1000)
        self._budgets_for = lru_cache(maxsize=4096)(partial(budgets_for, settings.budgets))

    def charged(self, request: Request) -> Charged:
        """Return the budgets that each candidate's call would count against."""
        job = request.job
        return [self._budgets_for(job.tenant, job.workflow, quote.model.provider) for quote in request.quotes]

    def admit(self, request: Request, charged: Charged) -> tuple[list[str], tuple[str]]:
        """Return ADMIT's keys and argument."""
        fleet = self._keys
        keys = [
            fleet.call(request.call_id),
            fleet.calls,
            fleet.circuits,
            fleet.workers,
            fleet.job_calls(request.job_id),
        ]
        places: dict[str, int] = {}
        candidates = []
        for quote, budgets in zip(request.quotes, charged, strict=True):
            model, worst_nano = quote.model, _nano(quote.worst_usd)
            keys += self._keys_of(model.provider, model.tier.value, model.id, quote.credential.name)
            keys.append(fleet.credential(model.provider, quote.credential.name))
            provider = self._settings.providers[model.provider]
            candidates.append(
                {
                    "ref": model.ref,
                    "intent": _intent(request.job_id, request.lease, request.job, quote, budgets).kept(),
                    "want": want(provider, self._settings.limits, quote.tokens),
                    "budgets": [
                        {"key": places.setdefault(one.key(self._keys), len(places)), "want": one.want(worst_nano)}
                        for one in budgets
                    ],
                }
                | told(estimate_nano=worst_nano, quota=self._quotas.get((model.provider, quote.credential.name)))
            )
        asked = {
            "call": request.call_id,
            "job": request.job_id,
            "worker": self._worker,
            "lease_ms": self._lease_ms,
            "recheck_ms": self._recheck_ms,
            "candidates": candidates,
        } | told(lease=request.lease or None)
        return [*keys, *places], (f'{{"rules":{self._rules},{_json(asked)[1:]}',)

    def settle(self, permit: Permit, outcome: Outcome, ended_ms: int) -> Settlement:
        """Return SETTLE's keys and arguments; ``ended_ms`` is when the call ended, by Redis' clock.

        Where nobody knew that clock when the call began, it began its latency before.
        """
        model, job, credential = permit.model, permit.job, permit.credential
        worth_usd = outcome.worth_usd if credential.subscription else outcome.cost_usd
        outcome = _free_of_charge(outcome) if credential.subscription else outcome
        admitted_ms = permit.admitted_ms or ended_ms - outcome.latency_ms
        intent = _intent(permit.job_id, permit.lease, job, permit.quote, permit.budgets)
        worst_nano, cost_nano = _nano(permit.quote.worst_usd), _nano(outcome.cost_usd)
        fields = {
            "ref": model.ref,
            "ended_ms": ended_ms,
            "result": told(
                outcome=outcome.health,
                latency_ms=outcome.latency_ms,
                worker=self._worker,
                error=outcome.error,
                retry_after_ms=in_ms(outcome.retry_after),
            ),
            "limits": self._for_limits(permit, outcome),
            "credential": self._for_credential(credential, permit.quote.tokens, outcome),
            "budgets": [one.settled("", worst_nano or 0, cost_nano) for one in permit.budgets],
        } | told(cost_nano=cost_nano, intent_ms=(permit.own_generation is None and permit.admitted_ms) or None)
        if outcome.outcome != "released":
            fields["call_of"] = told(
                ref=model.ref,
                names=_names(intent.workflow, intent.stage),
                workflow=intent.workflow,
                stage=intent.stage,
                day=_day(admitted_ms // DAY_MS),
                kind=outcome.kind,
                score=_score(job, model, outcome),
                latency_ms=outcome.latency_ms,
                cost_nano=_nano(worth_usd),  # what routing learns must not depend on who had quota left
                input=outcome.input_tokens,
                output=outcome.output_tokens,
                bytes=job.text_bytes if outcome.input_tokens else None,
                half_life=HALF_LIFE,
            )
        expected_nano = _nano(permit.quote.expected_usd)
        return self._settlement(permit.call_id, intent, outcome, admitted_ms, worst_nano, fields, expected_nano)

    def orphan(self, call_id: str, intent: Intent, admitted_ms: int, worst_nano: int | None) -> Settlement:
        """Return SETTLE's keys and arguments for a call whose worker died; ``worst_nano`` is what it had reserved."""
        outcome = Outcome.orphaned()
        credential = Credential(intent.credential, AuthMode(intent.mode))
        if credential.subscription:
            outcome = _free_of_charge(outcome)
        fields = {
            "ref": f"{intent.provider}/{intent.model_id}",
            "result": {"outcome": outcome.health},
            "limits": {},
            "credential": self._for_credential(credential, 0, outcome),
            "budgets": [one.settled("", worst_nano or 0, None) for one in intent.budgets],
        } | told(cost_nano=_nano(outcome.cost_usd))
        return self._settlement(call_id, intent, outcome, admitted_ms, worst_nano, fields)

    def _settlement(
        self,
        call_id: str,
        intent: Intent,
        outcome: Outcome,
        admitted_ms: int,
        worst_nano: int | None,
        fields: dict[str, Any],
        expected_nano: int | None = None,
    ) -> Settlement:
        keys, day = self._keys, _day(admitted_ms // DAY_MS)
        workflow, stage = intent.workflow, intent.stage
        fields |= {
            "call": call_id,
            "kept_s": self.kept_seconds,
            "outcome": outcome.outcome,
            "names": _names(intent.provider, intent.tier),
            "kept": _kept(outcome),
            "sums": told(
                group=intent.group,
                estimate_nano=worst_nano,
                expected_nano=expected_nano,
                input=outcome.input_tokens,
                output=outcome.output_tokens,
            ),
        }
        return [
            keys.call(call_id),
            keys.calls,
            keys.circuits,
            *self._keys_of(intent.provider, intent.tier, intent.model_id, intent.credential),
            keys.stats(workflow, stage, day),
            keys.evidence(workflow, stage),
            keys.evidence(workflow),
            keys.evidence(),
            keys.stages,
            keys.ledger,
            keys.costs(day),
            keys.job_calls(intent.job_id),
            keys.credential(intent.provider, intent.credential),
            *(one.key(keys) for one in intent.budgets),
        ], (
            f'{{"rules":{self._rules},"keep":{self._keep},{_json(fields)[1:]}',
            _record(call_id, intent, outcome, admitted_ms, worst_nano, expected_nano),
        )

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

    def _for_credential(self, credential: Credential, reserved_tokens: int, outcome: Outcome) -> dict[str, Any]:
        """Return what ``credential_settle`` is told, besides what SETTLE knows; the default one's name goes unsaid."""
        refused = told(error=outcome.error, status=outcome.status, recheck_ms=self._recheck_ms)
        windows = outcome.observed.windows if outcome.observed is not None and credential.subscription else ()
        return told(
            name=None if credential.name == DEFAULT.name else credential.name,
            quota=credential.subscription or None,
            reserved_tokens=reserved_tokens if credential.subscription else None,
            refused=refused if outcome.refused else None,
            windows=[asdict(window) for window in windows] or None,
        )

    def _keys_of_model(self, provider: str, tier: str, model_id: str, credential: str) -> tuple[str, ...]:
        keys = self._keys
        return (
            keys.circuit(provider, tier),
            keys.circuit(provider, None),
            keys.limits(provider),
            keys.limits(provider, model_id, credential),
            keys.slots(provider),
        )


def refusal_of(request: Request, charged: Charged, now_ms: int, refusals: Sequence[Sequence[Any]]) -> Refusal:
    """Return the soonest wait among the refusals; where money is what every candidate lacks, the first one's."""
    waits = [
        (at, f"{quote.name}: {WHY.get(why, why.decode())}")
        for quote, (kind, at, why, *_) in zip(request.quotes, refusals, strict=True)
        if kind == b"wait"
    ]
    if waits:
        at, reason = min(waits, key=lambda wait: wait[0])
        return Refusal(reason, max(0.001, (int(at) - now_ms) / 1000))
    quote, refusal = request.quotes[0], refusals[0]
    at, place = int(refusal[1]), refusal[4]
    reason = without_money(quote, charged[0][place], refusal)
    after_seconds = 0.0 if refusal[2] == b"unknown_price" else max(0.001, (at - now_ms) / 1000)
    return Refusal(reason, after_seconds, for_budget=True)


def without_money(quote: Quote, budget: BudgetKey, refusal: Sequence[Any]) -> str:
    """Say why a hard budget has no room for a call, by ADMIT's refusal."""
    _, at, why, left_nano, _ = refusal
    if why == b"unknown_price":
        return f"the price of {quote.model.ref} is unknown, and the hard budget {_scope(budget)} allows no such call"
    resets_at = datetime.fromtimestamp(int(at) / 1000, UTC)
    left_usd = max(usd_of(int(left_nano)), Decimal(0))
    hint = ", too small even then: a smaller max_tokens helps" if why == b"budget_too_small" else ""
    return (
        f"the hard budget {_scope(budget)} has ${left_usd:f} left and this job needs up to "
        f"${quote.worst_usd:f} on {quote.model.ref}; it starts anew at {resets_at:%Y-%m-%d %H:%M} UTC{hint}"
    )


def circuits_of(model: ModelInfo) -> tuple[Name, Name]:
    """Return the names of the circuits that a call depends on: its tier's and its provider's."""
    return (model.provider, model.tier.value), (model.provider, None)


OF_CIRCUITS = {b"open", b"probing", b"forced_open"}
"""Refusals that this process goes by, too, when Redis goes away."""

WHY = {
    b"lease": "the lease of its worker is lost",
    b"open": "its circuit is open",
    b"probing": "its circuit is half-open, and another call probes it",
    b"forced_open": "an operator has opened its circuit",
    b"cooldown": "its provider asked to be left alone",
    b"provider_limit": "its provider's rate limit is used up",
    b"requests_per_minute": "requests_per_minute is used up",
    b"tokens_per_minute": "tokens_per_minute is used up",
    b"concurrency": "all of its provider's slots are taken",
    b"credential_refused": "its provider does not accept this key at the moment; it is tried again from time to time",
    b"quota_used_up": "the subscription's quota is used up",
    b"quota_paced": "the subscription's quota is spread evenly until it is back",
    b"quota_reserved": "calls under way hold what the subscription's quota has left",
    b"quota_unknown": "another call finds out what the subscription's quota has left",
    b"budget_reserved": "calls under way have reserved what a hard budget has left",
}


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


def _free_of_charge(outcome: Outcome) -> Outcome:
    """Return the outcome of a call by subscription: whatever became of it, it costs quota and no money."""
    return replace(outcome, cost_usd=Decimal(0))


def _intent(job_id: str, lease: str, job: Job, quote: Quote, budgets: tuple[BudgetKey, ...]) -> Intent:
    (workflow, stage), model, credential = place_of(job), quote.model, quote.credential
    return Intent(
        job_id=job_id,
        lease=lease,
        tenant=job.tenant,
        workflow=workflow,
        stage=stage,
        provider=model.provider,
        model_id=model.id,
        tier=model.tier.value,
        budgets=budgets,
        mode=credential.mode.value,
        credential=credential.name,
    )


def _kept(outcome: Outcome) -> list[str | int]:
    """Return the fields of a call that its job's history is made of, names and values in turn."""
    fields = told(
        error=outcome.error or None,
        latency_ms=outcome.latency_ms,
        status=outcome.status,
        request_id=outcome.request_id,
    )
    return [text for field in fields.items() for text in field]


def _record(
    call_id: str,
    intent: Intent,
    outcome: Outcome,
    admitted_ms: int,
    worst_nano: int | None,
    expected_nano: int | None,
) -> str:
    """Return the ledger's record of a call, as ``LedgerRecord.from_json`` reads it."""
    known = told(
        error=outcome.error or None,
        cost_nano=_nano(outcome.cost_usd),
        estimate_nano=worst_nano,
        expected_nano=expected_nano,
        input=outcome.input_tokens,
        output=outcome.output_tokens,
        cache_read=outcome.cache_read_tokens,
        cache_write=outcome.cache_write_tokens,
        latency_ms=None if outcome.outcome == "orphaned" else outcome.latency_ms,
        status=outcome.status,
        request_id=outcome.request_id,
    )
    return _json({"call": call_id, **intent.names(), "outcome": outcome.outcome, "admitted_ms": admitted_ms, **known})


@lru_cache(maxsize=4096)
def _names(*names: str) -> str:
    return json.dumps(names)


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=number)).strftime("%Y%m%d")


def _nano(amount_usd: Decimal | None) -> int | None:
    return None if amount_usd is None else nano_of(amount_usd)


def in_ms(seconds: float | None) -> int | None:
    """Return seconds in whole milliseconds, and None for None."""
    return None if seconds is None else round(seconds * 1000)


def told(**fields: object) -> dict[str, Any]:
    """Return the fields that are known: a null would be a value to Lua."""
    return {name: value for name, value in fields.items() if value is not None}


_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
