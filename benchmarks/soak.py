"""Does anything grow? A fleet under a steady load for an hour, its memory and its keys looked at all the time.

    python benchmarks/soak.py                                # an hour at 50 jobs/s
    python benchmarks/soak.py --seconds 300 --rate 20        # shorter

Jobs come at random times (a Poisson process), their records are kept for ``--retention`` seconds, and the provider
fails now and then. Growth counts from ``--settle`` seconds on; a burst of jobs has every thread and its connections
made before. Redis is the ``redis-server`` on the PATH, else the bundled one, whose resident size creeps: it uses libc's
allocator, not jemalloc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from processes import BenchmarkError, ProcessTree, PythonProcess
from redis import Redis
from report import machine, versions
from rich.console import Console
from rich.table import Table

from attune_worker.client import Client
from attune_worker.local import LocalFleet, simulated_providers
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.records import Records

SAMPLE_SECONDS = 10.0
WORKERS = 2
CONCURRENCY = 100
LATENCY_SECONDS = 1.0
MEGABYTE = 2**20
MOST_BEHIND_SECONDS = 1.0
"""After a pause of the machine no more than this is made up for: a crowd takes memory that a steady load does not."""
FLAT = {"MB": 10.0, "keys": 5000.0}
"""What counts as flat: less than that by the hour."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read at one time; memory in MB, ``lag`` is how many jobs were under way."""

    seconds: float
    worker_mb: tuple[float, ...]
    redis_mb: float
    redis_rss_mb: float
    dashboard_mb: float
    keys: int
    submitted: int
    lag: int


@dataclass
class Load:
    """Submits jobs at a steady rate from a thread of its own, and remembers what was refused."""

    client: Client
    rate: float
    submitted: int = 0
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Submit no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        chance = random.Random(7)
        due = time.monotonic()
        while not self._stop.is_set():
            due = max(due, time.monotonic() - MOST_BEHIND_SECONDS) + chance.expovariate(self.rate)
            self._stop.wait(max(0.0, due - time.monotonic()))
            try:
                self.client.submit(
                    "summarize",
                    f"soak job {self.submitted}: " + "word " * chance.randrange(20, 400),
                    workflow=f"workflow-{self.submitted % 5}",
                    tenant=f"tenant-{self.submitted % 20}",
                )
            except Exception as error:  # noqa: BLE001  # the report tells them all
                self.errors.append(f"{type(error).__name__}: {error}")
            else:
                self.submitted += 1


@contextmanager
def soaked(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[Settings, list[ProcessTree], int, Load]]:
    """Run the fleet and its load; yields its settings, its processes (workers, then Flower), and Redis' process."""
    with ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        faults = {"overloaded": 0.02, "disconnect": 0.01}
        profile = Profile.parse({"latency": {"kind": "fixed", "seconds": LATENCY_SECONDS}, "errors": faults})
        simulator = stack.enter_context(Simulator(profile))
        password = secrets.token_urlsafe(16)
        inherited = {name: text for name, text in os.environ.items() if not name.startswith("ATTUNE_")}
        environ = {
            **inherited,
            **simulated_providers(simulator.url, simulator.openai_url),
            "ATTUNE_REDIS_URL": redis.url,
            "ATTUNE_CONFIG": str(_empty(folder / "attune.toml")),
            "ATTUNE_RETENTION_SECONDS": str(arguments.retention),
            "ATTUNE_LEDGER__MAX_RECORDS": str(arguments.ledger_records),
            "FLOWER_BASIC_AUTH": f"soak:{password}",
            "FLOWER_MAX_TASKS": "10000",
        }
        fleet = stack.enter_context(LocalFleet(WORKERS, environ, folder / "workers", concurrency=CONCURRENCY))
        flower = stack.enter_context(
            PythonProcess(
                ["-m", "celery", "-A", "attune_worker", "flower", "--address=127.0.0.1", "--port=0"],
                environ,
                folder,
                "flower.log",
            )
        )
        fleet.wait_until_ready()
        settings = Settings.load(environ=environ)
        client = stack.enter_context(Client(settings))
        client.submit_many(
            [{"task_type": "summarize", "prompt": f"burst {n}"} for n in range(2 * WORKERS * CONCURRENCY)]
        )
        load = Load(client, arguments.rate)
        load.start()
        stack.callback(load.stop)
        trees = [ProcessTree(worker.process.pid) for worker in fleet.workers if worker.process] + [flower.tree]
        with Redis.from_url(redis.url) as own:
            pid = own.info("server")["process_id"]
        yield settings, trees, pid, load


