"""How does Celery keep the summaries of jobs? In Redis, over a few connections; where it has none, by the record."""

from __future__ import annotations

import weakref
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from redis import BlockingConnectionPool

from attune_worker.errors import AttuneError
from attune_worker.store.records import Records
from attune_worker.worker.summary import Summary


class SharedRedisBackend(RedisBackend):  # type: ignore[misc]  # celery has no type information
    """Celery's Redis result backend, with two differences.

    A thread waits when all connections are in use. The stock pool raises ``MaxConnectionsError`` instead, and the
    result of the task is lost.

    Of a job that has ended and of which Celery knows nothing, for instance because its worker died before it could
    say so, ``AsyncResult`` reads the summary by the job's record, at one round trip more. ``AsyncResult.get`` looks
    once, when it begins; if the job ends so while it waits, it is told nothing, and its timeout passes. A group of
    results is read as Celery has them. ``AsyncResult.forget`` forgets what Celery has, not the record.
    """

    max_connections = 32

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("connection_pool", BlockingConnectionPool)
        super().__init__(*args, **kwargs)

    def get(self, key: Any) -> Any:
        """Read a key, again if the connection breaks, as Celery's own ``set`` does."""
        return self.ensure(super().get, (key,))

    def get_task_meta(self, task_id: Any, cache: bool = True) -> Any:
        """Return what is known of a task; what Celery does before it stores a result asks not here."""
        meta = super().get_task_meta(task_id, cache=cache)
        if meta["status"] == states.PENDING:  # so it says of tasks that it does not know
            with suppress(AttuneError):  # no record, or none that can be read now: that is what Celery knows, too
                return self._by_record(task_id) or meta
        return meta

    def _by_record(self, task_id: str) -> dict[str, Any] | None:
        """Return what a worker would have stored of a job that has ended; None for any other."""
        [record] = self._records.read([task_id])
        if not record.status.ended:
            return None
        ended = None if record.ended_ms is None else datetime.fromtimestamp(record.ended_ms / 1000, UTC).isoformat()
        return {
            "status": states.SUCCESS,
            "result": Summary(record.to_result()).to_json(),
            "traceback": None,
            "children": [],
            "date_done": ended,
            "task_id": task_id,
        }

    @cached_property
    def _records(self) -> Records:
        return Records(self.app.attune_settings)

    def _create_client(self, **params: Any) -> Any:
        """Make a client whose connections are closed when it is dropped with its app, and not some time later."""
        client = super()._create_client(**params)
        weakref.finalize(client, client.connection_pool.disconnect).atexit = False
        return client
