"""Does the Redis that holds the shared state keep it, and is it near? And who works with it?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from attune_worker.doctor.finding import Finding, Level
from attune_worker.jobs import JobStatus
from attune_worker.settings import Settings, masked
from attune_worker.store.connection import RedisClient, reaching
from attune_worker.store.leases import Leases
from attune_worker.store.server import NO_EVICTION, OLDEST_VERSION, Server, look_at

PINGS = 21
"""Round trips that are timed: enough for a median that one slow answer does not move."""

SLOW_MS = 20.0
"""A call asks Redis twice; beyond this, waiting for it begins to show beside answers of a second."""

FULL = 0.9

SKEWED_SECONDS = 60.0
"""Nothing is decided by this machine's clock; from here on whoever compares logs of two machines is misled."""


def server(settings: Settings, redis: RedisClient) -> Iterator[Finding]:
    """Look at the servers, and at the way to them."""
    servers = look_at(redis, settings)
    yield Finding("redis", Level.OK, f"answers at {masked(settings.redis_url.get_secret_value())}")
    for one in servers:
        yield _version(one)
        if one.replica:
            yield Finding(
                "role",
                Level.FAILED,
                f"{one.place} is a replica: it takes no jobs",
                "redis_url should name the primary.",
            )
        yield eviction(one)
        yield from _memory(one)
        yield _durability(one)
    yield from _distance(settings, redis)


def _version(server: Server) -> Finding:
    oldest = ".".join(map(str, OLDEST_VERSION))
    if server.version is None:
        return Finding("version", Level.UNKNOWN, f"{server.place} does not say", f"It should be {oldest} or newer.")
    if server.too_old:
        return Finding("version", Level.FAILED, f"{server.place} is {server.version}", f"Upgrade to {oldest} or newer.")
    return Finding("version", Level.OK, f"{server.place} is {server.version}")


def eviction(server: Server) -> Finding:
    """Judge what a Redis does when its memory is full."""
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
    yield clock(here - (seconds + microseconds / 1_000_000))


def clock(ahead_seconds: float) -> Finding:
    """Judge by how much this machine's clock is ahead of Redis'."""
    side = "ahead of" if ahead_seconds >= 0 else "behind"
    text = f"this machine is {abs(ahead_seconds):.3f} s {side} Redis, whose clock alone counts"
    if abs(ahead_seconds) < SKEWED_SECONDS:
        return Finding("clock", Level.OK, text)
    text += ": no job suffers, but the times in this machine's logs mislead"
    return Finding("clock", Level.WARNING, text, "Set the clocks by NTP, on both machines.")


def jobs(counts: Mapping[JobStatus, int]) -> Iterator[Finding]:
    """Tell how many jobs there are, and of those that nobody takes any more."""
    told = ", ".join(
        f"{counts[status]} {status}" for status in (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.WAITING)
    )
    yield Finding("jobs", Level.OK, told)
    if dead := counts[JobStatus.DEAD]:
        fix = "See why with attune-worker jobs dead; --retry runs them again."
        yield Finding("dead", Level.WARNING, f"jobs that too many workers were lost with: {dead}", fix)


def workers(settings: Settings, redis: RedisClient) -> Finding:
    """Tell of the processes that run jobs: each holds a lease from its start."""
    live = [lease for lease, seconds in Leases(settings, redis).live().items() if seconds > 0]
    if live:
        return Finding("workers", Level.OK, f"{len(live)} alive: {', '.join(sorted(live))}")
    return Finding("workers", Level.WARNING, "none is alive: jobs wait", "Start one: attune-worker worker")
