"""What does attune-worker make of the jobs and faults, and does its ledger agree with the provider's bill?"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from chaos_bill import bill_agrees, uncertain_figures
from chaos_checks import (
    Answer,
    Check,
    Recovery,
    Tally,
    all_ended,
    answers_are_right,
    budget_is_kept,
    ended_once,
    extras_are_explained,
    recovered_in_time,
    workers_end_when_told,
)
from chaos_contenders import CONCURRENCY, Findings, Order, Seen, Services, laid_over
from chaos_extras import extras, pid_of
from chaos_fleet import Life
from processes import BenchmarkError

from attune_worker.budget import usd_of
from attune_worker.client import Client
from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import JobResult, JobStatus
from attune_worker.ledger import Ledger
from attune_worker.ledger_record import LedgerRecord
from attune_worker.local import LocalWorker, simulated_providers
from attune_worker.settings import Settings
from attune_worker.simulator import answer
from attune_worker.store.connection import connect
from attune_worker.store.keys import idempotent_job_id, shards
from attune_worker.store.record import Record
from attune_worker.store.records import Records

NAMESPACE = "chaos"
TENANT = "frugal"
USD_PER_FRUGAL_JOB = Decimal("0.00001")
"""Less than a job costs, so that the budget runs out."""

FRUGAL_MAX_TOKENS = 64
"""So that what is reserved for a call is in proportion to its budget."""

BATCH = 500


@dataclass
class _Held:
    """A job that ran in a worker when that was killed; times are in seconds, monotonic."""

    record: Record
    life: Life
    taken_over: float | None = None
    again: float | None = None


class AttuneWorker:
    """A fleet of attune-worker, with the settings of a run and defaults for the rest."""

    name = "attune"

    def __init__(self, services: Services) -> None:
        self._services = services
        frugal = sum(order.frugal for order in services.orders)
        self._limit_usd = frugal * USD_PER_FRUGAL_JOB
        self._environ = self._settings_of(services.seen_redis_url)
        self._client = Client(Settings.load(environ=self._environ))
        self._settings = Settings.load(
            environ=self._settings_of(services.redis_url) | {"ATTUNE_REDIS_TIMEOUT_SECONDS": "1"}
        )
        self._redis = connect(self._settings)
        self._records = Records(self._settings)
        self._orders = {self._job_id(order): order for order in services.orders}
        self._pending: dict[str, _Held] = {}
        self._recovered: list[_Held] = []

    def worker(self, name: str, additions: Mapping[str, str], log: Path) -> LocalWorker:
        """As ``Contender.worker``."""
        environ = laid_over(self._services.environ() | self._environ, additions)
        return LocalWorker(name, environ, log, concurrency=CONCURRENCY)

    def submit(self, orders: Sequence[Order]) -> None:
        """As ``Contender.submit``; idempotency keys make it repeatable."""
        self._client.submit_many([_job(order) for order in orders])

    def send_again(self, orders: Sequence[Order]) -> None:
        """As ``Contender.send_again``: two wake-ups more for each."""
        for _ in range(2):
            self._client.wake([self._job_id(order) for order in orders])

    def ended(self) -> int:
        """As ``Contender.ended``: all that were accepted and are in no index of those under way."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for shard in shards(NAMESPACE):
                pipeline.zcard(shard.queued)
                pipeline.hlen(shard.running)
                pipeline.zcard(shard.due)
            under_way: int = sum(pipeline.execute())
        return len(self._orders) - under_way

    def killed(self, life: Life) -> None:
        """As ``Contender.killed``."""
        held = [job_id for job_id, lease in self._records.running() if pid_of(lease) == life.pid]
        self._pending |= {record.job_id: _Held(record, life) for record in self._records.read(held)}

    def look(self) -> None:
        """As ``Contender.look``."""
        if not self._pending:
            return
        try:
            records = self._records.read(list(self._pending))
        except ServiceUnavailableError:
            return
        now = time.monotonic()
        for record in records:
            held = self._pending[record.job_id]
            if held.taken_over is None and not _runs_as_before(record, held.record):
                held.taken_over = now
            if record.attempts > held.record.attempts or record.status.ended:
                held.again = now
                self._recovered.append(self._pending.pop(record.job_id))

    def findings(self, seen: Seen) -> Findings:
        """As ``Contender.findings``."""
        records = {record.job_id: record for record in self._read()}
        results = {job_id: record.to_result() for job_id, record in records.items() if record.status.ended}
        ledger = Ledger(self._settings)
        written = list(ledger.records())
        if not any(record.call_id in seen.journal.calls for record in written):
            raise BenchmarkError("the journal of Redis shows none of the calls in the ledger: is it read right?")
        recoveries = list(self._recoveries(seen))
        found = list(extras(seen, written, records))
        statuses = {job_id: record.status for job_id, record in records.items()}
        answers = list(self._answers(results))
        checks = [
            all_ended(statuses),
            ended_once(statuses, seen.journal.ends),
            answers_are_right(answers),
            bill_agrees(written, seen.bill),
            self._budget(seen, written, results),
            recovered_in_time(recoveries),
            extras_are_explained(found),
            workers_end_when_told(seen.lives),
        ]
        errors = Counter(result.error.type for result in results.values() if result.error is not None)
        figures = {
            "errors": dict(errors),
            "jobs_by_crashes": dict(Counter(record.crashes for record in records.values())),
            "jobs_by_starts": dict(Counter(record.attempts for record in records.values())),
            "messages": f"{seen.journal.messages:,}",
            "ledger_entries": f"{len(written):,}",
            "ledger_entries_skipped": ledger.skipped,
            **uncertain_figures(written),
        }
        ledger.close()
        tally = Tally.of(statuses, seen.journal.ends, answers, found)
        return Findings(tally, checks, recoveries, found, figures)

    def close(self) -> None:
        """As ``Contender.close``."""
        self._client.close()
        self._records.close()
        self._redis.close()

    def _settings_of(self, redis_url: str) -> dict[str, str]:
        pace, nothing = self._services.pace, self._services.folder / "attune.toml"
        nothing.touch()
        budget = {"per": "month", "tenant": TENANT, "limit_usd": str(self._limit_usd), "hard": True}
        url = self._services.provider_url
        return simulated_providers(url, f"{url}/v1") | {
            "ATTUNE_CONFIG": str(nothing),
            "ATTUNE_REDIS_URL": redis_url,
            "ATTUNE_NAMESPACE": NAMESPACE,
            "ATTUNE_BUDGETS": json.dumps([budget]),
            "ATTUNE_RECOVERY__LEASE_SECONDS": str(pace.lease_seconds),
            "ATTUNE_RECOVERY__SHUTDOWN_GRACE_SECONDS": str(pace.grace_seconds),
            "ATTUNE_HTTP__REQUEST_TIMEOUT_SECONDS": str(pace.request_timeout_seconds),
            "ATTUNE_BREAKER__RECOVERY_TIMEOUT_SECONDS": str(pace.recovery_timeout_seconds),
        }

    def _job_id(self, order: Order) -> str:
        fields = _job(order)
        return idempotent_job_id(NAMESPACE, fields.get("tenant"), fields["idempotency_key"])

    def _read(self) -> Iterator[Record]:
        job_ids = list(self._orders)
        for start in range(0, len(job_ids), BATCH):
            yield from self._records.read(job_ids[start : start + BATCH])

    def _answers(self, results: Mapping[str, JobResult]) -> Iterator[Answer]:
        for job_id, result in results.items():
            if result.status is JobStatus.SUCCEEDED:
                expected = answer(result.model_id or "", "", [("user", self._orders[job_id].prompt)]).text
                yield Answer(job_id, result.content, expected)

    def _recoveries(self, seen: Seen) -> Iterator[Recovery]:
        for held in [*self._recovered, *self._pending.values()]:
            killed = held.life.ended or 0.0
            yield Recovery(
                held.record.job_id,
                held.life.name,
                None if held.again is None else held.again - killed,
                held.again is not None and seen.redis_was_away(killed, held.again),
                None if held.taken_over is None else held.taken_over - killed,
            )

    def _budget(self, seen: Seen, written: Iterable[LedgerRecord], results: Mapping[str, JobResult]) -> Check:
        calls = {record.call_id for record in written if record.tenant == TENANT}
        lines = [line for line in seen.bill if line["client_request_id"] in calls]
        billed = sum((Decimal(line["cost_usd"] or 0) for line in lines), Decimal(0))
        most = max(seen.journal.peaks.values(), default=0)
        refused = sum(one.error is not None and one.error.type == "budget_exceeded" for one in results.values())
        return budget_is_kept(self._limit_usd, usd_of(most), billed, refused)


def _job(order: Order) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "task_type": "summarize",
        "prompt": order.prompt,
        "workflow": "chaos",
        "idempotency_key": f"order-{order.number}",
    }
    return fields | ({"tenant": TENANT, "max_tokens": FRUGAL_MAX_TOKENS} if order.frugal else {})


def _runs_as_before(now: Record, before: Record) -> bool:
    return now.status is JobStatus.RUNNING and (now.worker, now.attempts) == (before.worker, before.attempts)
