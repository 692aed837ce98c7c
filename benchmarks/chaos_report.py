"""What did the runs show? As tables for a terminal and for a page, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from chaos_checks import Check
from chaos_contenders import CONCURRENCY
from chaos_faults import pace
from chaos_fleet import BY_ITSELF, clock_library
from chaos_run import ERRORS, WORKERS, Outcome
from report import machine, versions
from rich.table import Table

PERSISTENT = "Redis writes every command to its append-only file"
LABELS = {
    "attune": "attune-worker",
    "celery-early": "Celery, early acknowledgement",
    "celery-late": "Celery, late acknowledgement",
}


def checks_of(outcome: Outcome) -> list[Check]:
    """Return every promise and whether it was kept, that of the surroundings first."""
    return [
        Check(PERSISTENT, outcome.persistent, f"appendonly {'yes' if outcome.persistent else 'no'}"),
        *outcome.findings.checks,
    ]


def broken(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the promises that attune-worker has broken; what others do is measured, not judged."""
    return [
        check.promise for one in outcomes if one.contender == "attune" for check in checks_of(one) if not check.kept
    ]


def table_of(outcome: Outcome) -> Table:
    """Return what was found for one contender."""
    table = Table("", "kept", "found", title=f"{outcome.contender}: {outcome.jobs:,} jobs", title_justify="left")
    for check in checks_of(outcome):
        table.add_row(check.promise, "yes" if check.kept else "NO", check.found)
    table.add_section()
    for name, found in notes_of(outcome):
        table.add_row(name, "", found)
    return table


def notes_of(outcome: Outcome) -> list[tuple[str, str]]:
    """Return what belongs beside the checks, as names and lines."""
    faults = Counter(fault.kind.value for fault in outcome.faults)
    ends = Counter(life.how or "still there" for life in outcome.lives)
    return [
        ("faults", _counted(faults)),
        ("worker processes", f"{len(outcome.lives):,}; {_counted(ends)}"),
        ("billed calls", f"{sum(outcome.billed.values()):,}, ${outcome.billed_usd}; {_counted(outcome.billed)}"),
        *((name.replace("_", " "), _shown(found)) for name, found in outcome.findings.figures.items()),
        ("seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in outcome.seconds.items())),
    ]


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return everything that was found, as JSON values."""
    fields = asdict(outcome)
    fields["checks"] = [asdict(check) for check in checks_of(outcome)]
    fields["faults"] = [asdict(fault) | {"kind": fault.kind.name.lower()} for fault in outcome.faults]
    return fields


def setting(seconds: int, seed: int) -> str:
    """Say what was measured, on what, and how."""
    names = ", ".join(f"{name} {number}" for name, number in versions().items())
    rhythm = pace(seconds)
    share = sum(ERRORS.model_dump().values())
    clock = "libfaketime" if clock_library() else "time.time replaced"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['cpu']}, {machine()['cores']} cores for workers, Redis and provider "
        f"together; {names}.\n"
        f"Seed {seed}; {WORKERS} workers of {CONCURRENCY} threads; lease {rhythm.lease_seconds:g} s; the provider "
        f"takes {rhythm.latency_seconds:g} s (median) and fails {share:.0%} of all calls; shifted clocks: {clock}."
    )


def _counted(numbers: Any) -> str:
    return "; ".join(f"{name}: {number:,}" for name, number in sorted(numbers.items(), key=lambda item: -item[1]))


def _shown(found: Any) -> str:
    if isinstance(found, dict):
        return _counted(found) or "none"
    return str(found)


def side_by_side(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return all contenders beside each other: a line of headings, and a line for each thing that was counted."""
    lines = [("", *(LABELS[outcome.contender] for outcome in outcomes))]
    columns = [list(_column(outcome)) for outcome in outcomes]
    return lines + [(cells[0][0], *(found for _, found in cells)) for cells in zip(*columns, strict=True)]


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return that for a page."""
    headings, *lines = side_by_side(outcomes)
    cells = [headings, tuple("---" for _ in headings), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _column(outcome: Outcome) -> Iterator[tuple[str, str]]:
    tally, recoveries = outcome.findings.tally, outcome.findings.recoveries
    again = [one.seconds for one in recoveries if one.seconds is not None]
    alone = sum((life.how or "").startswith(BY_ITSELF) for life in outcome.lives)
    yield "jobs accepted", f"{tally.accepted:,}"
    yield "succeeded", f"{tally.succeeded:,}"
    yield "failed", f"{tally.failed:,}"
    yield "ended otherwise", f"{tally.otherwise_ended:,}"
    yield "**not ended**", f"{tally.not_ended:,}"
    yield "**end written more than once**", f"{tally.twice:,}"
    yield "wrong answers", f"{tally.wrong:,}"
    yield "calls or runs beyond the first", f"{tally.extras:,}"
    yield "of these, without a fault that made them unavoidable", f"{tally.extras_unexplained:,}"
    yield "jobs running in workers that were killed", f"{len(recoveries):,}"
    yield "of these, never ran again", f"{len(recoveries) - len(again):,}"
    yield "until they ran again, median", f"{median(again):.1f} s" if again else "-"
    yield "until they ran again, longest", f"{max(again):.1f} s" if again else "-"
    yield "workers that ended by themselves", f"{alone:,}"
