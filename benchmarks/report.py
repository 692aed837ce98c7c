"""What do the runs say together? Medians, ratios within a round, and how they are printed."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import bare_task
from measurement import MEMORY_SHARE, WARM_UP_SHARE, Measurement, Workload
from rich.table import Table

PACKAGES = ("attune-worker", "celery", "kombu", "redis", "httpx")
HEADINGS = (
    *("latency", "pool", "at once", "worker", "jobs/s", "of bare", "CPU ms/job", "peak RSS MB", "PSS MB", "USS MB"),
    *("in flight", "provider ms", "Redis ms"),
)
LABELS = {"bare": "bare Celery + httpx", "attune": "attune-worker"}


@dataclass(frozen=True, slots=True)
class Case:
    """All rounds of one workload; ``ratios`` to the bare task on the same pool, round by round."""

    workload: Workload
    rounds: tuple[Measurement, ...]
    ratios: tuple[float, ...] = ()

    @property
    def typical(self) -> Measurement:
        """The median of each number."""
        middle = {
            field.name: median(getattr(measured, field.name) for measured in self.rounds)
            for field in fields(Measurement)
        }
        return Measurement(**middle)

    @property
    def ratio(self) -> float | None:
        """The median of the ratios, None for the bare task itself."""
        return median(self.ratios) if self.ratios else None


def cases(measured: Mapping[Workload, Sequence[Measurement]]) -> list[Case]:
    """Put each workload's rounds together, and hold attune-worker against the bare task of the same round."""
    found = []
    for workload, rounds in measured.items():
        bare = next((other for other in measured if _is_bare_twin(other, workload)), None)
        pairs = zip(rounds, measured[bare] if bare else (), strict=False)
        found.append(Case(workload, tuple(rounds), tuple(a.jobs_per_second / b.jobs_per_second for a, b in pairs)))
    return found


def _is_bare_twin(other: Workload, workload: Workload) -> bool:
    same = (other.mode.pool, other.latency_seconds) == (workload.mode.pool, workload.latency_seconds)
    return same and other.mode.kind == "bare" and workload.mode.kind != "bare"


def as_json(found: Sequence[Case]) -> dict[str, Any]:
    """Return everything that was measured, as JSON values."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "bare_task": bare_task.DESCRIPTION,
        "cases": [
            {
                "mode": case.workload.mode.name,
                "pool": case.workload.mode.pool,
                "latency_seconds": case.workload.latency_seconds,
                "concurrency": case.workload.concurrency,
                "jobs": case.workload.jobs,
                "warm_up_jobs": case.workload.warm_up,
                "median": asdict(case.typical),
                "ratio_to_bare": case.ratio,
                "rounds": [asdict(measured) for measured in case.rounds],
            }
            for case in found
        ],
    }


def as_table(found: Sequence[Case]) -> Table:
    """Return the table for a terminal."""
    table = Table(*HEADINGS)
    for row in _rows(found):
        table.add_row(*row)
    return table


def as_markdown(found: Sequence[Case]) -> str:
    """Return the table for a README, with what it needs to be understood."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *_rows(found)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{notes(found)}"


def notes(found: Sequence[Case]) -> str:
    """Say what was measured, on what, and how."""
    return "\n".join(
        [
            _setting(),
            (
                f"Medians of {max(len(case.rounds) for case in found)} interleaved rounds; in brackets the lowest and "
                "highest. 'of bare' is the median of the ratios within each round."
            ),
            (
                f"One worker; jobs queued before it starts; the first {WARM_UP_SHARE:.0%}, and one for each slot, "
                "are warm-up; measured until the last result is stored. CPU and memory are those of the worker's "
                f"process tree; PSS and USS are read once, at {MEMORY_SHARE:.0%} of the jobs."
            ),
            "Provider: the project's simulator, one process; its CPU and that of Redis are per job.",
            f"Bare task: {bare_task.DESCRIPTION}.",
        ]
    )


def _setting() -> str:
    names = ", ".join(f"{name} {number}" for name, number in versions().items())
    cores = f"{machine()['cores']} cores for worker, Redis and provider together"
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine()['cpu']}, {cores}; {names}."


def machine() -> dict[str, Any]:
    """Return the CPU's model and the number of cores that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "system": platform.system()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if sys.platform == "linux" and information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rows(found: Sequence[Case]) -> Iterator[list[str]]:
    for case in found:
        typical, workload = case.typical, case.workload
        rates = sorted(measured.jobs_per_second for measured in case.rounds)
        yield [
            f"{workload.latency_seconds:g} s",
            workload.mode.pool,
            str(workload.concurrency),
            LABELS[workload.mode.kind],
            f"{typical.jobs_per_second:.3g}" + (f" ({rates[0]:.3g} to {rates[-1]:.3g})" if len(rates) > 1 else ""),
            "" if case.ratio is None else f"{case.ratio:.0%}",
            f"{typical.cpu_ms_per_job:.2f}",
            f"{typical.peak_rss_mb:.0f}",
            f"{typical.pss_mb:.0f}",
            f"{typical.uss_mb:.0f}",
            f"{typical.max_in_flight:.0f}",
            f"{typical.provider_cpu_ms_per_job:.2f}",
            f"{typical.redis_cpu_ms_per_job:.2f}",
        ]
