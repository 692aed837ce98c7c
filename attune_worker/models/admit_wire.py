"""How is ADMIT asked? Keys, and what each candidate's call would be, in JSON; nothing is sent here."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from attune_worker.budget import BudgetKey, budgets_for
from attune_worker.limits import want
from attune_worker.models.calls import Charged, Quote, Request
from attune_worker.models.intent import Intent
from attune_worker.models.wire import in_nano, model_keys, to_json, told
from attune_worker.settings import Settings
from attune_worker.store.circuits import rules_in_ms
from attune_worker.store.keys import FleetKeys


class AdmitWire:
    """Speaks with ADMIT for one worker of one namespace; ``lease_ms`` is how long a call holds its place."""

    def __init__(self, settings: Settings, worker: str, lease_ms: int) -> None:
        self._settings = settings
        self._worker = worker
        self._lease_ms = lease_ms
        self._keys = FleetKeys(settings.namespace)
        self._keys_of = model_keys(self._keys)
        self._rules = to_json(rules_in_ms(settings.breaker))
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
            model = quote.model
            keys += self._keys_of(model.provider, model.tier.value, model.id, quote.credential.name)
            keys.append(fleet.credential(model.provider, quote.credential.name))
            candidates.append(self._candidate(request, quote, budgets, places))
        asked = {
            "call": request.call_id,
            "job": request.job_id,
            "worker": self._worker,
            "lease_ms": self._lease_ms,
            "recheck_ms": self._recheck_ms,
            "candidates": candidates,
        } | told(lease=request.lease or None)
        return [*keys, *places], (f'{{"rules":{self._rules},{to_json(asked)[1:]}',)

    def _candidate(
        self, request: Request, quote: Quote, budgets: tuple[BudgetKey, ...], places: dict[str, int]
    ) -> dict[str, Any]:
        """Return what ADMIT is told of a candidate; ``places`` are those of the budgets' keys, and grow."""
        model, worst_nano = quote.model, in_nano(quote.worst_usd)
        return {
            "ref": model.ref,
            "intent": Intent.for_call(request.job_id, request.lease, request.job, quote, budgets).kept(),
            "want": want(self._settings.providers[model.provider], self._settings.limits, quote.tokens),
            "budgets": [
                {"key": places.setdefault(one.key(self._keys), len(places)), "want": one.want(worst_nano)}
                for one in budgets
            ],
        } | told(estimate_nano=worst_nano, quota=self._quotas.get((model.provider, quote.credential.name)))
