"""``attune-worker worker``: a worker process with the settings that suit jobs which wait on the network."""

from __future__ import annotations

import os
import resource
import socket

import click

from attune_worker.app import THREAD_POOL
from attune_worker.settings import get_settings

FILES_PER_THREAD = 4
"""A connection to a provider for each thread, some for Redis, and room for pools that grow."""


@click.command()
@click.option(
    "-c", "--concurrency", type=click.IntRange(1, 10_000), help="Jobs at the same time.  [default: from settings]"
)
@click.option("--pool", type=click.Choice(["threads", "prefork", "solo"]), default="threads", show_default=True)
@click.option("-n", "--name", help="Name of this worker, unique on its host.  [default: attune-<process id>]")
@click.option(
    "-l", "--loglevel", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.option(
    "--liveness-file",
    type=click.Path(dir_okay=False),
    help="A file to touch as long as this worker takes messages; see attune-worker healthy.",
)
def worker(concurrency: int | None, pool: str, name: str | None, loglevel: str, liveness_file: str | None) -> None:
    """Run jobs until stopped.

    SIGTERM or Ctrl-C: take no more, finish what runs, hand back to other workers what takes longer than
    recovery.shutdown_grace_seconds, then end. A second time, or SIGQUIT: hand back everything at once.

    Example: attune-worker worker --concurrency 1000
    """
    settings = get_settings()
    concurrency = concurrency or settings.concurrency
    _raise_file_limit(concurrency)
    # Each worker copies the list of revoked tasks; cancellation lives in the job records instead.
    os.environ.setdefault("CELERY_WORKER_REVOKES_MAX", "2000")
    from attune_worker.celery import app  # Celery reads the variable above when it is imported

    # Celery takes the configured pool for the one asked for when that is "prefork", so it is configured here.
    app.conf.worker_pool = THREAD_POOL if pool == "threads" else pool
    app.worker_main(
        [
            "worker",
            f"--concurrency={concurrency}",
            f"--hostname={name or f'attune-{os.getpid()}'}@{socket.gethostname()}",
            f"--loglevel={loglevel}",
            "--without-gossip",
            "--without-mingle",
            *([f"--liveness-file={liveness_file}"] if liveness_file else []),
        ]
    )


def _raise_file_limit(concurrency: int) -> None:
    """Let the process open as many connections as its threads may need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + concurrency * FILES_PER_THREAD
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
