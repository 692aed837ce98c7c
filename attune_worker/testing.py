"""How does your own test run jobs without a provider? On real Redis and real workers, against the simulator.

For instance::

    def test_summary():
        with running_fleet() as fleet:
            job = fleet.client.submit("summarize", "A long text.")
            assert job.result(timeout=30).succeeded
            assert fleet.simulator.invoice()["count"] == 1
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from attune_worker.client import Client
from attune_worker.local import LocalFleet, simulated_providers
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis

__all__ = ["RunningFleet", "running_fleet"]


@dataclass(frozen=True, slots=True)
class RunningFleet:
    """Everything that runs: ``environ`` is how further processes reach it."""

    client: Client
    simulator: Simulator
    workers: LocalFleet
    environ: dict[str, str]


@contextmanager
def running_fleet(workers: int = 1, profile: Profile | None = None, concurrency: int = 20) -> Iterator[RunningFleet]:
    """Start a private Redis, the simulator and some workers, yield them once they take jobs, and stop them all."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attune-test-")))
        simulator = stack.enter_context(Simulator(profile))
        redis_server = stack.enter_context(EmbeddedRedis(folder / "redis"))
        environ = {name: value for name, value in os.environ.items() if not name.startswith("ATTUNE_")}
        environ |= {"ATTUNE_REDIS_URL": redis_server.url, **simulated_providers(simulator.url, simulator.openai_url)}
        client = stack.enter_context(Client(Settings.load(environ=environ)))
        fleet = stack.enter_context(LocalFleet(workers, environ, folder, concurrency=concurrency))
        fleet.wait_until_ready()
        yield RunningFleet(client, simulator, fleet, environ)
