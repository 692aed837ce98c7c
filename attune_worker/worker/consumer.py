"""How does a worker take messages from the broker, and how can a supervisor see that it still does?

A worker that answers a ping, or holds its connection, may yet take no messages. So what counts is progress: the
event loop turns, and Redis has answered the last question for messages, unless all threads are busy. (From RabbitMQ
messages come unasked; there the loop itself gives up a connection without heartbeats.)
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.consumer.tasks import Tasks

from attune_worker.app import AMQP_PREFETCH, is_amqp
from attune_worker.worker.intake import Intake

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the loop shows that it turns."""

OVERDUE_SECONDS = 3.0
"""When the answer to a question for messages is late; Redis gives it after a second at most."""

DELAYED_DELIVERY = "celery.worker.consumer.delayed_delivery:DelayedDelivery"


class Consumer(Intake):
    """Celery's consumer, fitted to messages that are nothing but wake-ups."""

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc]
        """Celery's steps, but for the 28 queues that would delay messages in RabbitMQ: jobs wait in Redis."""

        default_steps = tuple(step for step in CeleryConsumer.Blueprint.default_steps if step != DELAYED_DELIVERY)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Celery's own way of not prefetching is for Redis only. A message is acknowledged when its job starts, so
        # that as many as there are threads, which is the default, would wait here while other workers are idle.
        if is_amqp(self.app.attune_settings):
            self.initial_prefetch_count = AMQP_PREFETCH


class Liveness(bootsteps.StartStopStep):  # type: ignore[misc]
    """Touches ``liveness_file`` as long as the worker takes messages, or has no free thread for one."""

    requires = (Tasks,)

    def __init__(self, consumer: Any, liveness_file: str | None = None, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.enabled = liveness_file is not None
        self._file = Path(liveness_file or "")
        self._timer: Any = None
        self._complained = False

    def start(self, consumer: Any) -> None:
        """Look from now on, in the event loop, until the connection is lost."""
        self._timer = consumer.timer.call_repeatedly(LOOK_SECONDS, self._look, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Leave it to the next connection."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, consumer: Any) -> None:
        if not takes_messages(consumer):
            return
        try:
            self._file.touch()
        except OSError as error:
            if not self._complained:
                logger.warning("the liveness file cannot be written, so this worker looks dead: %s", error)
            self._complained = True
        else:
            self._complained = False


def takes_messages(consumer: Any) -> bool:
    """Whether the worker takes messages, or is full; for the event loop's own thread."""
    if consumer.task_consumer is None:
        return False
    channel = consumer.task_consumer.channel
    if is_amqp(consumer.app.attune_settings) or not channel.qos.can_consume():
        return True
    asked = channel._brpop_sent_at  # noqa: SLF001  # Kombu tells nobody; a test sees to it that it stays right
    return asked is not None and time.monotonic() - asked < OVERDUE_SECONDS
