"""How do hundreds of threads store their summaries in Redis? Over a few connections, taking turns."""

from __future__ import annotations

import weakref
from typing import Any

from celery.backends.redis import RedisBackend
from redis import BlockingConnectionPool


class SharedRedisBackend(RedisBackend):  # type: ignore[misc]  # celery has no type information
    """Celery's Redis result backend with a pool that makes a thread wait when all connections are in use.

    The stock pool raises ``MaxConnectionsError`` instead, and the result of the task is lost.
    """

    max_connections = 32

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("connection_pool", BlockingConnectionPool)
        super().__init__(*args, **kwargs)

    def get(self, key: Any) -> Any:
        """Read a key, again if the connection breaks, as Celery's own ``set`` does."""
        return self.ensure(super().get, (key,))

    def _create_client(self, **params: Any) -> Any:
        """Make a client whose connections are closed when it is dropped with its app, and not some time later."""
        client = super()._create_client(**params)
        weakref.finalize(client, client.connection_pool.disconnect).atexit = False
        return client
