"""How does a worker send events to Flower and others while the broker is away? It does not wait for it."""

from __future__ import annotations

from typing import Any

from celery.events.dispatcher import EventDispatcher


class Dispatcher(EventDispatcher):  # type: ignore[misc]  # celery has no type information
    """Celery's dispatcher, which keeps what cannot be sent at once for later.

    Celery tries a heartbeat again and again within the event loop, which would hear of no signal meanwhile: a worker
    that is told to end would not, for as long as the broker is silent.
    """

    def send(self, *args: Any, **options: Any) -> Any:
        """Send an event once; where that fails it is kept."""
        return super().send(*args, **{**options, "retry": False})
