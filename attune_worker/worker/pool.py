"""How does a worker whose threads were all busy notice that one is free? The thread tells the event loop.

Celery's loop looks for free slots only when something else wakes it, which in a quiet process is about
once a second. With prefetching disabled a full worker would stand still for that long after each wave
of answers.
"""

from __future__ import annotations

from typing import Any

from celery.concurrency.thread import TaskPool
from celery.worker import state
from kombu.asynchronous import get_event_loop


class ThreadPool(TaskPool):  # type: ignore[misc]  # celery has no type information
    """Celery's thread pool, which wakes the worker's loop when a full pool has room again."""

    def on_apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run a task in a thread."""
        applied = super().on_apply(*args, **kwargs)
        applied.f.add_done_callback(self._slot_is_free)
        return applied

    def _slot_is_free(self, _: object) -> None:
        if len(state.reserved_requests) + 1 >= self.limit and (loop := get_event_loop()) is not None:
            loop.call_soon(_look_again)  # type: ignore[no-untyped-call]


def _look_again() -> None:
    """Do nothing: the loop asks for messages before it sleeps again."""
