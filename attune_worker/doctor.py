"""Is everything there that a fleet needs, and could anything lose jobs or money? Findings, each with what to do."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from statistics import median
from typing import Any

from attune_worker.app import is_amqp, make_app
from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import JobStatus
from attune_worker.models.price_list import get_pricing
from attune_worker.models.registry import Registry
from attune_worker.origins import settings_file
from attune_worker.settings import Settings, masked
from attune_worker.store.connection import RedisClient, connect, reaching
from attune_worker.store.leases import Leases
from attune_worker.store.records import Records
from attune_worker.store.server import NO_EVICTION, OLDEST_VERSION, Server, look_at
from attune_worker.wake_ups import messages_waiting

PACKAGES = ("attune-worker", "celery", "kombu", "redis", "httpx", "pydantic", "genai-prices", "flower")

PINGS = 21
"""Round trips that are timed: enough for a median that one slow answer does not move."""

SLOW_MS = 20.0
"""A call asks Redis twice; beyond this, waiting for it begins to show beside answers of a second."""

FULL = 0.9


class Level(StrEnum):
    """What a finding means.

    ``unknown``: it could not be found out. ``warning``: something should be done. ``failed``: jobs or money can be
    lost. ``unreachable``: a service does not answer.
    """

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    FAILED = "failed"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``fix`` says what to do where something is to be done."""

    check: str
    level: Level
    text: str
    fix: str = ""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def findings(settings: Settings, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at everything, one thing after the other; what cannot be reached is a finding too."""
    yield _file(environ)
    yield from _providers(settings, environ)
    queued: int | None = None
    away = ""
    try:
        with closing(connect(settings, max_connections=4)) as redis:
            yield from _redis(settings, redis)
            counts = Records(settings, redis).counts()
            queued = counts[JobStatus.QUEUED]
            yield from _jobs(counts)
            yield _workers(settings, redis)
    except ServiceUnavailableError as error:
        yield Finding("redis", Level.UNREACHABLE, error.message, "Start it, or correct redis_url.")
        away = settings.redis_url.get_secret_value()
    if settings.broker != away:
        yield _broker(settings, queued)
        yield from _eviction_of_broker(settings)
    yield from _backend(settings)


def _file(environ: Mapping[str, str]) -> Finding:
    file = settings_file(environ)
    return Finding("settings", Level.OK, f"read from {file.resolve()}" if file else "no attune.toml: defaults are used")


def _providers(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    usable = {name for name, provider in settings.providers.items() if provider.usable(environ)}
    without = sorted(set(settings.providers) - usable)
    text = f"can be called from here: {', '.join(sorted(usable)) or 'none'}"
    if without:
        text += f"; without a key: {', '.join(without)}"
    if usable:
        yield Finding("providers", Level.OK, text)
    else:
        yield Finding(
            "providers", Level.WARNING, text, "Workers need a provider's key, for instance ANTHROPIC_API_KEY."
        )
    unpriced = [
        model.ref
        for model in Registry.from_settings(settings).all()
        if model.provider in usable and get_pricing(model) is None
    ]
    if unpriced:
        yield Finding(
            "prices",
            Level.WARNING,
            f"not known of {', '.join(unpriced)}: the cost of these calls is unknown, and hard budgets refuse them",
            "Set input_cost_per_million and output_cost_per_million in [[models]], or price_list of the provider.",
        )
    elif usable:
        yield Finding("prices", Level.OK, "known of all models that can be called")


def _redis(settings: Settings, redis: RedisClient) -> Iterator[Finding]:
    servers = look_at(redis, settings)
    yield Finding("redis", Level.OK, f"answers at {masked(settings.redis_url.get_secret_value())}")
    for server in servers:
        yield _version(server)
        if server.replica:
            yield Finding(
                "role",
                Level.FAILED,
                f"{server.place} is a replica: it takes no jobs",
                "redis_url should name the primary.",
            )
        yield _eviction(server)
        yield from _memory(server)
        yield _durability(server)
    yield from _distance(settings, redis)


def _version(server: Server) -> Finding:
    oldest = ".".join(map(str, OLDEST_VERSION))
    if server.version is None:
        return Finding("version", Level.UNKNOWN, f"{server.place} does not say", f"It should be {oldest} or newer.")
    if server.too_old:
        return Finding("version", Level.FAILED, f"{server.place} is {server.version}", f"Upgrade to {oldest} or newer.")
    return Finding("version", Level.OK, f"{server.place} is {server.version}")


def _eviction(server: Server) -> Finding:
    fix = f"Set maxmemory-policy {NO_EVICTION}, in redis.conf or in your service's parameters."
    if server.eviction is None:
        return Finding("eviction", Level.UNKNOWN, f"{server.place} does not say its maxmemory-policy", fix)
    if not server.evicts:
        return Finding("eviction", Level.OK, f"{server.place} keeps everything ({NO_EVICTION})")
    text = f"{server.place} drops keys when its memory is full ({server.eviction}): accepted jobs, budgets, the ledger"
    return Finding("eviction", Level.FAILED, text, fix)


def _memory(server: Server) -> Iterator[Finding]:
    if server.memory_used is not None:
        text = f"{server.place} uses {server.memory_used:.0%} of its maxmemory"
        if server.memory_used < FULL:
            yield Finding("memory", Level.OK, text)
        else:
            yield Finding("memory", Level.WARNING, f"{text}: soon it refuses new jobs", "Raise maxmemory.")


def _durability(server: Server) -> Finding:
    fix = "Set appendonly yes and appendfsync everysec, unless your service keeps data in another way."
    if server.append_only is None:
        text = f"{server.place} does not say whether it has an append-only file"
        return Finding("durability", Level.UNKNOWN, text, fix)
    if not server.append_only:
        text = f"{server.place} has no append-only file: jobs accepted before it crashes may be lost"
        return Finding("durability", Level.WARNING, text, fix)
    if server.fsync == "no":
        text = f"{server.place} leaves it to the system when its append-only file reaches the disk (appendfsync no)"
        return Finding("durability", Level.WARNING, text, fix)
    how = {"everysec": "each second", "always": "at each write"}.get(server.fsync or "", "")
    how = f"is forced to the disk {how}" if how else "is on; how often it is forced to the disk, it does not say"
    return Finding("durability", Level.OK if server.fsync else Level.UNKNOWN, f"{server.place}: append-only file {how}")


def _distance(settings: Settings, redis: RedisClient) -> Iterator[Finding]:
    times_ms = []
    with reaching(settings):
        for _ in range(PINGS):
            began = time.perf_counter()
            redis.ping()
            times_ms.append((time.perf_counter() - began) * 1000)
        before = time.time()
        answer: Any = redis.time()
        here = (before + time.time()) / 2
    seconds, microseconds = answer
    text = f"a round trip takes {median(times_ms):.2f} ms (median of {PINGS})"
    if median(times_ms) > SLOW_MS:
        yield Finding("latency", Level.WARNING, text, "Each call takes two: run workers near Redis.")
    else:
        yield Finding("latency", Level.OK, text)
    ahead = here - (seconds + microseconds / 1_000_000)
    side = "ahead of" if ahead >= 0 else "behind"
    text = f"this machine is {abs(ahead):.3f} s {side} Redis, whose clock alone counts"
    yield Finding("clock", Level.OK, text)


def _jobs(counts: Mapping[JobStatus, int]) -> Iterator[Finding]:
    told = ", ".join(
        f"{counts[status]} {status}" for status in (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.WAITING)
    )
    yield Finding("jobs", Level.OK, told)
    if dead := counts[JobStatus.DEAD]:
        fix = "See why with attune-worker jobs dead; --retry runs them again."
        yield Finding("dead", Level.WARNING, f"jobs that too many workers were lost with: {dead}", fix)


def _workers(settings: Settings, redis: RedisClient) -> Finding:
    """Tell of the processes that run jobs: each holds a lease from its start."""
    live = [lease for lease, seconds in Leases(settings, redis).live().items() if seconds > 0]
    if live:
        return Finding("workers", Level.OK, f"{len(live)} alive: {', '.join(sorted(live))}")
    return Finding("workers", Level.WARNING, "none is alive: jobs wait", "Start one: attune-worker worker")


def _broker(settings: Settings, queued: int | None) -> Finding:
    with closing(make_app(settings)) as app:
        try:
            messages = messages_waiting(app)
        except ServiceUnavailableError as error:
            return Finding("broker", Level.UNREACHABLE, error.message, "Start it, or correct broker_url.")
    text = f"answers at {masked(settings.broker)}; {messages} messages in queue {settings.queue}"
    if queued is None:
        return Finding("broker", Level.OK, text)
    lost = f"; workers send the {queued - messages} missing ones again" if queued > messages else ""
    return Finding("broker", Level.OK, f"{text} for {queued} queued jobs{lost}")


def _eviction_of_broker(settings: Settings) -> Iterator[Finding]:
    """Look at a broker that is a Redis of its own: it holds the only copy of what is submitted as a Celery task."""
    if settings.broker_url is None or settings.broker == settings.redis_url.get_secret_value() or is_amqp(settings):
        return
    elsewhere = settings.model_copy(update={"redis_url": settings.broker_url})
    try:
        with closing(connect(elsewhere, max_connections=1)) as redis:
            yield from (_eviction(server) for server in look_at(redis, elsewhere))
    except ServiceUnavailableError as error:
        yield Finding("eviction", Level.UNKNOWN, error.message, "Look at maxmemory-policy of the broker.")


def _backend(settings: Settings) -> Iterator[Finding]:
    """Look at the result backend where it is a server of its own; it holds no more than summaries."""
    if settings.result_backend is None or settings.backend == settings.redis_url.get_secret_value():
        return
    elsewhere = settings.model_copy(update={"redis_url": settings.result_backend})
    try:
        with closing(connect(elsewhere, max_connections=1)) as redis, reaching(elsewhere):
            redis.ping()
    except ServiceUnavailableError as error:
        yield Finding("results", Level.UNREACHABLE, error.message, "Start it, or correct result_backend.")
    else:
        yield Finding("results", Level.OK, f"answers at {masked(settings.backend)}")
