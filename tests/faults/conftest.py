"""What do tests break? A Redis of their own, and how is seen afterwards that nothing was lost or paid twice?"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path

import pytest
from redis import Redis

from attune_worker.client import Client, JobHandle
from attune_worker.jobs import JobStatus
from attune_worker.ledger import Ledger, latest
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from attune_worker.store.embedded import EmbeddedRedis
from tests.conftest import Until

RESULT_SECONDS = 60.0
"""How long a job may take whose broker or Redis was away; none should come near it."""


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """Run a Redis that a test may stop; what it has answered is on its disk."""
    with EmbeddedRedis(tmp_path / "redis", configuration="appendfsync always\n") as server:
        yield server


@pytest.fixture
def redis(own_server: EmbeddedRedis) -> Iterator[Redis]:
    """Connect to the Redis that a test may stop."""
    with Redis.from_url(own_server.url) as client:
        yield client


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    """Return a client of this test's fleet."""
    with closing(Client(settings)) as client:
        yield client


def submit(client: Client, count: int) -> list[JobHandle]:
    """Submit jobs that differ."""
    return client.submit_many([{"task_type": "summarize", "prompt": f"text {index}"} for index in range(count)])


def assert_each_ran_once(client: Client, handles: Sequence[JobHandle], simulator: Simulator, until: Until) -> None:
    """Every job has succeeded, was called for once, and is in the ledger at what the provider has billed."""
    results = [handle.result(RESULT_SECONDS) for handle in handles]
    assert [result.status for result in results] == [JobStatus.SUCCEEDED] * len(handles)
    invoice = simulator.invoice()
    assert invoice["count"] == len(handles)
    billed = Decimal(invoice["total_usd"])
    assert sum(Decimal(result.cost_usd or 0) for result in results) == billed
    until(lambda: booked(client) == (len(handles), billed))


def booked(client: Client) -> tuple[int, Decimal]:
    """Return how many calls the ledger has, and what they cost together."""
    with closing(Ledger(client.settings)) as ledger:
        records = latest(ledger.records())
    return len(records), sum((record.cost_usd or Decimal(0) for record in records), Decimal(0))


@contextmanager
def paused(process_id: int) -> Iterator[None]:
    """Have a process stand still."""
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


def process_id(of: LocalWorker | EmbeddedRedis) -> int:
    """Return the id of the process of a worker or a Redis that runs."""
    process = of.process if isinstance(of, LocalWorker) else of._process
    assert process is not None
    return process.pid


def kill(worker: LocalWorker) -> None:
    """End a worker without a word."""
    assert worker.process is not None
    worker.process.kill()
    worker.process.wait()
