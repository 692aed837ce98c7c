"""Who is compared? attune-worker and a bare Celery task, each on threads and on prefork."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bare_task
from celery import Celery

from attune_worker import Client, Settings

PROMPT = "word " * 100
PROVIDER_KEY = "a-key-of-the-benchmark"
SOURCES = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

Kind = Literal["bare", "attune"]
Pool = Literal["threads", "prefork"]


@dataclass(frozen=True, slots=True)
class Mode:
    """A kind of worker on a pool."""

    kind: Kind
    pool: Pool

    @property
    def name(self) -> str:
        """What it is called in options and in JSON."""
        return f"{self.kind}-{self.pool}"


MODES = (Mode("bare", "threads"), Mode("attune", "threads"), Mode("attune", "prefork"), Mode("bare", "prefork"))


@dataclass(frozen=True, slots=True)
class Services:
    """Where Redis (broker, and another database for results) and the provider are."""

    broker_url: str
    result_backend: str
    provider_url: str

    def environ(self) -> dict[str, str]:
        """Return the environment of any worker: the caller's, without the caller's configuration."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ATTUNE_", "CELERY_"))}
        return kept | {
            "PYTHONPATH": os.pathsep.join(SOURCES),
            "CELERY_BROKER_URL": self.broker_url,
            "CELERY_RESULT_BACKEND": self.result_backend,
            "PROVIDER_URL": self.provider_url,
            "PROVIDER_KEY": PROVIDER_KEY,
        }

    def attune_environ(self) -> dict[str, str]:
        """Return the settings of attune-worker: its defaults, with these addresses."""
        return {
            "ATTUNE_REDIS_URL": self.broker_url,
            "ATTUNE_RESULT_BACKEND": self.result_backend,
            "ATTUNE_PROVIDERS__ANTHROPIC__BASE_URL": self.provider_url,
            "ATTUNE_PROVIDERS__ANTHROPIC__API_KEY": PROVIDER_KEY,
        }


def worker_command(mode: Mode, concurrency: int, services: Services) -> tuple[Sequence[str], Mapping[str, str]]:
    """Return how the worker is started: Python's arguments, and the environment. Both log at level info."""
    options = [f"--concurrency={concurrency}", f"--pool={mode.pool}", "--loglevel=info"]
    environ = services.environ()
    if mode.kind == "bare":
        return ["-m", "celery", "-A", "bare_task", "worker", *options], environ
    del environ["CELERY_BROKER_URL"], environ["CELERY_RESULT_BACKEND"]
    return ["-m", "attune_worker", "worker", *options], environ | services.attune_environ()


def enqueue(mode: Mode, jobs: int, services: Services) -> None:
    """Put the jobs in line, as a web backend would that does not wait for results."""
    if mode.kind == "bare":
        # Without a result backend on this side nothing is subscribed to; the worker stores results all the same.
        with Celery(broker=services.broker_url, set_as_current=False) as sender, sender.producer_pool.acquire() as sent:
            for _ in range(jobs):
                sender.send_task(bare_task.NAME, (PROMPT,), producer=sent)
        return
    with Client(Settings.load(environ=services.attune_environ())) as client:
        client.submit_many([{"task_type": "summarize", "prompt": PROMPT}] * jobs)
