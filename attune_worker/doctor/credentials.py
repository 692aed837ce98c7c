"""Which keys do the providers refuse the fleet, and which subscriptions have no quota left?

This is what calls have met with, as Redis keeps it; ``providers`` asks how it is now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attune_worker.credentials import Credentials, CredentialStatus
from attune_worker.doctor.finding import Finding, Level
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient

Statuses = Mapping[str, Sequence[CredentialStatus]]


def look(settings: Settings, redis: RedisClient, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Look at every credential; raises ``ServiceUnavailableError`` when Redis is away."""
    return judged(Credentials(settings, redis, environ).status(), spills=settings.auth.spill_to_api)


def judged(statuses: Statuses, *, spills: bool = False) -> Iterator[Finding]:
    """Judge how they stand; that one is refused is bearable while any other is not."""
    found = [(f"{provider}/{one.name}", one) for provider, those in statuses.items() for one in those]
    here = [one for _, one in found if one.present] or [one for _, one in found]
    level = Level.FAILED if all(one.refused for one in here) else Level.WARNING
    held = False
    for name, one in found:
        if one.refused:
            held = True
            yield _refused(name, one, level)
        elif one.held is not None and one.held.reason == "quota_used_up":
            held = True
            yield _used_up(name, one, spills=spills)
    if not held:
        yield Finding("credentials", Level.OK, "calls have met with no refused key and no quota that is used up")


def _refused(name: str, one: CredentialStatus, level: Level) -> Finding:
    assert one.refused is not None  # noqa: S101  # the caller has looked
    refused = one.refused
    status = f", {refused.status}" if refused.status else ""
    text = f"{name} is refused since {refused.since:%Y-%m-%d %H:%M:%S} UTC ({refused.error}{status})"
    text += f"; one call tries it again at {refused.recheck_at:%H:%M:%S}"
    if level is Level.FAILED:
        text += "; no other key is left"
    fix = f"Renew or pay for it, then: attune-worker auth reset --key {name}"
    return Finding("credentials", level, text, fix)


def _used_up(name: str, one: CredentialStatus, *, spills: bool) -> Finding:
    assert one.held is not None  # noqa: S101  # the caller has looked
    told = ", ".join(f"{window} at {quota.utilization:.0%}" for window, quota in one.windows.items())
    goes = "its jobs go by a key meanwhile, if their provider has one" if spills else "jobs that are to go by it wait"
    text = f"{name} has no quota left ({told}); calls go again at {one.held.until:%Y-%m-%d %H:%M:%S} UTC; {goes}"
    return Finding(
        "credentials", Level.WARNING, text, "Wait, or let jobs go by a key: spill_to_api = true under [auth]."
    )
