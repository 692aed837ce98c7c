"""What happens in a worker's processes when it starts and when it ends? Its runner, its sweeper, and its shutdown."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from functools import partial
from typing import Any

from celery import current_app
from celery.apps.worker import install_worker_term_handler
from celery.signals import (
    celeryd_after_setup,
    worker_init,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)

from attune_worker.store.server import eviction_warning
from attune_worker.worker.memory import keep_buffers_apart
from attune_worker.worker.pool import pool_stopping, wake_loop
from attune_worker.worker.readiness import complaints
from attune_worker.worker.runner import Runner
from attune_worker.worker.shutdown import Shutdown
from attune_worker.worker.sweeper import Sweeper

logger = logging.getLogger(__name__)

CHILD_SIGNAL = signal.SIGUSR2
"""Tells a process of a pool to begin nothing more, and the second time to hand back its job."""

REPEAT_SECONDS = 1.0
"""How often a process of a pool is told to hand back its job: of two signals at a time it would notice one."""

CHATTY = ("httpcore", "kombu", "redis")
"""They write several lines for each message and call at level DEBUG; the decisions there would be lost among them."""

_runners: dict[int, Runner] = {}
_shutdowns: dict[int, Shutdown] = {}
"""By process id: a pool of processes inherits its parent's."""

_sweepers: dict[str, Sweeper] = {}
"""By the worker's name; in a pool of processes, the parent has it."""

_lock = threading.Lock()


def runner_of(app: Any) -> Runner:
    """Return the runner of this process, made when it is first asked for: after a fork, not before."""
    with _lock:
        process = os.getpid()
        if process not in _runners:
            _runners[process] = Runner(app.attune_settings)
        return _runners[process]


@worker_init.connect  # type: ignore[untyped-decorator]
def prepare(**_: Any) -> None:
    """Set the process up before it has threads, and before a pool of processes inherits from it."""
    keep_buffers_apart()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.INFO)


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def complain(instance: Any, **_: Any) -> None:
    """Say what is missing, as soon as there is a log to say it in."""
    if settings := getattr(instance.app, "attune_settings", None):
        for complaint in complaints(settings):
            logger.warning("%s", complaint)


@worker_ready.connect  # type: ignore[untyped-decorator]
def begin(sender: Any, **_: Any) -> None:
    """Have this worker look after the fleet's jobs, from before its first job on, and be ready to end well."""
    if not hasattr(sender.app, "attune_settings"):
        return
    if warning := eviction_warning(sender.app.attune_settings):
        logger.warning("%s", warning)
    _sweepers[sender.hostname] = Sweeper(sender.app)
    _sweepers[sender.hostname].start()
    grace_seconds = sender.app.attune_settings.recovery.shutdown_grace_seconds
    if "processes" in sender.pool.info:
        _prepare_shutdown(
            Shutdown(grace_seconds, partial(_tell_children, sender.pool), partial(_press_children, sender.pool))
        )
    else:
        _prepare_shutdown(_own_shutdown(sender.app, grace_seconds))
        runner_of(sender.app).begin()
    for name in ("SIGTERM", "SIGINT", "SIGQUIT"):
        # Celery would answer the harder signals by dropping what runs: a job that is handed back is as quick.
        install_worker_term_handler(sender.controller, sig=name, how="Warm", callback=None, exitcode=os.EX_OK)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def begin_child(**_: Any) -> None:
    """Listen to the parent: signals to the worker reach it alone."""
    if hasattr(current_app, "attune_settings"):
        shutdown = _own_shutdown(current_app, None)
        _prepare_shutdown(shutdown)
        runner_of(current_app).begin()
        signal.signal(CHILD_SIGNAL, lambda *_: shutdown.request())


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def shut_down(sig: str, **_: Any) -> None:
    """End in good order; called within a signal handler, which may have interrupted anything."""
    if shutdown := _shutdowns.get(os.getpid()):
        shutdown.request(at_once=sig == "SIGQUIT")


@pool_stopping.connect  # type: ignore[untyped-decorator]
def stop_jobs(**_: Any) -> None:
    """Do the same when the worker ends for another reason than a signal."""
    shutdown = _shutdowns.get(os.getpid())
    if shutdown is not None and not shutdown.requested:
        shutdown.request()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def stop_sweeper(sender: Any, **_: Any) -> None:
    """Leave the fleet's jobs to the other workers."""
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


def _prepare_shutdown(shutdown: Shutdown) -> None:
    _shutdowns[os.getpid()] = shutdown
    shutdown.start()


def _own_shutdown(app: Any, grace_seconds: float | None) -> Shutdown:
    """Return the shutdown of a process that runs jobs itself."""

    def wind_down() -> None:
        runner_of(app).wind_down()
        wake_loop()  # it would take messages for up to a second more

    return Shutdown(grace_seconds, wind_down, lambda: runner_of(app).hand_back())


def _tell_children(pool: Any) -> list[int]:
    """Signal the processes of a pool, and return those that there are."""
    return [process for process in pool.info["processes"] if _signal_sent(process)]


def _press_children(pool: Any) -> None:
    """Signal the processes of a pool until they are gone."""
    left = _tell_children(pool)
    while left:
        time.sleep(REPEAT_SECONDS)
        left = [process for process in left if _signal_sent(process)]


def _signal_sent(process: int) -> bool:
    try:
        os.kill(process, CHILD_SIGNAL)
    except ProcessLookupError:  # it has ended
        return False
    return True
