"""What should a job cost, and what can it cost at most, before it is submitted?

Tokens are counted without a network, by what the fleet has learned of its calls (``sizing``); models, their order and
what rules them out are those that a worker would see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Generic, Self, TypeVar

from attune_worker.credentials import Credentials, CredentialStatus
from attune_worker.errors import NoCandidateError
from attune_worker.jobs import AuthMode, Job, ModelTier
from attune_worker.ledger import Comparison, Ledger
from attune_worker.models.adaptive import AdaptiveModelRouter, place_of
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.auth_current import get_auth_strategy
from attune_worker.models.modes import Mode, Quota, as_workers, mode_of, quota_of, wished
from attune_worker.models.offers import Offers
from attune_worker.models.pricing import plain_cost, worst_case_cost
from attune_worker.models.registry import ModelInfo, Registry
from attune_worker.models.routing import most_tokens, output_limit
from attune_worker.models.sizing import basis
from attune_worker.sections import RetrySettings
from attune_worker.settings import Settings, get_settings
from attune_worker.telemetry.store import Telemetry
from attune_worker.telemetry.views import StageView

LATELY_DAYS = 7
"""Over how many days (UTC, today included) estimates are held against what calls cost."""

FRESH_SECONDS = 5.0
"""For how long what was read of a stage is good enough for the next estimate."""

ACCURACY_SECONDS = 60.0
"""For how long what was read of the accuracy is: it takes a look at the sums of several days."""

_MAX_KEPT = 1000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How far off estimates of a model in a workflow were lately.

    ``ratio`` is what the calls cost by what had been expected of them, all together; ``mean_off_usd`` by how much the
    estimate of one call was off on average, whichever way.
    """

    calls: int
    ratio: float | None
    mean_off_usd: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateEstimate:
    """One call of one model for the job.

    ``serves``: it may be asked; ``why`` says what its place is, or what stands against it. ``expected_usd`` and
    ``worst_usd`` are those of a call that is paid by the token; None: no price is known. ``worst_usd`` cannot be
    passed: a token for every byte of the prompt, and an answer of ``max_tokens``; it is what budgets reserve.
    ``subscription`` is the same call by a subscription. ``mode`` says by which of the two the job would go (None: there
    is no credential for it), and ``mode_why`` what decided; ``spills``: by the token where no quota is left.
    ``source`` says what the expectation goes by, ``learned_calls`` how many calls that were (0: none, it is a guess).
    """

    model_id: str
    provider: str
    tier: ModelTier
    serves: bool
    why: str
    input_tokens: int
    most_input_tokens: int
    output_tokens: int
    most_output_tokens: int
    expected_usd: Decimal | None
    worst_usd: Decimal | None
    subscription: Quota
    mode: AuthMode | None
    mode_why: str
    spills: bool
    source: str
    learned_calls: int
    lately: Accuracy | None

    @property
    def ref(self) -> str:
        """The name that means this model and no other: ``provider/id``."""
        return f"{self.provider}/{self.model_id}"

    @property
    def by_quota(self) -> bool:
        """Whether the call would go by a subscription."""
        return self.mode is AuthMode.SUBSCRIPTION

    @property
    def due_usd(self) -> Decimal | None:
        """The money that the call should cost, paid for as the job would be."""
        return self.subscription.expected_usd if self.by_quota else self.expected_usd

    @property
    def most_due_usd(self) -> Decimal | None:
        """The most money that it can cost, paid for as the job would be; by the token, if it may spill."""
        return self.subscription.worst_usd if self.by_quota and not self.spills else self.worst_usd


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a job should cost: its candidates in the order in which they would be asked, then those that may not serve.

    ``expected_usd`` and ``worst_usd`` are those of one call of the first, by the ``mode`` that it would go by: by
    subscription 0, unless it may spill to a key. ``most_usd`` is for everything together: as
    many attempts as the settings allow, each at its worst and charged, on the dearest models that may serve. Only a
    job whose workers die can cost more. None: a price is not known, or no model may serve. ``rule`` says how the
    first is chosen (``pinned``, ``static``, ``adaptive``; none: no model may serve). A share of the jobs may go to
    another one, see ``Decision``.
    """

    workflow: str
    stage: str
    rule: str | None
    expected_usd: Decimal | None
    worst_usd: Decimal | None
    most_usd: Decimal | None
    candidates: tuple[CandidateEstimate, ...]

    @property
    def first(self) -> CandidateEstimate | None:
        """The model that would be asked first; None: none may serve."""
        return next((one for one in self.candidates if one.serves), None)


class Estimator:
    """Estimates jobs by what is known in Redis and by the auth strategy; safe for use from many threads.

    A provider whose key is missing here is passed over, as it would be by a worker here. Where no provider can be
    called from here at all, as in a web backend that only submits, the workers are taken to have all keys. Every
    method raises ``InvalidJobError`` for a job that names a model or provider which there is not,
    ``ConfigurationError`` for an auth strategy that cannot be read, and ``ServiceUnavailableError`` when Redis is away:
    a guess would look like knowledge, and the job could not be submitted either.
    """

    def __init__(self, settings: Settings | None = None, registry: Registry | None = None) -> None:
        self._settings = settings or get_settings()
        self._registry = registry or Registry.from_settings(self._settings)
        self._telemetry = Telemetry(self._settings)
        self._ledger = Ledger(self._settings)
        self._router = AdaptiveModelRouter(self._settings, self._registry, self._telemetry)
        self._offers = Offers(as_workers(self._settings), self._registry, self._strategy)
        self._credentials = self._offers.credentials
        self._subscribed = any(one.subscription for found in self._credentials.values() for one in found)
        self._standing = Credentials(self._settings)
        self._statuses: _Kept[dict[str, tuple[CredentialStatus, ...]]] = _Kept(FRESH_SECONDS)
        self._views: _Kept[StageView] = _Kept(FRESH_SECONDS)
        self._accuracies: _Kept[dict[str, Comparison]] = _Kept(ACCURACY_SECONDS)

    def estimate(self, job: Job) -> Estimate:
        """Return what ``job`` should cost with each model."""
        view, lately = self._known(job)
        rule, serving, dropped = self._ranked(job, view)
        paid = self._paid(job)
        found = [self._candidate(job, view, model, why, lately, paid, serves=True) for model, why in serving]
        others = [self._candidate(job, view, model, why, lately, paid, serves=False) for model, why in dropped]
        first = found[0] if found else None
        workflow, stage = place_of(job)
        return Estimate(
            workflow=workflow,
            stage=stage,
            rule=rule,
            expected_usd=None if first is None else first.due_usd,
            worst_usd=None if first is None else first.most_due_usd,
            most_usd=most_usd([one.most_due_usd for one in found], self._settings.retry),
            candidates=(*found, *others),
        )

    def first(self, job: Job) -> CandidateEstimate | None:
        """Return the estimate of the model that would be asked first, None where none may serve."""
        view, lately = self._known(job)
        _, serving, _ = self._ranked(job, view)
        return self._candidate(job, view, *serving[0], lately, self._paid(job), serves=True) if serving else None

    def close(self) -> None:
        """Give connections back."""
        self._ledger.close()
        self._router.close()
        self._standing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known(self, job: Job) -> tuple[StageView, dict[str, Comparison]]:
        workflow, stage = place_of(job)
        view = self._views.get((workflow, stage), lambda: self._telemetry.view(workflow, stage))
        return view, self._accuracies.get(workflow, lambda: self._ledger.compared(workflow, LATELY_DAYS))

    def _strategy(self) -> AuthStrategy:
        return get_auth_strategy(self._settings)

    def _paid(self, job: Job) -> Callable[[str, int, int], tuple[Mode, Quota]]:
        """Return what says how a job is paid for at a provider, and what so many tokens would take of a quota."""
        strategy = self._strategy() if self._subscribed else None
        wish, because = wished(job, strategy, self._settings.auth.spill_to_api)
        standing = self._statuses.get((), self._standing.status) if self._subscribed else {}

        def paid(provider: str, tokens: int, most: int) -> tuple[Mode, Quota]:
            there = self._credentials[provider]
            names = {one.name for one in there}
            statuses = [one for one in standing.get(provider, ()) if one.name in names]
            return mode_of(there, wish, because), quota_of(tokens, most, statuses)

        return paid

    def _ranked(
        self, job: Job, view: StageView
    ) -> tuple[str | None, list[tuple[ModelInfo, str]], list[tuple[ModelInfo, str]]]:
        """Return the rule, the models in the order in which they are asked, and those that may not serve, with why."""
        found = self._offers.candidates(job)
        dropped = list(found.dropped)
        try:
            ranking = self._router.rank(job, found, None, view)
        except NoCandidateError as error:
            return None, [], [*((model, str(error)) for model in found.models), *dropped]
        said = {f"{one.provider}/{one.model_id}": one.verdict for one in ranking.decision.candidates}
        serving = [(model, said.get(model.ref, "a fallback")) for model in ranking.models]
        left = [(model, said.get(model.ref, "left out")) for model in found.models if model not in ranking.models]
        return ranking.decision.rule, serving, left + dropped

    def _candidate(
        self,
        job: Job,
        view: StageView,
        model: ModelInfo,
        why: str,
        lately: dict[str, Comparison],
        paid: Callable[[str, int, int], tuple[Mode, Quota]],
        *,
        serves: bool,
    ) -> CandidateEstimate:
        learned, limit = basis(view, model.ref), output_limit(job, model, self._settings.default_max_tokens)
        prompt, answer = learned.tokens(job, limit)
        most = most_tokens(job)
        mode, quota = paid(model.provider, prompt + answer, most + limit)
        compared = lately.get(model.ref)
        return CandidateEstimate(
            model_id=model.id,
            provider=model.provider,
            tier=model.tier,
            serves=serves,
            why=why,
            input_tokens=prompt,
            most_input_tokens=most,
            output_tokens=answer,
            most_output_tokens=limit,
            expected_usd=plain_cost(model, prompt, answer),
            worst_usd=worst_case_cost(model, most, limit),
            subscription=quota,
            mode=mode.mode,
            mode_why=mode.why,
            spills=mode.spills,
            source=str(learned),
            learned_calls=learned.calls,
            lately=None if compared is None else Accuracy(compared.calls, compared.ratio, compared.mean_off_usd),
        )


def most_usd(worst_usd: Sequence[Decimal | None], retry: RetrySettings) -> Decimal | None:
    """Return the most that all attempts of a job cost together, given the worst case of each model that may serve."""
    known = [one for one in worst_usd if one is not None]
    if not known or len(known) < len(worst_usd):
        return None
    dearest = sorted(known, reverse=True)
    attempts = [one for one in dearest for _ in range(retry.max_attempts_per_model)]
    return sum(attempts[: retry.max_attempts], Decimal(0))


class _Kept(Generic[T]):
    """Values that are read again when they are older than ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: dict[Hashable, tuple[float, T]] = {}

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        now = time.monotonic()
        at, value = self._values.get(key, (now - self._seconds, None))
        if value is None or now - at >= self._seconds:
            value = read()
            if len(self._values) >= _MAX_KEPT:
                self._values.clear()
            self._values[key] = now, value
        return value
