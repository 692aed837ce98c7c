"""Which Celery tasks are there? The only place that knows Celery's task API."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from celery import Task, shared_task
from celery.exceptions import Ignore
from celery.signals import task_revoked
from kombu.exceptions import KombuError, OperationalError

from attune_worker.app import RUN_JOB, SUBMIT_JOB
from attune_worker.errors import StoppedError
from attune_worker.jobs import JobResult
from attune_worker.worker.lifecycle import runner_of
from attune_worker.worker.request import HIDDEN
from attune_worker.worker.runner import Runner
from attune_worker.worker.summary import Summary

logger = logging.getLogger(__name__)


class QuietTask(Task):  # type: ignore[misc]  # celery has no type information
    """A task whose arguments are shown to nobody, neither by the sender nor by the worker."""

    abstract = True
    Request = "attune_worker.worker.request:QuietRequest"

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send the task, with its arguments left out of the message's headers and of the ``task-sent`` event."""
        options.setdefault("argsrepr", HIDDEN)
        options.setdefault("kwargsrepr", HIDDEN)
        return super().apply_async(args, kwargs, **options)

    @property
    def runner(self) -> Runner:
        """This process's runner."""
        return runner_of(self.app)

    def hand_back(self) -> NoReturn:
        """Send this message again as it is, for another worker: this one begins nothing more."""
        try:
            self.signature_from_request(self.request).apply_async()
        except (OperationalError, KombuError, OSError) as error:
            # An accepted job is woken again by the other workers; what would have followed it on a canvas is not.
            logger.warning("the message of %s could not be handed back (%s)", self.request.id, type(error).__name__)
        raise Ignore

    def store_later(self, result: JobResult) -> None:
        """Do what Celery does with a return value, for a job whose end was written after its task was over."""
        self.backend.mark_as_done(result.job_id, Summary(result), store_result=not self.ignore_result)


@shared_task(bind=True, base=QuietTask, name=RUN_JOB)  # type: ignore[untyped-decorator]
def run_job(task: QuietTask, job_id: str) -> Summary:
    """Run an accepted job: the wake-up that ``Client`` sends."""
    try:
        result = task.runner.run(job_id, later=task.store_later)
    except StoppedError:
        task.hand_back()
    if not result.status.ended:  # it runs elsewhere, or waits; Celery would keep that as the result for good
        raise Ignore
    return Summary(result)


@shared_task(bind=True, base=QuietTask, name=SUBMIT_JOB)  # type: ignore[untyped-decorator]
def submit_job(task: QuietTask, job: dict[str, Any]) -> Summary:
    """Accept a job given as JSON and run it here: for canvas, and for Celery clients in other languages.

    The job's id is the task's id, unless the job has an idempotency key.
    """
    try:
        return Summary(task.runner.submit(job, task.request.id))
    except StoppedError:
        task.hand_back()


@task_revoked.connect  # type: ignore[untyped-decorator]
def cancel_revoked(sender: Any, request: Any, **_: Any) -> None:
    """Cancel a job whose wake-up somebody has revoked, for instance in Flower: it would only be sent again."""
    if sender.name == RUN_JOB:
        runner_of(sender.app).cancel_later(request.id)