def watch(arguments: argparse.Namespace, console: Console, folder: Path) -> tuple[list[Sample], Load]:
    """Run for the given time and return what was read."""
    samples: list[Sample] = []
    with (
        soaked(arguments, folder) as (settings, trees, redis_pid, load),
        Redis.from_url(settings.redis_url.get_secret_value()) as redis,
    ):
        records = Records(settings)
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < arguments.seconds:
            time.sleep(min(SAMPLE_SECONDS, arguments.seconds - elapsed))
            *workers, dashboard = [tree.rss_mb() for tree in trees]
            sample = Sample(
                seconds=round(time.monotonic() - began, 1),
                worker_mb=tuple(round(mb, 1) for mb in workers),
                redis_mb=round(redis.info("memory")["used_memory"] / MEGABYTE, 1),
                redis_rss_mb=round(psutil.Process(redis_pid).memory_info().rss / MEGABYTE, 1),
                dashboard_mb=round(dashboard, 1),
                keys=redis.dbsize(),
                submitted=load.submitted,
                lag=sum(records.counts().values()),
            )
            samples.append(sample)
            console.print(
                f"{sample.seconds:6.0f} s  {sample.submitted:7d} jobs, {sample.lag:4d} under way   workers "
                f"{' '.join(f'{mb:.0f}' for mb in sample.worker_mb)} MB   Redis {sample.redis_mb:.0f} MB "
                f"({sample.keys} keys)   Flower {sample.dashboard_mb:.0f} MB"
            )
        load.stop()
        _drain(records, console)
    return samples, load


def _drain(records: Records, console: Console) -> None:
    gives_up = time.monotonic() + 120
    while left := sum(records.counts().values()):
        if time.monotonic() > gives_up:
            raise BenchmarkError(f"{left} jobs had not ended two minutes after the last was submitted")
        time.sleep(0.5)
    console.print("all jobs have ended")


def slope_per_hour(samples: Sequence[Sample], read: Any) -> float:
    """Return by how much a reading grows in an hour: the median of the slopes between all pairs (Theil and Sen)."""
    slopes = [
        (read(late) - read(early)) / (late.seconds - early.seconds) * 3600
        for place, early in enumerate(samples)
        for late in samples[place + 1 :]
        if late.seconds > early.seconds
    ]
    return median(slopes) if slopes else 0.0


def rows(samples: Sequence[Sample], settle_seconds: float) -> list[tuple[str, float, float, float]]:
    """Return for each thing that was read: its name, first and last value after settling, and growth in an hour."""
    settled = [sample for sample in samples if sample.seconds >= settle_seconds] or list(samples)
    readings: dict[str, Any] = {
        **{f"worker {index + 1}, RSS MB": lambda s, i=index: s.worker_mb[i] for index in range(WORKERS)},
        "Redis, used MB": lambda s: s.redis_mb,
        "Redis, RSS MB": lambda s: s.redis_rss_mb,
        "Flower, RSS MB": lambda s: s.dashboard_mb,
        "Redis, keys": lambda s: s.keys,
    }
    return [
        (name, read(settled[0]), read(settled[-1]), slope_per_hour(settled, read)) for name, read in readings.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--rate", type=float, default=50.0, help="jobs per second")
    parser.add_argument("--retention", type=int, default=300, help="seconds that records are kept")
    parser.add_argument("--ledger-records", type=int, default=20_000)
    parser.add_argument("--settle", type=float, default=600.0, help="seconds before growth counts")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    arguments = parser.parse_args(argv)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="attune-soak-") as folder:
        samples, load = watch(arguments, console, Path(folder))
    table = Table("", "after settling", "at the end", "growth in an hour")
    found = rows(samples, arguments.settle)
    for name, first, last, slope in found:
        table.add_row(name, f"{first:.0f}", f"{last:.0f}", f"{slope:+.1f}")
    console.print(table)
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}
    console.print(f"{load.submitted} jobs, {len(load.errors)} refused; {facts['machine']}; {facts['versions']}")
    for text in load.errors[:5]:
        console.print(f"refused: {text}", markup=False)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**facts, "rows": found, "errors": load.errors, "samples": [asdict(one) for one in samples]})
        )
    grows = [name for name, _, _, slope in found if slope >= FLAT[name.rpartition(" ")[2]]]
    for name in grows:
        console.print(f"it grows: {name}", markup=False)
    return int(bool(load.errors or grows))


def _empty(path: Path) -> Path:
    path.touch()
    return path


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchmarkError, KeyboardInterrupt) as error:
        sys.exit(f"stopped: {type(error).__name__}: {error}")
