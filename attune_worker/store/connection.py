"""How is Redis reached, one server or a cluster, and what is said when it is not?"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty
from socket import socket
from typing import Any

from redis import BlockingConnectionPool, Redis, exceptions
from redis.backoff import ExponentialWithJitterBackoff
from redis.client import PubSub
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from attune_worker.errors import ConfigurationError, ServiceUnavailableError
from attune_worker.settings import Settings, is_cluster, masked

MAX_CONNECTIONS = 64
"""Per process, and node of a cluster. Commands take under a millisecond, so hundreds of threads share a few."""

RETRIES = 3
"""How often a command is sent again when the connection breaks or cannot be made."""

CONNECTION_WAIT_SECONDS = 60.0
"""How long a thread waits for one of them. In a worker short of CPU a crowd of threads can need seconds to take
turns; that says nothing about Redis, whose own timeout begins when a command is sent."""

RedisClient = Redis | RedisCluster
"""What scripts run on: ``redis_url`` says which of the two."""

Command = tuple[str | bytes | int | float, ...]


class Cluster(RedisCluster):
    """A cluster's client that keeps to our rule: sent again when a connection breaks, not when a timeout passes."""

    ERRORS_ALLOW_RETRY = (  # type: ignore[assignment]  # redis-py's is a tuple of exactly four
        exceptions.ConnectionError,
        exceptions.ClusterDownError,
        exceptions.SlotNotCoveredError,
    )

    def close(self) -> None:
        """Close its connections, which redis-py's own leaves open when the client was made from a URL."""
        disconnect: Callable[[], None] = self.disconnect_connection_pools
        disconnect()
        super().close()


def connect(settings: Settings, *, max_connections: int = MAX_CONNECTIONS) -> RedisClient:
    """Return a client for the shared state; nothing is sent until it is used, except to a cluster.

    Every command has a timeout. It is sent again a few times when the connection breaks, though not when
    the timeout passes: all that attune-worker sends may safely arrive twice. Raises
    ``ConfigurationError`` for a URL that is none. A cluster is asked here which nodes it has; raises
    ``ServiceUnavailableError`` when none of those in the URL answers.
    """
    url = settings.redis_url.get_secret_value()
    timeout_seconds = settings.redis_timeout_seconds
    options: dict[str, Any] = {
        "retry": Retry(
            ExponentialWithJitterBackoff(base=0.05, cap=0.5), RETRIES, supported_errors=(exceptions.ConnectionError,)
        ),
        "max_connections": max_connections,
        "timeout": CONNECTION_WAIT_SECONDS,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "socket_keepalive": True,
        "encoding_errors": "surrogatepass",
    }
    try:
        if not is_cluster(url):
            return _server(url, options)
        nodes = _nodes(url)
    except ValueError:  # its words may quote the password
        raise ConfigurationError(
            "redis_url: it should be like redis://:password@host:6379/0, rediss://…, or, for a cluster, "
            "redis+cluster://:password@host:6379,host:6379, with special characters in the password percent-encoded"
        ) from None
    with reaching(settings):
        return _cluster(url, nodes, options)


def _server(url: str, options: dict[str, Any]) -> Redis:
    pool = BlockingConnectionPool.from_url(url, health_check_interval=25, **options)
    client = Redis.from_pool(pool)
    # It closes them itself in its finalizer, which in a cycle may come after those of the sockets.
    weakref.finalize(client, pool.disconnect).atexit = False
    return client


def _cluster(url: str, nodes: list[ClusterNode], options: dict[str, Any]) -> Cluster:
    sockets: dict[int, socket] = {}  # by connection; those of a cluster's nodes refer to its client, a cycle

    def connected(connection: Any) -> None:
        sockets[id(connection)] = connection._sock  # noqa: SLF001  # it has no public name

    with ExitStack() as refused:
        refused.callback(_close_all, sockets)
        cluster = Cluster(
            url=node_urls(url)[0],
            startup_nodes=nodes[1:],
            connection_pool_class=BlockingConnectionPool,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),  # pools would trust idle connections
            redis_connect_func=connected,
            **options,
        )
        refused.pop_all()
    weakref.finalize(cluster, _close_all, sockets).atexit = False
    return cluster


