"""What does an operator see of a job? Its course and its cost; what it says, and its user, only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table

from attune_worker.cli.output import Column, Rows, counted, duration, moment, print_fitting, say, shown, usd
from attune_worker.errors import AttuneError
from attune_worker.jobs import Attempt, Job, JobError, JobResult, JobStatus, total_cost
from attune_worker.store.record import Record

CONTENT = frozenset({"prompt", "messages", "system", "stop", "metadata", "user_id", "session_id"})
"""The fields of a job that hold what its author wrote, or say for whom."""

LISTED = (
    Column("job"),
    Column("status"),
    Column("accepted (UTC)", 2),
    Column("took", 4, right=True),
    Column("starts", 5, right=True),
    Column("model", 4),
    Column("USD", 3, right=True),
    Column("why", 1),
)

MAX_WHY = 24
"""Characters of a reason in the list; ``jobs show`` has it all."""

ATTEMPTS = (
    Column("model"),
    Column("tier", 3),
    Column("outcome"),
    Column("error", 1),
    Column("HTTP", 3, right=True),
    Column("took", 2, right=True),
    Column("USD", right=True),
    Column("provider's id", 4),
    Column("call", 5),
)


@dataclass(frozen=True)
class View:
    """One job's record, read for people and programs.

    ``job`` is what was submitted, where it was read; else ``gone`` says why it cannot be.
    """

    record: Record
    job: Job | None = None
    gone: str = ""

    @cached_property
    def result(self) -> JobResult:
        """How it ended, or what is known so far; of a result that nobody can read, that."""
        try:
            return self.record.to_result()
        except AttuneError as error:
            unreadable = JobError(type=error.type, message=error.message)
            return JobResult(job_id=self.record.job_id, status=self.record.status, error=unreadable)

    @property
    def attempts(self) -> Sequence[Attempt]:
        """Its calls so far."""
        return self.result.attempts

    @property
    def cost_usd(self) -> Decimal | None:
        """What is known of the cost of its calls so far; None where nothing is."""
        return self.result.cost_usd if self.record.status.ended else total_cost(self.attempts)

    @property
    def cost(self) -> str:
        """The cost in words of few letters: ``?`` is unknown, ``≥`` at least."""
        partly = self.cost_usd is not None and any(attempt.cost_usd is None for attempt in self.attempts)
        return f"{'≥' if partly else ''}{usd(self.cost_usd)}" if self.attempts else ""

    @property
    def took_ms(self) -> int | None:
        """How long it was under way, from submission to its end."""
        record = self.record
        return record.ended_ms - record.accepted_ms if record.ended_ms and record.accepted_ms else None

    @property
    def why(self) -> str:
        """Why it waits, or has no answer, in few words."""
        if self.record.status is JobStatus.WAITING:
            return self.record.reason or ""
        return self.result.error.type if self.result.error else ""

    def row(self) -> tuple[str, ...]:
        """Return its cells under ``LISTED``."""
        record = self.record
        return (
            record.job_id,
            record.status.value,
            _short(moment(record.accepted_ms)),
            duration(self.took_ms),
            str(record.attempts or ""),
            self.result.model_id or "",
            self.cost,
            _cut(self.why),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what ``jobs list --json`` says of it."""
        record, result = self.record, self.result
        return {
            "job_id": record.job_id,
            "status": record.status.value,
            "accepted_at": moment(record.accepted_ms),
            "started_at": moment(record.started_ms),
            "ended_at": moment(record.ended_ms),
            "due_at": moment(record.due_ms) if record.status is JobStatus.WAITING else None,
            "deadline_at": moment(record.deadline_ms or None),
            "starts": record.attempts,
            "crashes": record.crashes,
            "worker": record.worker,
            "reason": record.reason,
            "model_id": result.model_id,
            "provider": result.provider,
            "tier": result.tier,
            "cost_usd": self.cost_usd,
            "cost_is_complete": all(attempt.cost_usd is not None for attempt in self.attempts),
            "error_type": result.error.type if result.error else None,
        }

    def to_full_json(self, *, content: bool) -> dict[str, Any]:
        """Return what ``jobs show --json`` says of it."""
        result = self.result.model_dump(mode="json")
        names = ("usage", "latency_ms", "queue_ms", "finish_reason", "attempts", "error")
        told = self.to_json() | {name: result[name] for name in names} | {"lost": list(self.record.lost)}
        hidden = None if content else set(CONTENT)
        told["job"] = None if self.job is None else self.job.model_dump(mode="json", exclude=hidden)
        return told | ({"content": result["content"]} if content else {})


