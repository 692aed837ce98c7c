"""Can the auth strategy be read, that says which jobs go by a subscription? Jobs wait while it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from attune_worker.doctor.finding import Finding, Level
from attune_worker.errors import ConfigurationError
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.auth_store import auth_store
from attune_worker.models.credentials import credentials_of
from attune_worker.settings import Settings

FIX = "Mend it, or go back to the defaults: attune-worker auth reset --confirm"


def look(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Read the strategy; raises ``ServiceUnavailableError`` where it is kept in Redis, and Redis is away.

    Workers read it where a provider has a subscription whose token is there: else no job waits for it.
    """
    try:
        with closing(auth_store(settings)) as store:
            saved = store.read()
            if saved is None:
                return Finding("strategy", Level.OK, f"the defaults hold: nothing is kept in {store.place}")
            AuthStrategy.from_json(saved.raw, store.place)
            return Finding("strategy", Level.OK, f"kept in {store.place}")
    except ConfigurationError as error:
        return _unreadable(error.message, subscribed=_subscribed(settings, environ))


def _unreadable(error: str, *, subscribed: bool) -> Finding:
    if subscribed:
        text = f"{error}; jobs that do not say auth_mode themselves wait until it can be read"
        return Finding("strategy", Level.FAILED, text, FIX)
    text = f"{error}; no job waits for it, as no provider has a subscription here"
    return Finding("strategy", Level.WARNING, text, FIX)


def _subscribed(settings: Settings, environ: Mapping[str, str]) -> bool:
    here = (credentials_of(provider, environ) for provider in settings.providers.values())
    return any(one.subscription for found in here for one in found)
