"""Is everything there that a fleet needs, and could anything lose jobs or money? Findings, each with what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing

from attune_worker.doctor import circuits, credentials, installation, providers, state, strategy, transport
from attune_worker.doctor.finding import Finding, Level, unreachable
from attune_worker.doctor.installation import versions
from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import JobStatus
from attune_worker.origins import settings_file
from attune_worker.settings import Settings
from attune_worker.store.connection import connect
from attune_worker.store.records import Records

__all__ = ["Finding", "Level", "findings", "versions"]


def findings(
    settings: Settings, environ: Mapping[str, str] = os.environ, *, offline: bool = False
) -> Iterator[Finding]:
    """Look at everything, one thing after the other; what cannot be reached is a finding too.

    Unless ``offline``, each provider that can be called from here is asked for its list of models.
    """
    yield from installation.look()
    yield _file(environ)
    yield from providers.look(settings, environ, offline=offline)
    queued: int | None = None
    away = ""
    try:
        yield strategy.look(settings, environ)
        with closing(connect(settings, max_connections=4)) as redis:
            yield from state.server(settings, redis)
            counts = Records(settings, redis).counts()
            queued = counts[JobStatus.QUEUED]
            yield from state.jobs(counts)
            yield from credentials.look(settings, redis, environ)
            yield from circuits.look(settings, redis)
            yield state.workers(settings, redis)
    except ServiceUnavailableError as error:
        yield unreachable("redis", error, "redis_url")
        away = settings.redis_url.get_secret_value()
    if settings.broker != away:
        yield from transport.broker(settings, queued)
    yield from transport.backend(settings)


def _file(environ: Mapping[str, str]) -> Finding:
    file = settings_file(environ)
    return Finding("settings", Level.OK, f"read from {file.resolve()}" if file else "no attune.toml: defaults are used")
