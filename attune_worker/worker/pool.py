"""In which threads do jobs run? In Celery's pool, with two things added that a worker without prefetching needs.

A worker whose threads were all busy has to notice that one is free: Celery's loop looks for free slots only when
something else wakes it, which in a quiet process is about once a second, so a full worker would stand still for that
long after each wave of answers. And a worker that ends must not drop the messages that it has taken and not begun:
with early acknowledgement nobody else would get them.
"""

from __future__ import annotations

from typing import Any

from celery.concurrency.thread import TaskPool
from celery.utils.dispatch import Signal
from celery.worker import state
from kombu.asynchronous import get_event_loop

pool_stopping = Signal(name="pool_stopping")
"""Sent when a pool of threads is told to stop, before it waits for what it runs."""


class ThreadPool(TaskPool):  # type: ignore[misc]  # celery has no type information
    """Celery's thread pool, which wakes the worker's loop when there is room again, and drops nothing at its end."""

    def on_apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run a task in a thread."""
        applied = super().on_apply(*args, **kwargs)
        applied.f.add_done_callback(self._slot_is_free)
        return applied

    def on_stop(self) -> None:
        """Wait for all tasks, also for those that have not begun: they know that they are not to begin."""
        pool_stopping.send(sender=self)
        self.executor.shutdown()
        super().on_stop()

    def _slot_is_free(self, _: object) -> None:
        if len(state.reserved_requests) + 1 >= self.limit:
            wake_loop()


def wake_loop() -> None:
    """Have the worker's event loop look at once at what it has to do; from any thread."""
    if (loop := get_event_loop()) is not None:
        loop.call_soon(_look_again)  # type: ignore[no-untyped-call]


def _look_again() -> None:
    """Do nothing: the loop asks for messages before it sleeps again."""
