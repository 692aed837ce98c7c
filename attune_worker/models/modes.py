"""Would a job go by a subscription or by the token, why, and what would it take of a quota? For estimates.

The decision is the one that a worker makes; what is left of quotas is read from Redis, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from pydantic import SecretStr

from attune_worker.credentials import CredentialStatus
from attune_worker.jobs import AuthMode, Job
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.credentials import Credential, Wish, lines_of, resolve, wish_of
from attune_worker.sections import ProviderSettings
from attune_worker.settings import Settings

ANY_SECRET = SecretStr("of-the-workers")
"""Stands for a secret that this process has not, and never sends."""


@dataclass(frozen=True, slots=True)
class QuotaShare:
    """What a call takes of a quota window: ``share`` is expected, ``most_share`` cannot be passed (both of 1).

    None: how many tokens the window holds is not learned yet. ``used`` was told by the provider last.
    """

    share: float | None
    most_share: float | None
    used: float
    resets_at: datetime | None


@dataclass(frozen=True, slots=True)
class Quota:
    """What a call takes out of a subscription: no money, and so many tokens of its quota.

    ``credential`` is the provider's subscription that would be asked, None: it has none. ``windows`` are those that
    the provider has told of. ``held`` says why not even a small call could go by it now (ADMIT's word), and
    ``held_until`` until when.
    """

    tokens: int
    most_tokens: int
    expected_usd: Decimal = Decimal(0)
    worst_usd: Decimal = Decimal(0)
    credential: str | None = None
    windows: Mapping[str, QuotaShare] = field(default_factory=dict)
    held: str | None = None
    held_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Mode:
    """How a job's calls would be paid for: ``mode`` (None: there is no credential for it), and what decided that.

    ``spills``: they may go by the token where no quota is left.
    """

    mode: AuthMode | None
    why: str
    spills: bool = False


def mode_of(present: Sequence[Credential], wish: Wish, recommended_because: str) -> Mode:
    """Return how calls go by the credentials ``present`` at a provider."""
    found = resolve(present, wish)
    modes = [one.mode for one in found.credentials]
    spills = AuthMode.SUBSCRIPTION in modes and AuthMode.API in modes
    decided = wish.own is None and any(one.subscription for one in present)
    why = f"{found.constraint}: {recommended_because}" if decided and recommended_because else found.constraint
    return Mode(modes[0] if modes else None, why, spills)


def wished(job: Job, strategy: AuthStrategy | None, spill_to_api: bool) -> tuple[Wish, str]:
    """Return how a job is to be paid for, and why the strategy recommends what it does (empty: it was not asked)."""
    wish = wish_of(job, strategy, spill_to_api)
    if strategy is None or job.auth_mode:
        return wish, ""
    lines = lines_of(job, strategy.multiplier().tokens_per_line)
    return wish, f"{lines:,} lines, {strategy.recommend(lines).reason}"


def quota_of(tokens: int, most_tokens: int, statuses: Sequence[CredentialStatus]) -> Quota:
    """Return what a call takes of a provider's subscriptions: of the one that could be asked soonest."""
    found = [one for one in statuses if one.mode is AuthMode.SUBSCRIPTION]
    if not found:
        return Quota(tokens, most_tokens)
    one = min(found, key=lambda one: (one.held is not None, 0.0 if one.held is None else one.held.until.timestamp()))
    windows = {
        name: QuotaShare(
            share=None if window.capacity_tokens is None else tokens / window.capacity_tokens,
            most_share=None if window.capacity_tokens is None else most_tokens / window.capacity_tokens,
            used=window.utilization,
            resets_at=window.resets_at,
        )
        for name, window in one.windows.items()
    }
    held = (None, None) if one.held is None else (one.held.reason, one.held.until)
    return Quota(tokens, most_tokens, credential=one.name, windows=windows, held=held[0], held_until=held[1])


def as_workers(settings: Settings) -> Settings:
    """Return the settings; where no provider can be called from here, as if all secrets were there, as workers have."""
    if any(one.usable() for one in settings.providers.values()):
        return settings
    open_to_all = {name: _with_secrets(one) for name, one in settings.providers.items()}
    return settings.model_copy(update={"providers": open_to_all})


def _with_secrets(provider: ProviderSettings) -> ProviderSettings:
    credentials = tuple(one.model_copy(update={"secret": ANY_SECRET}) for one in provider.credentials)
    api_key = None if provider.api_key is None else ANY_SECRET
    return provider.model_copy(update={"api_key": api_key, "credentials": credentials})
