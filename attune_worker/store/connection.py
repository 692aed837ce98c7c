"""How is Redis reached, and what is said when it is not?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis import BlockingConnectionPool, Redis, exceptions
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from attune_worker.errors import ConfigurationError, ServiceUnavailableError
from attune_worker.settings import Settings, masked

MAX_CONNECTIONS = 64
"""Per process. Commands take under a millisecond, so hundreds of threads share a few connections."""

CONNECTION_WAIT_SECONDS = 60.0
"""How long a thread waits for one of them. In a worker short of CPU a crowd of threads can need seconds to take
turns; that says nothing about Redis, whose own timeout begins when a command is sent."""


def connect(settings: Settings, *, max_connections: int = MAX_CONNECTIONS) -> Redis:
    """Return a client for the shared state; nothing is sent until it is used.

    Every command has a timeout. It is sent again a few times when the connection breaks, though not when
    the timeout passes: all that attune-worker sends may safely arrive twice. Raises
    ``ConfigurationError`` for a URL that is none.
    """
    timeout_seconds = settings.redis_timeout_seconds
    try:
        pool = BlockingConnectionPool.from_url(
            settings.redis_url.get_secret_value(),
            max_connections=max_connections,
            timeout=CONNECTION_WAIT_SECONDS,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            socket_keepalive=True,
            health_check_interval=25,
            encoding_errors="surrogatepass",
            retry=Retry(
                ExponentialWithJitterBackoff(base=0.05, cap=0.5), 3, supported_errors=(exceptions.ConnectionError,)
            ),
        )
    except ValueError:  # its words may quote the password
        raise ConfigurationError(
            "redis_url: it should be like redis://:password@host:6379/0, or rediss://…, "
            "with special characters in the password percent-encoded"
        ) from None
    return Redis(connection_pool=pool)


@contextmanager
def reaching(settings: Settings) -> Iterator[None]:
    """Turn redis-py's connection errors into ``ServiceUnavailableError``, with the URL but not its password."""
    url = masked(settings.redis_url.get_secret_value())
    try:
        yield
    except exceptions.AuthenticationError:
        raise ServiceUnavailableError(
            f"Redis at {url} refused the user or password; check redis_url", url=url
        ) from None
    except exceptions.BusyLoadingError:
        raise ServiceUnavailableError(f"Redis at {url} is still loading its data; try again shortly", url=url) from None
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise ServiceUnavailableError(
            f"Redis at {url} cannot be reached ({type(error).__name__}); start it, or set ATTUNE_REDIS_URL", url=url
        ) from error
    except exceptions.RedisError as error:
        raise ServiceUnavailableError(f"Redis at {url} refused a command: {error}", url=url) from error
