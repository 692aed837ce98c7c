"""Which models may a job be called with, by which credentials, and at which price?

From settings, registry and auth strategy; nothing is asked of Redis or of a provider.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache

from attune_worker.jobs import Attempt, AuthMode, Job
from attune_worker.models.auth import AuthStrategy, Recommendation
from attune_worker.models.calls import Quote
from attune_worker.models.credentials import (
    PLAIN,
    Credential,
    Resolved,
    Ways,
    Wish,
    credentials_of,
    keyless,
    lines_of,
    resolve,
    spread,
    wish_of,
    without_silent_spill,
)
from attune_worker.models.pricing import plain_cost, worst_case_cost
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import Candidates, candidates, estimate_tokens, most_tokens, output_limit
from attune_worker.models.sizing import basis
from attune_worker.providers import adapter
from attune_worker.settings import Settings
from attune_worker.telemetry.views import StageView

MAX_KEPT = 1024
"""Kinds of jobs whose candidates are remembered."""


class Offers:
    """What models, credentials and prices come to for a job; safe for use from many threads.

    ``credentials`` are those whose secrets are there, by provider. ``resolved`` returns for a wish by which of them a
    call may go at each provider, and what decided.
    """

    def __init__(
        self, settings: Settings, registry: Registry, strategy: Callable[[], AuthStrategy] | None = None
    ) -> None:
        """``strategy`` returns the one that says which jobs should go by a subscription; without it none should."""
        self._settings = settings
        self._default_max_tokens = settings.default_max_tokens
        self._registry = registry
        self.credentials = {name: credentials_of(provider) for name, provider in settings.providers.items()}
        subscribed = any(one.subscription for found in self.credentials.values() for one in found)
        self._strategy = strategy if subscribed else None
        self.resolved = lru_cache(maxsize=16)(self._resolve)
        self._smallest_window = min((model.context_window or math.inf for model in registry.all()), default=math.inf)
        self._found: dict[tuple[object, ...], Candidates] = {}
        self._keyless = {
            name: keyless(provider) for name, provider in settings.providers.items() if not self.credentials[name]
        }

    def candidates(self, job: Job) -> Candidates:
        """Return the models that may serve ``job``, in static order, and why the others may not.

        For jobs that are alike it is worked out once; what is left of a ``max_cost`` is each job's own.
        """
        wish = self.wish(job)
        if job.max_cost is not None:
            return self._candidates(job, wish)
        alike = self._kind(job, wish)
        found = self._found.get(alike)
        if found is None:
            if len(self._found) >= MAX_KEPT:
                self._found.clear()
            found = self._found[alike] = self._candidates(job, wish)
        return found

    def wish(self, job: Job) -> Wish:
        """Return how the calls of ``job`` are to be paid for, as the strategy says now."""
        if self._strategy is None and job.auth_mode is None:
            return PLAIN
        return wish_of(job, self._strategy_for(job), self._settings.auth.spill_to_api)

    def recommendation(self, job: Job) -> tuple[int, Recommendation] | None:
        """Return for how many lines the strategy takes a job, and what it recommends; None: it has no say in it."""
        strategy = self._strategy_for(job)
        if strategy is None:
            return None
        lines = lines_of(job, strategy.multiplier().tokens_per_line)
        return lines, strategy.recommend(lines)

    def as_wished(self, found: Candidates, wish: Wish) -> Candidates:
        """Return the candidates without those that would turn a quota that is used up into a bill nobody allowed."""
        if wish.spill or wish.own is not None or wish.recommended is AuthMode.API:
            return found
        return without_silent_spill(found, self.credentials)

    def ways(self, job: Job, models: Sequence[ModelInfo], wish: Wish, spent_usd: Decimal) -> Ways:
        """Return by which credentials the models may be called for what is left of ``max_cost``."""
        dear = [] if job.max_cost is None else [model for model in models if self._too_dear(job, model, spent_usd)]
        found = self.resolved(wish).items()
        return Ways({name: spread(one.credentials, random.random) for name, one in found}, frozenset(dear))

    def quotes(self, job: Job, wanted: Sequence[tuple[ModelInfo, Credential]], view: StageView) -> tuple[Quote, ...]:
        """Return what a call by each of ``wanted`` takes at most, and should cost, going by those in its stage."""
        return tuple(self._quote(job, model, credential, view) for model, credential in wanted)

    def spent_usd(self, job: Job, attempt: Attempt) -> Decimal:
        """Return what an attempt cost, at worst where that is not known."""
        if attempt.cost_usd is not None:
            return attempt.cost_usd
        found = self._registry.find(f"{attempt.provider}/{attempt.model_id}")
        return (self._worst_case_usd(job, found[0]) if found else None) or Decimal(0)

    def _strategy_for(self, job: Job) -> AuthStrategy | None:
        return None if self._strategy is None or job.auth_mode is not None else self._strategy()

    def _kind(self, job: Job, wish: Wish) -> tuple[object, ...]:
        """Return what the candidates of a job without ``max_cost`` depend on."""
        tokens = estimate_tokens(job.text_bytes)
        fits_everywhere = tokens + (job.max_tokens or self._default_max_tokens) <= self._smallest_window
        return (
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

    def _candidates(self, job: Job, wish: Wish) -> Candidates:
        found = candidates(
            job, self._registry, self._default_max_tokens, lambda model: self._obstacle(job, model, wish)
        )
        return self.as_wished(found, wish)

    def _resolve(self, wish: Wish) -> dict[str, Resolved]:
        return {provider: resolve(found, wish) for provider, found in self.credentials.items()}

    def _obstacle(self, job: Job, model: ModelInfo, wish: Wish) -> str | None:
        if model.provider in self._keyless:
            return self._keyless[model.provider]
        kind = self._settings.providers[model.provider].kind
        if misfit := adapter(kind).misfit(job.temperature, job.stop):
            return misfit
        resolved = self.resolved(wish)[model.provider]
        if not resolved.credentials:
            return resolved.constraint
        free = any(one.subscription for one in resolved.credentials)
        return None if free else self._too_dear(job, model, Decimal(0))

    def _too_dear(self, job: Job, model: ModelInfo, spent_usd: Decimal) -> str | None:
        """Say why a call could take the job over its ``max_cost`` when that much is gone already, or None."""
        if job.max_cost is None:
            return None
        worst_usd = self._worst_case_usd(job, model)
        if worst_usd is None:
            return "its price is unknown, so max_cost cannot be kept"
        return f"may cost ${worst_usd:f}, over max_cost" if spent_usd + worst_usd > job.max_cost else None

    def _worst_case_usd(self, job: Job, model: ModelInfo) -> Decimal | None:
        return worst_case_cost(
            model, estimate_tokens(job.text_bytes), output_limit(job, model, self._default_max_tokens)
        )

    def _quote(self, job: Job, model: ModelInfo, credential: Credential, view: StageView) -> Quote:
        """Return what a call takes: by subscription the most it can, as nothing may go over a quota, and no money.

        By the token ``worst_usd`` is what it cannot go beyond, however the prompt is cut: what budgets reserve.
        """
        most, limit = most_tokens(job), output_limit(job, model, self._default_max_tokens)
        if credential.subscription:
            return Quote(model, most + limit, Decimal(0), credential, Decimal(0))
        tokens = estimate_tokens(job.text_bytes) + limit
        expected_usd = plain_cost(model, *basis(view, model.ref).tokens(job, limit))
        return Quote(model, tokens, worst_case_cost(model, most, limit), credential, expected_usd)