def _close_all(sockets: dict[int, socket]) -> None:
    for each in sockets.values():
        each.close()


def _nodes(url: str) -> list[ClusterNode]:
    parse: Callable[[str], dict[str, Any]] = parse_url
    node: Callable[[str, int], ClusterNode] = ClusterNode
    places = [parse(each) for each in node_urls(url)]
    if any(place.get("db") for place in places):
        raise ConfigurationError("redis_url: a Redis Cluster has no database but 0")
    return [node(place.get("host", "localhost"), place.get("port", 6379)) for place in places]


def node_urls(url: str) -> list[str]:
    """Return a plain URL for each of the nodes that a cluster's URL names."""
    scheme, _, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    hosts, *query = place.split("?", 1)
    hosts, *path = hosts.split("/", 1)
    end = "".join([*(f"/{part}" for part in path), *(f"?{part}" for part in query)])
    return [f"{scheme.removesuffix('+cluster')}://{credentials}{at}{host.strip()}{end}" for host in hosts.split(",")]


def ask(redis: RedisClient, command: Command) -> Any:
    """Send one command and return the answer as Redis gave it; raises the error that it may be.

    It does what redis-py's client does, which takes three times as long around it as the round trip itself.
    """
    if not isinstance(redis, Redis):
        anywhere: Callable[..., Any] = redis.execute_command
        return anywhere(*command)
    connection: Any = redis.connection_pool.get_connection()

    def round_trip() -> Any:
        connection.send_command(*command)
        return connection.read_response()

    def broken(_: Exception) -> None:
        connection.disconnect()

    try:
        return connection.retry.call_with_retry(round_trip, broken)
    finally:
        redis.connection_pool.release(connection)


def together(redis: RedisClient, commands: Sequence[tuple[str, Command]]) -> list[Any]:
    """Send commands, each with the key it is about, in one round trip (to each node of a cluster).

    Returns the answers in order; the answer to a command that Redis refuses is the error. A node that
    has lost a key, or its connection, costs one round trip more for each of its commands. A pipeline of
    redis-py's own would hold connections to several nodes at once, and crowds of threads could then
    wait for each other's.
    """
    if isinstance(redis, Redis):
        return _in_one_go(redis, [command for _, command in commands])
    node_of: Callable[[str], ClusterNode] = redis.get_node_from_key
    shares: dict[ClusterNode, list[int]] = defaultdict(list)
    for index, (key, _) in enumerate(commands):
        shares[node_of(key)].append(index)
    answers: list[Any] = [None] * len(commands)
    for node, indexes in shares.items():
        try:
            share = _in_one_go(redis.get_redis_connection(node), [commands[index][1] for index in indexes])
        except exceptions.ConnectionError as error:
            share = [error] * len(indexes)
        for index, answer in zip(indexes, share, strict=True):
            answers[index] = _asked_again(redis, commands[index][1]) if isinstance(answer, _MOVED_ON) else answer
    return answers


_MOVED_ON = (
    exceptions.AskError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
    exceptions.ConnectionError,
)
"""What a node says of a key that is elsewhere by now, or soon."""


def _in_one_go(redis: Redis, commands: Sequence[Command]) -> list[Any]:
    with redis.pipeline(transaction=False) as pipeline:
        add: Callable[..., Any] = pipeline.execute_command
        for command in commands:
            add(*command)
        return pipeline.execute(raise_on_error=False)


def _asked_again(redis: RedisCluster, command: Command) -> Any:
    ask: Callable[..., Any] = redis.execute_command
    try:
        return ask(*command)
    except exceptions.ResponseError as error:
        return error


