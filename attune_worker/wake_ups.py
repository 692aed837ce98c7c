"""How does a job's wake-up get to a free worker? As a Celery message with the job's id, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError, OperationalError

from attune_worker.app import RUN_JOB
from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import masked

BATCH = 500
"""Jobs that are written, and wake-ups that are sent, in one round trip."""


def send_wake_ups(app: Celery, jobs: Sequence[tuple[str, int]]) -> None:
    """Send the wake-up of each ``(job id, priority)``.

    Raises ``ServiceUnavailableError`` when the broker cannot be reached; some may have been sent then.
    """
    if not jobs:
        return
    amqp = app.amqp
    try:
        with app.producer_or_acquire() as producer, producer.batch(max_size=BATCH):
            for sent, (job_id, priority) in enumerate(jobs):
                message = amqp.create_task_message(
                    job_id, RUN_JOB, (job_id,), {}, argsrepr=f"('{job_id}',)", kwargsrepr="{}"
                )
                # The queue is declared once a batch: declaring costs more than sending.
                declare: list[Any] | None = [] if sent else None
                amqp.send_task_message(producer, RUN_JOB, message, priority=priority, declare=declare)
    except (OperationalError, KombuError, OSError) as error:
        url = masked(app.attune_settings.broker)
        raise ServiceUnavailableError(
            f"the broker at {url} cannot be reached ({type(error).__name__}); jobs that were accepted wait in Redis",
            url=url,
        ) from error
