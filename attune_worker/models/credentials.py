"""By which of a provider's keys may a job's call go, and which is tried first?

Pure: from the keys that are there, the job's own wish, and what the auth strategy recommends for its size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attune_worker.jobs import AuthMode, Job
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.registry import ModelInfo
from attune_worker.models.routing import Candidates, estimate_tokens
from attune_worker.providers.base import Endpoint
from attune_worker.sections import DEFAULT_CREDENTIAL, ProviderSettings
from attune_worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Credential:
    """One key of a provider (``api``), or the bearer token of a subscription to it."""

    name: str = DEFAULT_CREDENTIAL
    mode: AuthMode = AuthMode.API

    @property
    def subscription(self) -> bool:
        """Whether its calls count against a quota instead of costing money."""
        return self.mode is AuthMode.SUBSCRIPTION


DEFAULT = Credential()


@dataclass(frozen=True, slots=True)
class Ways:
    """By which credentials models may be called, in order: those of their provider.

    Those in ``dear`` cost more by the token than the job may, so that only a subscription will do.
    """

    by_provider: Mapping[str, tuple[Credential, ...]]
    dear: frozenset[ModelInfo] = frozenset()

    def of(self, model: ModelInfo) -> tuple[Credential, ...]:
        """Return the credentials by which a model may be called."""
        found = self.by_provider.get(model.provider, ())
        return tuple(one for one in found if one.subscription) if self.dear and model in self.dear else found


@dataclass(frozen=True, slots=True)
class Wish:
    """How a job's calls are to be paid for.

    ``own`` is the job's own wish, ``recommended`` what the strategy says of its size. ``spill``: what was to go by
    subscription may be paid for by the token where no quota is left.
    """

    own: AuthMode | None = None
    recommended: AuthMode = AuthMode.API
    spill: bool = False


PLAIN = Wish()
"""Of nearly all jobs: nobody wishes for anything."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The credentials to try, in order, and the constraint that decided; without any, it says why."""

    credentials: tuple[Credential, ...]
    constraint: str


def credentials_of(provider: ProviderSettings, environ: Mapping[str, str] = os.environ) -> tuple[Credential, ...]:
    """Return the credentials of a provider whose secrets are there; a server that needs no key has the default one."""
    modes = {one.name: AuthMode(one.mode) for one in provider.credentials}
    return tuple(Credential(name, modes.get(name, AuthMode.API)) for name in provider.keys(environ))


def endpoints_of(
    settings: Settings, credentials: Mapping[str, Sequence[Credential]]
) -> dict[tuple[str, str], Endpoint]:
    """Return where each provider is and what opens it, by the names of provider and credential."""
    found = {}
    for name, provider in settings.providers.items():
        keys = provider.keys()
        for one in credentials[name]:
            found[name, one.name] = Endpoint(name, provider.base_url, keys[one.name], bearer=one.subscription)
    return found


def keyless(provider: ProviderSettings) -> str:
    """Return what is missing for a provider that has no credential."""
    names = list(provider.variables().values())
    return f"has no API key (set {' or '.join(names)})" if names else "has no API key"


def wish_of(job: Job, strategy: AuthStrategy | None, spill_to_api: bool) -> Wish:
    """Return how a job is to be paid for; without a strategy by the token, unless the job has a wish of its own."""
    spill = spill_to_api if job.spill_to_api is None else job.spill_to_api
    recommended = AuthMode.API
    if strategy is not None and job.auth_mode is None:
        recommended = strategy.recommend(lines_of(job, strategy.multiplier().tokens_per_line)).mode
    return Wish(job.auth_mode, recommended, spill)


def lines_of(job: Job, tokens_per_line: float) -> int:
    """Return the lines of the module that a job is about, by its own word or its prompt's length."""
    return int(estimate_tokens(job.text_bytes) / tokens_per_line) if job.module_lines is None else job.module_lines


def resolve(present: Sequence[Credential], wish: Wish) -> Resolved:
    """Return by which of the credentials ``present`` at one provider a call may go."""
    subscriptions = tuple(one for one in present if one.subscription)
    keys = tuple(one for one in present if not one.subscription)
    spilled = keys if wish.spill else ()
    if wish.own is AuthMode.API:
        return Resolved(keys, "the job asks for an API key" if keys else "has no API key, which the job asks for")
    if wish.own is AuthMode.SUBSCRIPTION:
        if subscriptions or spilled:
            return Resolved((*subscriptions, *spilled), f"the job asks for a subscription{_and_may(spilled)}")
        return Resolved((), "has no subscription, which the job asks for, and spill_to_api is off")
    if not subscriptions:
        return Resolved(keys, "there is no subscription")
    if wish.recommended is AuthMode.SUBSCRIPTION:
        why = f"the strategy recommends a subscription for a job of its size{_and_may(spilled)}"
        return Resolved((*subscriptions, *spilled), why)
    why = "the strategy recommends an API key for a job of its size"
    return Resolved(keys or subscriptions, why if keys else f"{why}, but there are only subscriptions")


def spread(credentials: tuple[Credential, ...], random: Callable[[], float]) -> tuple[Credential, ...]:
    """Return the credentials with those of one mode in random order, so that the load is spread over them."""
    if len(credentials) < 2:
        return credentials
    first = credentials[0].mode
    return tuple(sorted(credentials, key=lambda one: (one.mode is not first, random())))


def without_silent_spill(found: Candidates, credentials: Mapping[str, Sequence[Credential]]) -> Candidates:
    """Leave out who can only be paid by the token, where the strategy recommends a subscription and there is one.

    Else a quota that is used up would turn into a bill at another provider, which nobody has allowed.
    """
    covered = {name for name, those in credentials.items() if any(one.subscription for one in those)}
    kept = tuple(model for model in found.models if model.provider in covered)
    if not kept or len(kept) == len(found.models):
        return found
    reason = "is paid by the token, while others go by subscription (spill_to_api is off)"
    dropped = tuple((model, reason) for model in found.models if model.provider not in covered)
    return Candidates(kept, (*found.dropped, *dropped))


def _and_may(spilled: Sequence[Credential]) -> str:
    return ", and may spill to an API key" if spilled else ""
