"""How fast, and at what cost, does one worker empty a queue?

The jobs are in line before the worker starts. The first of them are warm-up: threads, connections and
imports, and the wait for the first answers. What is measured lies between the end of the warm-up and the
last completion. A job is complete when Celery has stored its result; results have a Redis database of
their own, whose size is read 50 times a second.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from contenders import Mode, Services, enqueue, worker_command
from processes import BenchmarkError, Memory, ProcessTree, PythonProcess
from redis import Redis

from attune_worker.store.embedded import EmbeddedRedis

WARM_UP_SHARE = 0.2
MEMORY_SHARE = 0.7
"""At this share of completions the page tables are read: all threads have worked, and calls are in flight."""

SAMPLE_SECONDS = 0.02
SAMPLES_PER_RSS = 5
STALLED_SECONDS = 60.0

Progress = Callable[[int], None]
"""Told how many jobs are complete."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one worker is given to do."""

    mode: Mode
    latency_seconds: float
    concurrency: int
    jobs: int

    @property
    def warm_up(self) -> int:
        """How many jobs come before the measurement: a fifth, and one for each slot, or the first wave would count.

        With answers after two seconds a wave arrives at once; a window that began within it would show
        more jobs per second than the slots can do.
        """
        return max(1, int(self.jobs * WARM_UP_SHARE), min(self.concurrency, self.jobs // 2))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run showed; memory in MB, CPU of the worker's process tree, of the provider and of Redis apart."""

    jobs_per_second: float
    cpu_ms_per_job: float
    peak_rss_mb: float
    pss_mb: float
    uss_mb: float
    max_in_flight: int
    provider_cpu_ms_per_job: float
    redis_cpu_ms_per_job: float


@dataclass(frozen=True, slots=True)
class _Moment:
    """Counters at one time."""

    seconds: float
    completed: int
    worker_cpu: float
    provider_cpu: float
    redis_cpu: float


def measure(workload: Workload, progress: Progress) -> Measurement:
    """Run the workload on services of its own; raises ``BenchmarkError`` when a job was lost or called for twice."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attune-benchmark-")))
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        results = stack.enter_context(Redis.from_url(_database(redis.url, 1)))
        provider, provider_url = stack.enter_context(running_provider(workload.latency_seconds, folder))
        services = Services(redis.url, _database(redis.url, 1), provider_url)
        enqueue(workload.mode, workload.jobs, services)
        arguments, environ = worker_command(workload.mode, workload.concurrency, services)
        with PythonProcess(arguments, environ, folder, "worker.log") as worker:
            measured = _Watch(workload, worker, provider.tree, results).until_done(progress)
        seen = _ask(provider_url, "requests?last=0")
        _verify(workload, _ask(provider_url, "invoice?summary=1"), worker)
    return _summed_up(*measured, max_in_flight=seen["max_in_flight"])


class _Watch:
    """Watches one worker from its start to the last completion."""

    def __init__(self, workload: Workload, worker: PythonProcess, provider: ProcessTree, results: Redis) -> None:
        self._workload = workload
        self._worker = worker
        self._provider = provider
        self._results = results
        self._peak_rss_mb = 0.0

    def until_done(self, progress: Progress) -> tuple[_Moment, _Moment, float, Memory]:
        """Return the counters at both ends of the measurement, the peak RSS in MB, and the memory in detail."""
        begin = self._wait_for(self._workload.warm_up, progress)
        self._wait_for(int(self._workload.jobs * MEMORY_SHARE), progress)
        memory = self._worker.tree.memory()
        end = self._wait_for(self._workload.jobs, progress)
        return begin, end, self._peak_rss_mb, memory

    def _wait_for(self, completions: int, progress: Progress) -> _Moment:
        """Sample until that many jobs are complete, and return the counters of that moment."""
        samples, last, last_change = 0, -1, time.monotonic()
        patience_seconds = STALLED_SECONDS + self._workload.latency_seconds
        while (completed := self._completed()) < completions:
            if samples % SAMPLES_PER_RSS == 0:
                self._sample_memory(progress, completed)
            samples += 1
            if completed != last:
                last, last_change = completed, time.monotonic()
            elif time.monotonic() - last_change > patience_seconds:
                raise BenchmarkError(f"nothing was completed for {patience_seconds:g} s:\n{self._worker.trouble()}")
            time.sleep(SAMPLE_SECONDS)
        return self._moment(completed)

    def _sample_memory(self, progress: Progress, completed: int) -> None:
        self._worker.check()
        if completed == 0:
            self._worker.tree.look_again()  # a prefork pool is complete before its first job is
        self._peak_rss_mb = max(self._peak_rss_mb, self._worker.tree.rss_mb())
        progress(completed)

    def _moment(self, completed: int) -> _Moment:
        seconds = time.perf_counter()
        redis: dict[str, Any] = self._results.info("cpu")
        return _Moment(
            seconds=seconds,
            completed=completed,
            worker_cpu=self._worker.tree.cpu_seconds(),
            provider_cpu=self._provider.cpu_seconds(),
            redis_cpu=redis["used_cpu_user"] + redis["used_cpu_sys"],
        )

    def _completed(self) -> int:
        completed: int = self._results.dbsize()
        return completed


def _summed_up(begin: _Moment, end: _Moment, peak_rss_mb: float, memory: Memory, max_in_flight: int) -> Measurement:
    jobs = end.completed - begin.completed
    if jobs <= 0:
        raise BenchmarkError("all jobs were done before the warm-up was seen to end; give it more jobs")
    return Measurement(
        jobs_per_second=jobs / (end.seconds - begin.seconds),
        cpu_ms_per_job=(end.worker_cpu - begin.worker_cpu) / jobs * 1000,
        peak_rss_mb=peak_rss_mb,
        pss_mb=memory.pss,
        uss_mb=memory.uss,
        max_in_flight=max_in_flight,
        provider_cpu_ms_per_job=(end.provider_cpu - begin.provider_cpu) / jobs * 1000,
        redis_cpu_ms_per_job=(end.redis_cpu - begin.redis_cpu) / jobs * 1000,
    )


@contextmanager
def running_provider(latency_seconds: float, folder: Path) -> Iterator[tuple[PythonProcess, str]]:
    """Run the simulator, and yield it with its URL."""
    services = Services("", "", "")
    arguments = ["-m", "attune_worker", "simulator", "--port=0", f"--latency={latency_seconds:g}"]
    with PythonProcess(arguments, services.environ(), folder, "provider.log") as provider:
        while not (url := provider.log.read_text().strip()):
            provider.check()
            time.sleep(SAMPLE_SECONDS)
        yield provider, url


def _verify(workload: Workload, invoice: dict[str, Any], worker: PythonProcess) -> None:
    """Raise ``BenchmarkError`` unless the provider has billed exactly one call for each job."""
    if invoice["count"] != workload.jobs:
        raise BenchmarkError(f"{workload.jobs} jobs made {invoice['count']} calls:\n{worker.trouble()}")


def _ask(provider_url: str, page: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{provider_url}/_sim/{page}", timeout=60).raise_for_status().json()
    return answer


def _database(url: str, number: int) -> str:
    return f"{url.rpartition('/')[0]}/{number}"
