"""Which Celery tasks are there? The only place that knows Celery's task API."""

from __future__ import annotations

import os
import threading
from typing import Any

from celery import Task, shared_task
from celery.exceptions import Ignore
from celery.signals import worker_process_shutdown, worker_ready, worker_shutdown

from attune_worker.app import RUN_JOB, SUBMIT_JOB
from attune_worker.worker.request import HIDDEN
from attune_worker.worker.runner import Runner
from attune_worker.worker.summary import Summary
from attune_worker.worker.sweeper import Sweeper


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
        """This process's runner, made when its first job arrives: after a fork, not before."""
        with _lock:
            process = os.getpid()
            if process not in _runners:
                _runners[process] = Runner(self.app.attune_settings)
            return _runners[process]


_runners: dict[int, Runner] = {}
_lock = threading.Lock()
_sweepers: dict[str, Sweeper] = {}
"""By the worker's name; in a pool of processes, the parent has it."""


@shared_task(bind=True, base=QuietTask, name=RUN_JOB)  # type: ignore[untyped-decorator]
def run_job(task: QuietTask, job_id: str) -> Summary:
    """Run an accepted job: the wake-up that ``Client`` sends."""
    result = task.runner.run(job_id)
    if not result.status.ended:  # it runs elsewhere, or waits; Celery would keep that as the result for good
        raise Ignore
    return Summary(result)


@shared_task(bind=True, base=QuietTask, name=SUBMIT_JOB)  # type: ignore[untyped-decorator]
def submit_job(task: QuietTask, job: dict[str, Any]) -> Summary:
    """Accept a job given as JSON and run it here: for canvas, and for Celery clients in other languages.

    The job's id is the task's id, unless the job has an idempotency key.
    """
    return Summary(task.runner.submit(job, task.request.id))


@worker_ready.connect  # type: ignore[untyped-decorator]
def start_sweeper(sender: Any, **_: Any) -> None:
    """Have this worker look for jobs that are due, from before its first job on."""
    if hasattr(sender.app, "attune_settings"):
        _sweepers[sender.hostname] = Sweeper(sender.app)
        _sweepers[sender.hostname].start()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def stop_sweeper(sender: Any, **_: Any) -> None:
    """Leave that to the other workers."""
    if sweeper := _sweepers.pop(sender.hostname, None):
        sweeper.stop()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def close_runner(**_: Any) -> None:
    """Write down what this process still keeps; its jobs have ended. A pool's process ends without atexit."""
    with _lock:
        runner = _runners.pop(os.getpid(), None)
    if runner is not None:
        runner.close()
