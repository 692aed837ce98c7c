"""What should those who start a worker be told at once, before they wonder?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing

from attune_worker.credentials import missing
from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import AuthMode
from attune_worker.settings import Settings
from attune_worker.store.connection import connect, reaching

PATIENCE_SECONDS = 1.0
"""How long the start waits for an answer of Redis, at most, each time that it tries."""


def complaints(settings: Settings, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yield what keeps this worker from doing its part, and what to do."""
    yield from _redis(settings)
    yield from _subscriptions(settings, environ)


def _redis(settings: Settings) -> Iterator[str]:
    impatient = settings.model_copy(
        update={"redis_timeout_seconds": min(settings.redis_timeout_seconds, PATIENCE_SECONDS)}
    )
    try:
        with closing(connect(impatient, max_connections=1)) as redis, reaching(impatient):
            redis.ping()
    except ServiceUnavailableError as error:
        yield f"{error.message}; this worker goes on trying"


def _subscriptions(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """A worker without the token takes a provider for one that has no subscription, and pays by the token."""
    return (str(one) for one in missing(settings, environ) if one.one.mode is AuthMode.SUBSCRIPTION)
