"""What does bare Celery make of the same jobs and faults? It acknowledges early (its default) or late."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import bare_celery
from celery import Celery
from chaos_checks import (
    Answer,
    Extra,
    Recovery,
    Tally,
    all_ended,
    answers_are_right,
    ended_once,
    extras_are_explained,
    recovered_in_time,
    workers_end_when_told,
)
from chaos_contenders import CONCURRENCY, Findings, Order, Seen, Services, laid_over
from chaos_fleet import Life
from chaos_journal import CELERY_RESULT
from kombu.exceptions import KombuError, OperationalError
from redis import Redis

from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.simulator import answer
from attune_worker.store.embedded import end_with_owner

STATUSES = {"SUCCESS": JobStatus.SUCCEEDED, "FAILURE": JobStatus.FAILED}
RESULTS_DATABASE = 1
BATCH = 500
SENT_TWICE = "sent twice by the bench"


class BareWorker(LocalWorker):
    """A worker of the bare task."""

    def start(self) -> None:
        """Start the process; it takes jobs about a second later."""
        options = ["--pool=threads", f"--concurrency={CONCURRENCY}", "--loglevel=info", f"--hostname={self.name}@%h"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "bare_celery", "worker", *options],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_owner(),  # noqa: PLW1509  # one system call, which takes no lock
            )


class BareCelery:
    """Celery on Redis with a task around httpx, its results in a database of their own."""

    def __init__(self, services: Services, *, late: bool) -> None:
        self.name = "celery-late" if late else "celery-early"
        self._services = services
        self._late = late
        self._app = Celery(broker=services.seen_redis_url, set_as_current=False)
        self._results = Redis.from_url(_database(services.redis_url), socket_timeout=1)
        self._killed: dict[str, float] = {}

    def worker(self, name: str, additions: Mapping[str, str], log: Path) -> LocalWorker:
        """As ``Contender.worker``."""
        environ = self._services.environ() | {
            "CELERY_BROKER_URL": self._services.seen_redis_url,
            "CELERY_RESULT_BACKEND": _database(self._services.seen_redis_url),
            "PROVIDER_URL": self._services.provider_url,
            "PROVIDER_KEY": "simulated",
            "PROVIDER_TIMEOUT_SECONDS": str(self._services.pace.request_timeout_seconds),
            "BARE_ACKS_LATE": str(int(self._late)),
            "BARE_NOTES": str(self._notes(name)),
        }
        return BareWorker(name, laid_over(environ, additions), log)

    def submit(self, orders: Sequence[Order]) -> None:
        """As ``Contender.submit``; a message whose sending failed is sent again, under the same id."""
        try:
            with self._app.producer_pool.acquire(block=True) as producer:
                for order in orders:
                    self._app.send_task(
                        bare_celery.NAME, (order.prompt,), task_id=_task_id(order.number), producer=producer
                    )
        except (OperationalError, KombuError, OSError) as error:
            raise ServiceUnavailableError(f"the broker is away: {type(error).__name__}") from error

    def send_again(self, orders: Sequence[Order]) -> None:
        """As ``Contender.send_again``."""
        self.submit(orders)

    def ended(self) -> int:
        """As ``Contender.ended``."""
        number: int = self._results.dbsize()
        return number

    def killed(self, life: Life) -> None:
        """As ``Contender.killed``; the rest is in the workers' notes."""
        assert life.ended is not None
        self._killed[life.name] = life.ended

    def look(self) -> None:
        """The workers' notes tell it in the end."""

    def findings(self, seen: Seen) -> Findings:
        """As ``Contender.findings``."""
        results = dict(self._read())
        statuses = {job_id: _status(result) for job_id, result in results.items()}
        expected = {_task_id(order.number): order.prompt for order in self._services.orders}
        answers = [
            Answer(job_id, _content(results[job_id]), answer(bare_celery.MODEL, "", [("user", prompt)]).text)
            for job_id, prompt in expected.items()
            if statuses[job_id] is JobStatus.SUCCEEDED
        ]
        starts, recoveries = self._starts_and_recoveries(seen)
        twice = {_task_id(number) for number in seen.sent_twice}
        extras = [
            Extra(job_id, "", SENT_TWICE if job_id in twice else None)
            for job_id in starts
            for _ in range(starts[job_id] - 1)
        ]
        checks = [
            all_ended(statuses),
            ended_once(statuses, seen.journal.ends),
            answers_are_right(answers),
            recovered_in_time(recoveries),
            extras_are_explained(extras),
            workers_end_when_told(seen.lives),
        ]
        tally = Tally.of(statuses, seen.journal.ends, answers, extras)
        return Findings(tally, checks, recoveries, extras, {"messages": f"{seen.journal.messages:,}"})

    def close(self) -> None:
        """As ``Contender.close``."""
        self._results.close()
        self._app.close()

    def _starts_and_recoveries(self, seen: Seen) -> tuple[dict[str, int], list[Recovery]]:
        """Return how often each job was started, and what became of those that ran in killed workers."""
        started: defaultdict[str, list[float]] = defaultdict(list)
        held: list[tuple[str, str]] = []
        for life in seen.lives:
            running: defaultdict[str, int] = defaultdict(int)
            for job_id, event, seconds in bare_celery.noted(self._notes(life.name)):
                if event == "started":
                    started[job_id].append(seconds)
                running[job_id] += 1 if event == "started" else -1
            if life.name in self._killed:
                held += [(job_id, life.name) for job_id, number in running.items() if number]
        recoveries = []
        for job_id, worker in held:
            killed = self._killed[worker]
            again = min((seconds for seconds in started[job_id] if seconds > killed), default=None)
            away = again is not None and seen.redis_was_away(killed, again)
            recoveries.append(Recovery(job_id, worker, None if again is None else again - killed, away))
        return {job_id: len(times) for job_id, times in started.items()}, recoveries

    def _read(self) -> Iterator[tuple[str, bytes | None]]:
        task_ids = [_task_id(order.number) for order in self._services.orders]
        for start in range(0, len(task_ids), BATCH):
            batch = task_ids[start : start + BATCH]
            yield from zip(
                batch, self._results.mget([CELERY_RESULT + task_id.encode() for task_id in batch]), strict=True
            )

    def _notes(self, worker: str) -> Path:
        return self._services.folder / f"{worker}.notes"


def _task_id(number: int) -> str:
    return f"job-{number}"


def _database(url: str) -> str:
    return f"{url.rpartition('/')[0]}/{RESULTS_DATABASE}"


def _status(result: bytes | None) -> JobStatus:
    """Return how a job ended; what Celery calls PENDING is not known to have ended."""
    return JobStatus.UNKNOWN if result is None else STATUSES.get(json.loads(result)["status"], JobStatus.UNKNOWN)


def _content(result: bytes | None) -> str | None:
    found: str | None = json.loads(result or b"{}").get("result", {}).get("content")
    return found