def print_listed(on: Console, views: Sequence[View]) -> None:
    """Print a line for each job."""
    print_fitting(on, Rows(LISTED, [view.row() for view in views]))


def print_shown(on: Console, view: View, *, content: bool) -> None:
    """Print all that is known of one job."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _facts(view):
        if value:
            grid.add_row(shown(name), shown(value))
    on.print(grid)
    if view.attempts:
        cells = [_attempt_row(attempt) for attempt in view.attempts]
        print_fitting(on, Rows(ATTEMPTS, cells, title="calls to providers"))
    if view.record.status is not JobStatus.DEAD:  # there its error tells of them
        print_lost(on, view)
    if content:
        for name, text in _contents(view):
            say(on, f"\n{name}:", style="bold", lines=True)
            say(on, text, lines=True)


def print_lost(on: Console, view: View) -> None:
    """Print which workers were lost while they ran the job."""
    for line in view.record.lost:
        say(on, f"  {line}")


def _facts(view: View) -> Iterator[tuple[str, str]]:
    record, result = view.record, view.result
    yield "job", record.job_id
    yield "status", f"{record.status}{f': {_state(view)}' if _state(view) else ''}"
    yield from _asked(view)
    yield "accepted", _long(moment(record.accepted_ms))
    waited = "" if result.queue_ms is None else f", after {duration(result.queue_ms)} in line"
    yield "started", f"{_long(moment(record.started_ms))}{waited}" if record.started_ms else ""
    yield "ended", _long(moment(record.ended_ms))
    yield "due", _long(moment(record.due_ms)) if record.status is JobStatus.WAITING else ""
    yield "deadline", _long(moment(record.deadline_ms or None))
    lost = f"; {counted(record.crashes, 'worker')} lost" if record.crashes else ""
    yield "starts", f"{record.attempts}{lost}"
    yield "worker", (record.worker or "") if record.status is JobStatus.RUNNING else ""
    model = "/".join(part for part in (result.provider, result.model_id) if part)
    yield "model", f"{model} ({result.tier})" if result.tier else model
    yield "cost", _cost(view)
    if result.error:
        yield "error", f"{result.error.type}: {result.error.message}"


def _state(view: View) -> str:
    if view.record.status is JobStatus.RUNNING and view.record.cancelled_ms is not None:
        return "is being cancelled"
    return view.record.reason or "" if view.record.status is JobStatus.WAITING else ""


def _cost(view: View) -> str:
    running = view.record.status is JobStatus.RUNNING
    if view.attempts:
        return f"${view.cost}{', of earlier starts' if running else ''}"
    return "known when its start has ended" if running else "none: no provider was called"


def _asked(view: View) -> Iterator[tuple[str, str]]:
    """Yield what the job was submitted with, except what it says."""
    if view.job is None:
        decision = view.attempts[0].decision if view.attempts else None
        yield "stage", f"{decision.workflow}/{decision.stage}" if decision else ""
        yield "submitted", view.gone
        return
    fields = view.job.model_dump(mode="json", exclude=set(CONTENT), exclude_defaults=True)
    yield "task", str(fields.pop("task_type", view.job.task_type))
    yield "asked for", ", ".join(f"{name} {value}" for name, value in fields.items())


def _contents(view: View) -> Iterator[tuple[str, str]]:
    if view.job is not None:
        given = view.job.model_dump(mode="json", include=set(CONTENT), exclude_defaults=True)
        messages = given.pop("messages", None) or []
        yield from ((name, str(value)) for name, value in given.items())
        yield from ((f"message of the {message['role']}", message["content"]) for message in messages)
    if view.result.content is not None:
        yield "answer", view.result.content


def _attempt_row(attempt: Attempt) -> tuple[str, ...]:
    return (
        f"{attempt.provider}/{attempt.model_id}",
        attempt.tier.value,
        attempt.outcome,
        attempt.error_type or "",
        str(attempt.status or ""),
        duration(attempt.latency_ms),
        usd(attempt.cost_usd),
        attempt.request_id or "",
        attempt.call_id or "",
    )


def _cut(why: str) -> str:
    """Return as much of a reason as the list has room for; the name of the model before it says less than the rest."""
    model, colon, rest = why.partition(": ")
    if colon and "/" in model and " " not in model:
        why = rest
    return why if len(why) <= MAX_WHY else f"{why[:MAX_WHY]}…"


def _short(at: datetime | None) -> str:
    return "" if at is None else f"{at:%m-%d %H:%M:%S}"


def _long(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"
