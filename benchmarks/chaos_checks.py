"""Did the fleet keep its promises? Each check looks at what was found, and says it in a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import median

from chaos_fleet import BY_ITSELF, DID_NOT_END, Life

from attune_worker.jobs import JobStatus

EXAMPLES = 3
"""How many offenders a line names."""

RECOVERY_SECONDS = 20.0
"""Within so long the jobs of a killed worker are to run again."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, whether it was kept, and what was found."""

    promise: str
    kept: bool
    found: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a job that succeeded was given, and what the provider says to its prompt."""

    job_id: str
    content: str | None
    expected: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """A job that ran in a worker when that was killed.

    ``seconds``: until it ran again; None: it never did. ``taken_over_seconds``: until it was free to. ``redis_away``:
    Redis was, at some time in between.
    """

    job_id: str
    worker: str
    seconds: float | None
    redis_away: bool = False
    taken_over_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Extra:
    """A call that was answered, or would have been, although its job made another one too; ``why``, None: unknown."""

    job_id: str
    call_id: str
    why: str | None


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the jobs, in numbers. ``twice``: the end was written more than once; ``extras``: calls or runs."""

    accepted: int
    succeeded: int
    failed: int
    otherwise_ended: int
    not_ended: int
    twice: int
    wrong: int
    extras: int
    extras_unexplained: int

    @classmethod
    def of(
        cls,
        statuses: Mapping[str, JobStatus],
        ends: Mapping[str, int],
        answers: Iterable[Answer],
        extras: Sequence[Extra],
    ) -> Tally:
        """Count it."""
        counted = Counter(statuses.values())
        ended = sum(number for status, number in counted.items() if status.ended)
        succeeded, failed = counted[JobStatus.SUCCEEDED], counted[JobStatus.FAILED]
        return cls(
            accepted=len(statuses),
            succeeded=succeeded,
            failed=failed,
            otherwise_ended=ended - succeeded - failed,
            not_ended=len(statuses) - ended,
            twice=sum(number > 1 for number in ends.values()),
            wrong=sum(answer.content != answer.expected for answer in answers),
            extras=len(extras),
            extras_unexplained=sum(extra.why is None for extra in extras),
        )


def all_ended(statuses: Mapping[str, JobStatus]) -> Check:
    """Every job that was accepted has ended."""
    lost = [job_id for job_id, status in statuses.items() if not status.ended]
    counted = Counter(status.value for status in statuses.values())
    found = ", ".join(f"{number:,} {name}" for name, number in counted.most_common())
    return _check("every accepted job ends", lost, f"{len(statuses):,} accepted: {found}")


def ended_once(statuses: Mapping[str, JobStatus], ends: Mapping[str, int]) -> Check:
    """The end of every job that has ended was written once, by Redis' own journal."""
    wrong = [job_id for job_id, status in statuses.items() if ends.get(job_id, 0) != int(status.ended)]
    unknown = [job_id for job_id, number in ends.items() if number and job_id not in statuses]
    counted = Counter(number for number in ends.values() if number)
    found = ", ".join(f"{jobs:,} jobs with {times}" for times, jobs in sorted(counted.items()))
    return _check("each end is written exactly once", [*wrong, *unknown], found or "no end was written")


def answers_are_right(answers: Sequence[Answer]) -> Check:
    """Every answer is the one that the provider gives to that job's prompt."""
    wrong = [answer.job_id for answer in answers if answer.content != answer.expected]
    return _check("each answer belongs to its prompt", wrong, f"{len(answers):,} answers compared")


def budget_is_kept(limit_usd: Decimal, most_usd: Decimal, billed_usd: Decimal, refused: int) -> Check:
    """Neither the budget's counter nor the provider's bill ever passed the limit, and it was put to the test."""
    found = f"limit ${limit_usd:f}, counted ${most_usd:f} at most, billed ${billed_usd:f}, {refused:,} jobs refused"
    kept = most_usd <= limit_usd and billed_usd <= limit_usd
    return Check("a hard budget is hard", kept and refused > 0, found)


def recovered_in_time(recoveries: Sequence[Recovery]) -> Check:
    """Jobs of killed workers run again in time, whether Redis was there to see it or away for a part of it."""
    late = [one.job_id for one in recoveries if one.seconds is None or one.seconds > RECOVERY_SECONDS]
    promise = f"jobs of a killed worker run again within {RECOVERY_SECONDS:g} s"
    found = recovery_line(recoveries)
    if all(one.redis_away for one in recoveries):
        return Check(promise, kept=False, found=f"not put to the test: {found}")
    return _check(promise, late, found)


def recovery_line(recoveries: Sequence[Recovery]) -> str:
    """Say how many jobs were running in killed workers, and how long it took until they ran again."""
    never = sum(one.seconds is None for one in recoveries)
    parts = [f"{len(recoveries):,} jobs ran in killed workers"]
    for name, away in (("", False), (" where Redis was away meanwhile", True)):
        seconds = [one.seconds for one in recoveries if one.seconds is not None and one.redis_away is away]
        if seconds:
            parts.append(f"median {median(seconds):.1f} s, longest {max(seconds):.1f} s{name} ({len(seconds):,})")
    if taken := [one.taken_over_seconds for one in recoveries if one.taken_over_seconds is not None]:
        parts.append(f"free to run again after {median(taken):.1f} s, longest {max(taken):.1f} s")
    return "; ".join([*parts, f"{never:,} never ran again"] if never else parts)


def extras_are_explained(extras: Sequence[Extra]) -> Check:
    """No call was made twice without a fault that made it unavoidable."""
    unexplained = [extra.job_id for extra in extras if extra.why is None]
    reasons = Counter(extra.why for extra in extras if extra.why is not None)
    found = "; ".join(f"{number:,} {why}" for why, number in reasons.most_common())
    return _check("each call beyond the first has a reason", unexplained, found or "no calls beyond the first")


def workers_end_when_told(lives: Sequence[Life]) -> Check:
    """No worker process ended that was neither killed nor told to, and each that was told to did."""
    wrong = [f"{life.name} ({life.how})" for life in lives if (life.how or "").startswith((BY_ITSELF, DID_NOT_END))]
    return _check("a worker process ends when it is told to, and only then", wrong, f"{len(lives):,} worker processes")


def _check(promise: str, offenders: Iterable[str], found: str) -> Check:
    offending = list(offenders)
    if not offending:
        return Check(promise, kept=True, found=found)
    named = ", ".join(offending[:EXAMPLES]) + (" …" if len(offending) > EXAMPLES else "")
    return Check(promise, kept=False, found=f"{found}; broken for {len(offending):,}: {named}")
