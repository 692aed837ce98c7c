"""How does a job's wake-up get to a free worker? As a Celery message with the job's id, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from amqp.exceptions import AMQPError
from celery import Celery
from kombu.exceptions import ChannelError, KombuError, OperationalError
from redis.exceptions import RedisError, ResponseError

from attune_worker.app import RUN_JOB, broker_priority, is_amqp
from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import masked

BATCH = 500
"""Jobs that are written, and wake-ups that are sent, in one round trip."""

_SOON = {"interval_start": 0, "interval_step": 0.2, "interval_max": 0.5}

NOT_FOUND = 404
"""What AMQP says of a queue that does not exist (yet)."""


def send_wake_ups(app: Celery, jobs: Sequence[tuple[str, int]]) -> None:
    """Send the wake-up of each ``(job id, priority)``.

    Raises ``ServiceUnavailableError`` when the broker cannot be reached; some may have been sent then.
    """
    if not jobs:
        return
    amqp = app.amqp
    with _producer(app) as producer, producer.batch(max_size=BATCH):
        for sent, (job_id, priority) in enumerate(jobs):
            message = amqp.create_task_message(
                job_id, RUN_JOB, (job_id,), {}, argsrepr=f"('{job_id}',)", kwargsrepr="{}"
            )
            # The queue is declared once a batch: declaring costs more than sending.
            declare: list[Any] | None = [] if sent else None
            urgency = broker_priority(app.attune_settings, priority)
            amqp.send_task_message(producer, RUN_JOB, message, priority=urgency, declare=declare)


def messages_waiting(app: Celery) -> int:
    """Return how many messages stand in the queue: wake-ups, and jobs that were sent as tasks.

    Raises ``ServiceUnavailableError`` when the broker cannot be reached.
    """
    settings = app.attune_settings
    passive = is_amqp(settings)  # Kombu looks for a queue in Redis without its prefix; there, to declare is to count
    with _producer(app) as producer:

        def look() -> int:
            try:
                declared = producer.channel.queue_declare(queue=settings.queue, passive=passive)
            except ChannelError as error:
                if int(error.reply_code) != NOT_FOUND:
                    raise
                return 0
            count: int = declared.message_count
            return count

        look_twice = producer.connection.ensure(producer, look, max_retries=1, **_SOON)
        found: int = look_twice()
        return found


@contextmanager
def _producer(app: Celery) -> Iterator[Any]:
    """Yield a producer; what goes wrong with the broker is a ``ServiceUnavailableError``."""
    try:
        with app.producer_or_acquire() as producer:
            yield producer
    except (OperationalError, KombuError, AMQPError, RedisError, OSError) as error:
        url = masked(app.attune_settings.broker)
        root = error.__cause__ or error  # Kombu wraps what made it give up
        refused = isinstance(root, (ChannelError, ResponseError))
        seconds = app.conf.broker_connection_timeout
        away = (
            f"cannot be reached ({type(root).__name__}): tried again, with up to {seconds:g} s each; start it, or set "
        )
        complaint = f"refused a command: {root}" if refused else f"{away}ATTUNE_BROKER_URL"
        raise ServiceUnavailableError(
            f"the broker at {url} {complaint}; jobs that were accepted wait in Redis", url=url
        ) from error
