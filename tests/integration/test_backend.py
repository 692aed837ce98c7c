"""Does Celery's result backend, as our workers and clients use it, leave nothing open?"""

import gc
from typing import Any

from attune_worker.app import make_app
from attune_worker.settings import Settings
from attune_worker.worker.backend import SharedRedisBackend


def test_backend_that_is_dropped_leaves_no_connection_open(settings: Settings) -> None:
    """Celery closes none of them: the collector would, some time, with a warning."""
    backend: Any = SharedRedisBackend(app=make_app(settings), url=settings.backend)
    backend.client.ping()
    [connection] = backend.client.connection_pool._connections
    assert connection.is_connected
    backend.itself = backend
    del backend
    gc.collect()
    assert not connection.is_connected
