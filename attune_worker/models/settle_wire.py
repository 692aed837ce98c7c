"""How is SETTLE told what a call did? Keys, JSON, and the ledger's record; nothing is sent here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from attune_worker.jobs import AuthMode, Job, ModelTier
from attune_worker.limits import Settled
from attune_worker.models.calls import Outcome, Permit
from attune_worker.models.credentials import DEFAULT, Credential
from attune_worker.models.intent import Intent
from attune_worker.models.registry import ModelInfo
from attune_worker.models.task_types import get_tier_for_task
from attune_worker.models.wire import in_ms, in_nano, model_keys, to_json, told
from attune_worker.settings import Settings
from attune_worker.store.circuits import rules_in_ms
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

Settlement = tuple[list[str], tuple[str, str]]
"""SETTLE's keys and arguments."""

_RANK = {tier: rank for rank, tier in enumerate(ModelTier)}


class SettleWire:
    """Speaks with SETTLE for one worker of one namespace."""

    def __init__(self, settings: Settings, worker: str) -> None:
        self._settings = settings
        self._worker = worker
        self._keys = FleetKeys(settings.namespace)
        self._keys_of = model_keys(self._keys)
        self.kept_seconds = max(settings.retention_seconds, SETTLED_SECONDS)
        self._rules = to_json(rules_in_ms(settings.breaker))
        self._keep = to_json(
            {
                "ledger_ms": settings.ledger.retention_days * DAY_MS,
                "records": settings.ledger.max_records,
                "sums_s": settings.ledger.sums_retention_days * DAY_MS // 1000,
            }
        )
        self._recheck_ms = round(settings.auth.recheck_seconds * 1000)

    def settle(self, permit: Permit, outcome: Outcome, ended_ms: int) -> Settlement:
        """Return SETTLE's keys and arguments; ``ended_ms`` is when the call ended, by Redis' clock.

        Where nobody knew that clock when the call began, it began its latency before.
        """
        credential = permit.credential
        worth_usd = outcome.worth_usd if credential.subscription else outcome.cost_usd
        outcome = _free_of_charge(outcome) if credential.subscription else outcome
        admitted_ms = permit.admitted_ms or ended_ms - outcome.latency_ms
        intent = Intent.for_call(permit.job_id, permit.lease, permit.job, permit.quote, permit.budgets)
        worst_nano, cost_nano = in_nano(permit.quote.worst_usd), in_nano(outcome.cost_usd)
        fields = {
            "ref": permit.model.ref,
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
            fields["call_of"] = _for_telemetry(permit, intent, outcome, admitted_ms, worth_usd)
        expected_nano = in_nano(permit.quote.expected_usd)
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
        } | told(cost_nano=in_nano(outcome.cost_usd))
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
            f'{{"rules":{self._rules},"keep":{self._keep},{to_json(fields)[1:]}',
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


def _for_telemetry(
    permit: Permit, intent: Intent, outcome: Outcome, admitted_ms: int, worth_usd: Decimal | None
) -> dict[str, Any]:
    """Return what routing learns of a call; what it was worth must not depend on who had quota left."""
    return told(
        ref=permit.model.ref,
        names=_names(intent.workflow, intent.stage),
        workflow=intent.workflow,
        stage=intent.stage,
        day=_day(admitted_ms // DAY_MS),
        kind=outcome.kind,
        score=_score(permit.job, permit.model, outcome),
        latency_ms=outcome.latency_ms,
        cost_nano=in_nano(worth_usd),
        input=outcome.input_tokens,
        output=outcome.output_tokens,
        bytes=permit.job.text_bytes if outcome.input_tokens else None,
        half_life=HALF_LIFE,
    )


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
        cost_nano=in_nano(outcome.cost_usd),
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
    return to_json({"call": call_id, **intent.names(), "outcome": outcome.outcome, "admitted_ms": admitted_ms, **known})


@lru_cache(maxsize=4096)
def _names(*names: str) -> str:
    return json.dumps(names)


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=number)).strftime("%Y%m%d")