def subscription(redis: RedisClient) -> PubSub:
    """Return a subscription to nothing yet; in a cluster at any of its nodes, each of which hears all channels."""
    if isinstance(redis, Redis):
        return PubSub(redis.connection_pool)
    redis.nodes_manager.initialize()  # a node that was there before may be gone
    any_node: Callable[[], ClusterNode] = redis.get_random_node
    return PubSub(redis.get_redis_connection(any_node()).connection_pool)


def close_idle(redis: RedisClient) -> None:
    """Close the connections that nobody uses now; the client can be used again.

    Those that other threads are using go back to their pool: redis-py's own ``close`` would cut them off in the
    middle of a command.
    """
    if isinstance(redis, Redis):
        _close_idle_of(redis.connection_pool)
        return
    nodes: Callable[[], list[ClusterNode]] = redis.get_nodes
    for client in [node.redis_connection for node in nodes()]:
        if client is not None:
            _close_idle_of(client.connection_pool)


def _close_idle_of(pool: Any) -> None:
    idle = []
    with suppress(Empty):
        while True:
            idle.append(pool.pool.get_nowait())  # nobody else can take it now
    for connection in reversed(idle):
        if connection is not None:
            connection.disconnect()
        pool.pool.put_nowait(connection)


@contextmanager
def reaching(settings: Settings) -> Iterator[None]:
    """Turn redis-py's errors into ``ServiceUnavailableError``, with the URL but not its password."""
    try:
        yield
    except (exceptions.RedisError, exceptions.RedisClusterException, OSError) as error:
        url = masked(settings.redis_url.get_secret_value())
        raise ServiceUnavailableError(f"Redis at {url} {_complaint(_root_of(error), settings)}", url=url) from error


def _root_of(error: BaseException) -> BaseException:
    """Return what was behind an error that redis-py's cluster client wraps."""
    while isinstance(error, exceptions.RedisClusterException) and (cause := error.__cause__ or error.__context__):
        error = cause
    return error


def _complaint(error: BaseException, settings: Settings) -> str:
    for kinds, complaint in _COMPLAINTS:
        if isinstance(error, kinds):
            return complaint.format(kind=type(error).__name__, tried=_tried(error, settings))
    for kind, code, hint in _HINTS:
        if isinstance(error, kind) or code in str(error):
            return f"refused a command: {error} ({code}: {hint})"
    return f"refused a command: {error}"


def _tried(error: BaseException, settings: Settings) -> str:
    """Say what the system said of it, and how long and how often it was tried."""
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return f": no answer within {settings.redis_timeout_seconds:g} s (redis_timeout_seconds)"
    source = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    said = f"{source.strerror}, " if isinstance(source, OSError) and source.strerror else ""
    return f": {said}tried {RETRIES + 1} times with up to {settings.redis_timeout_seconds:g} s each"


_Kinds = type[Exception] | tuple[type[Exception], ...]

_COMPLAINTS: Sequence[tuple[_Kinds, str]] = (
    (exceptions.AuthenticationError, "refused the user or password; check redis_url"),
    (exceptions.BusyLoadingError, "is still loading its data; try again shortly"),
    (
        (exceptions.ConnectionError, exceptions.TimeoutError, OSError),
        "cannot be reached ({kind}){tried}; start it, or set ATTUNE_REDIS_URL",
    ),
    (
        (exceptions.RedisClusterException, exceptions.ClusterError),
        "is a cluster in which some keys have no node now ({kind}); try again shortly, or look at CLUSTER INFO",
    ),
    (exceptions.AskError, "is a node of a cluster; redis_url should begin with redis+cluster://"),
)
"""The first that fits."""

_HINTS: Sequence[tuple[_Kinds, str, str]] = (
    (exceptions.OutOfMemoryError, "OOM", "its memory is full; raise maxmemory"),
    (exceptions.ReadOnlyError, "READONLY", "it is a replica; redis_url should name the primary"),
    ((), "MISCONF", "it cannot write to its disk"),
)
"""Redis 6 wraps what happens inside a script in an error of no class, so its code is looked for."""
