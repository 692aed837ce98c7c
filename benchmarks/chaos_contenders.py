"""Who is put to the test, and what is known of it? What attune-worker and bare Celery have in common here."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from chaos_checks import Check, Extra, Recovery, Tally
from chaos_faults import Pace
from chaos_fleet import Life
from chaos_journal import Journal

from attune_worker.local import LocalWorker

CONCURRENCY = 32
FRUGAL_SHARE = 0.1
"""Of the jobs, those of a tenant whose budget runs out."""

TOPICS = ("a broken invoice", "a late delivery", "an unclear error", "a slow report", "a missing test", "a lost parcel")


@dataclass(frozen=True, slots=True)
class Order:
    """One job that is to be done; ``frugal``: for the tenant whose budget runs out."""

    number: int
    prompt: str
    frugal: bool


@dataclass(frozen=True, slots=True)
class Services:
    """What workers need: Redis as they see it and as it is, the provider, a folder, and the pace of the run."""

    seen_redis_url: str
    redis_url: str
    provider_url: str
    folder: Path
    pace: Pace
    orders: Sequence[Order]

    def environ(self) -> dict[str, str]:
        """Return what every worker's environment begins with: ours, without any settings of attune-worker or Celery."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ATTUNE_", "CELERY_"))}
        sources = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        return kept | {"PYTHONPATH": os.pathsep.join(sources)}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the bench knows after a run.

    ``bill``: the lines of the provider's invoice. ``away``: when Redis was (seconds, monotonic). ``sent_twice``: jobs
    whose wake-ups were. ``clock_seconds``: what to take from the time of day to get to the monotonic clock.
    """

    lives: Sequence[Life]
    journal: Journal
    bill: Sequence[Mapping[str, Any]]
    away: Sequence[tuple[float, float]]
    sent_twice: Collection[int]
    clock_seconds: float

    def redis_was_away(self, since: float, until: float) -> bool:
        """Whether Redis was, at any moment in between."""
        return any(start < until and end > since for start, end in self.away)


@dataclass(frozen=True, slots=True)
class Findings:
    """What became of the jobs of one contender; ``figures`` are numbers beside the checks."""

    tally: Tally
    checks: Sequence[Check]
    recoveries: Sequence[Recovery]
    extras: Sequence[Extra]
    figures: Mapping[str, Any] = field(default_factory=dict)


class Contender(Protocol):
    """Runs jobs with workers that are broken all the time."""

    name: str

    def worker(self, name: str, additions: Mapping[str, str], log: Path) -> LocalWorker:
        """Make a worker, with these additions to its environment."""
        ...

    def submit(self, orders: Sequence[Order]) -> None:
        """Submit jobs; raises ``ServiceUnavailableError`` when it is not known whether that was done. Repeatable."""
        ...

    def send_again(self, orders: Sequence[Order]) -> None:
        """Send the messages of jobs that were submitted once more."""
        ...

    def ended(self) -> int:
        """Return how many jobs have ended; raises ``RedisError`` or ``ServiceUnavailableError`` when Redis is away."""
        ...

    def killed(self, life: Life) -> None:
        """Note what ran in a worker that was just killed."""
        ...

    def look(self) -> None:
        """Look whether that runs again; does nothing while Redis is away."""
        ...

    def findings(self, seen: Seen) -> Findings:
        """Say what became of everything, once all workers have ended."""
        ...

    def close(self) -> None:
        """Give connections back."""
        ...


def make_orders(seed: int, jobs: int) -> list[Order]:
    """Return the jobs of a run; every prompt is another one."""
    random = Random(f"orders {seed}")
    return [
        Order(
            number, f"Job {number} of run {seed}. It is about {random.choice(TOPICS)}.", random.random() < FRUGAL_SHARE
        )
        for number in range(jobs)
    ]


def laid_over(environ: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with additions; folders that Python looks in come before those that were there."""
    together = {**environ, **additions}
    if "PYTHONPATH" in additions and "PYTHONPATH" in environ:
        together["PYTHONPATH"] = os.pathsep.join((additions["PYTHONPATH"], environ["PYTHONPATH"]))
    return together
