"""What kind of Redis is it, and could it lose what it was given?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from redis import Redis, exceptions

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, connect, reaching

OLDEST_VERSION = (6, 2)
"""Of Redis, and what Valkey and others claim to be compatible with in ``redis_version``."""

NO_EVICTION = "noeviction"


@dataclass(frozen=True, slots=True)
class Server:
    """What one server says of itself; None: it does not say, or may not be asked (a managed service, an ACL).

    ``eviction`` is its maxmemory-policy; memory is in bytes, and a ``max_memory`` of 0 means no limit. ``fsync``:
    how often an append-only file is forced to the disk.
    """

    place: str
    version: str | None = None
    replica: bool | None = None
    eviction: str | None = None
    used_memory: int | None = None
    max_memory: int | None = None
    append_only: bool | None = None
    fsync: str | None = None

    @property
    def too_old(self) -> bool:
        """Whether its version is known to be older than what attune-worker needs."""
        try:
            parts = tuple(int(part) for part in (self.version or "").split(".")[:2])
        except ValueError:
            return False
        return self.version is not None and parts < OLDEST_VERSION

    @property
    def evicts(self) -> bool:
        """Whether it is known to drop keys when its memory is full."""
        return self.eviction is not None and self.eviction != NO_EVICTION

    @property
    def memory_used(self) -> float | None:
        """The share of the allowed memory that is in use; None: not known, or no limit."""
        return None if self.used_memory is None or not self.max_memory else self.used_memory / self.max_memory


def look_at(redis: RedisClient, settings: Settings) -> list[Server]:
    """Return what the server says of itself, or each primary of a cluster.

    Raises ``ServiceUnavailableError`` when one cannot be reached.
    """
    with reaching(settings):
        if isinstance(redis, Redis):
            place = redis.connection_pool.connection_kwargs
            return [_look_at(redis, f"{place.get('host', place.get('path', 'localhost'))}:{place.get('port', 6379)}")]
        primaries: Callable[[], list[Any]] = redis.get_primaries
        return [_look_at(redis.get_redis_connection(node), node.name) for node in primaries()]


def eviction_warning(settings: Settings) -> str | None:
    """Return what to warn of when Redis may drop keys, such as accepted jobs, once its memory is full.

    None where it may not, does not say, or cannot be reached.
    """
    try:
        with closing(connect(settings, max_connections=1)) as redis:
            servers = look_at(redis, settings)
    except ServiceUnavailableError:
        return None  # who uses Redis says so
    for server in servers:
        if server.evicts:
            return (
                f"Redis at {server.place} drops keys when its memory is full (maxmemory-policy {server.eviction}): "
                f"accepted jobs, budgets and the ledger can vanish; set maxmemory-policy {NO_EVICTION}"
            )
    return None


def _look_at(redis: Redis, place: str) -> Server:
    told = _asked(redis.info)
    policy = told.get("maxmemory_policy") or _asked(redis.config_get, "maxmemory-policy").get("maxmemory-policy")
    append_only = told.get("aof_enabled")
    return Server(
        place=place,
        version=_text(told.get("redis_version")),
        replica=None if "role" not in told else told["role"] != "master",
        eviction=_text(policy),
        used_memory=told.get("used_memory"),
        max_memory=told.get("maxmemory"),
        append_only=None if append_only is None else bool(append_only),
        fsync=_text(_asked(redis.config_get, "appendfsync").get("appendfsync")),
    )


def _asked(command: Callable[..., Any], *arguments: str) -> Mapping[str, Any]:
    """Return the answer, or nothing where Redis refuses the command."""
    try:
        answer: Mapping[str, Any] = command(*arguments)
    except exceptions.ResponseError:  # managed services have no CONFIG, and an ACL may forbid INFO
        return {}
    return answer


def _text(value: object) -> str | None:
    return None if value is None else value.decode(errors="replace") if isinstance(value, bytes) else str(value)
