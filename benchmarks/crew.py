"""How do many threads, in two processes, do one thing at the same time, and what do they use?"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from types import TracebackType
from typing import Any, Self

from processes import BenchmarkError
from redis import Redis

from attune_worker.models.admission import Admission
from attune_worker.settings import Settings

PROCESSES = 2
START_SECONDS = 60.0

Work = Callable[[Admission, Settings, float], list[Any]]
"""What one thread does until a time (seconds, monotonic); returns what it has seen."""

Order = tuple[Work, Mapping[str, Any], int, float]
"""The work, the fields of the settings, how many threads, and for how many seconds."""


@dataclass(frozen=True, slots=True)
class Shift:
    """What all threads have seen, how long they worked, and the CPU that they and Redis used meanwhile (seconds)."""

    seen: list[Any]
    wall_seconds: float
    client_cpu_seconds: float
    redis_cpu_seconds: float


class Crew:
    """Two processes that work when they are told to; they end with the context."""

    def __init__(self, redis: Redis) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share connections
        self._redis = redis
        self._barrier = context.Barrier(PROCESSES + 1)
        self._answers = context.Queue()
        self._orders = [context.Queue() for _ in range(PROCESSES)]
        self._processes = [
            context.Process(target=_serve, args=(orders, self._barrier, self._answers), daemon=True)
            for orders in self._orders
        ]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def work(self, work: Work, fields: Mapping[str, Any], threads: int, seconds: float) -> Shift:
        """Let so many threads, in equal shares, ``work`` for a while with settings of these ``fields``.

        ``work`` is a function of a module. Raises ``BenchmarkError`` when a process has failed; it says why itself.
        """
        shares = [threads // PROCESSES + (place < threads % PROCESSES) for place in range(PROCESSES)]
        for orders, share in zip(self._orders, shares, strict=True):
            orders.put((work, fields, share, seconds))
        try:
            self._barrier.wait(START_SECONDS)
            began, redis_began = time.perf_counter(), self._redis_cpu_seconds()
            self._barrier.wait(seconds + START_SECONDS)
            wall_seconds, redis_seconds = time.perf_counter() - began, self._redis_cpu_seconds() - redis_began
            parts = [self._answers.get(timeout=START_SECONDS) for _ in shares]
        except (BrokenBarrierError, queue.Empty):
            raise BenchmarkError("a process of the benchmark has failed") from None
        seen = [one for part, _ in parts for one in part]
        return Shift(seen, wall_seconds, sum(used for _, used in parts), redis_seconds)

    def _redis_cpu_seconds(self) -> float:
        used: dict[str, Any] = self._redis.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])


def _serve(orders: Any, barrier: Barrier, answers: Any) -> None:
    """Work off one order after the other; ``orders`` and ``answers`` are queues between processes."""
    try:
        while True:
            answers.put(_carry_out(orders.get(), barrier))
    except BaseException:
        barrier.abort()
        raise


def _carry_out(order: Order, barrier: Barrier) -> tuple[list[Any], float]:
    """Return what the threads have seen, and the CPU that they used (seconds)."""
    work, fields, threads, seconds = order
    settings = Settings(**fields)
    admission = Admission(settings)
    if threads:
        work(admission, settings, time.monotonic())  # one turn, so that imports and connections are there
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        barrier.wait(START_SECONDS)
        cpu, ends = time.process_time(), time.monotonic() + seconds
        turns = [pool.submit(work, admission, settings, ends) for _ in range(threads)]
        seen = [one for turn in turns for one in turn.result()]
    used = time.process_time() - cpu
    barrier.wait(seconds + START_SECONDS)
    admission.close()
    return seen, used
