"""Who goes on with the jobs of a worker that died? The others: each job is taken from it and waits, due at once."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice

from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import Attempt, JobStatus
from attune_worker.models.admission import refused
from attune_worker.models.orphans import Orphans
from attune_worker.settings import Settings
from attune_worker.store.leases import Judgement, Leases
from attune_worker.store.records import Records

logger = logging.getLogger(__name__)

LONGEST_JUDGE_SECONDS = 0.5
"""How often is looked who lives; with short leases more often."""

AUDIT_SECONDS = 5.0
"""How often all running jobs are looked at though nobody has died: a sweeper may have died between the two."""

BATCH = 500
"""Running jobs that are looked at in one step."""

TAKE_OVER_BATCH = 100
"""Jobs that are taken over in one step, in a few round trips together; meanwhile nobody sweeps."""

OVERDUE_SECONDS = 10.0
"""How often is looked for calls that no job's worker will settle."""

OVERDUE_BATCH = 100


class Recovery:
    """Takes the jobs of dead workers over, for whichever worker leads the sweep.

    Every step may be cut off and done again, by another worker too. A job is taken from a lease that was seen gone
    after the job was seen running under it; such a lease never holds again, however much later the job is taken.
    """

    def __init__(self, settings: Settings, *, audit_seconds: float = AUDIT_SECONDS) -> None:
        self._leases = Leases(settings)
        self._records = Records(settings)
        self._orphans = Orphans(settings)
        self._lease_seconds = settings.recovery.lease_seconds
        self._audit_seconds = audit_seconds
        self._judge_seconds = min(LONGEST_JUDGE_SECONDS, self._lease_seconds / 4)
        self._audit: Iterator[tuple[str, str]] | None = None
        self._audit_at = time.monotonic()
        self._lost: deque[tuple[str, str]] = deque()
        self._jobs_of: Counter[str] = Counter()

    def step(self) -> float:
        """Do a bounded part of the work, and return for how many seconds to leave it at that.

        Raises ``ServiceUnavailableError`` when Redis is away; what was left undone is found again.
        """
        running = self._look_on()
        judgement = self._leases.judge(self._lease_seconds)  # after it: see the class
        for lease in judgement.died:
            self._jobs_of[lease] += 0
            self._audit_at = 0.0
        self._lost.extend((job_id, lease) for job_id, lease in running if lease not in judgement.live)
        self._take_over_some(judgement)
        if self._lost or self._audit is not None or self._audit_at <= time.monotonic():
            return 0.0
        self._report()
        return self._judge_seconds

    def settle_overdue(self) -> float:
        """Settle some of the calls whose callers died without a lease of a worker's, and return as ``step``."""
        return 0.0 if self._orphans.overdue(OVERDUE_BATCH) >= OVERDUE_BATCH else OVERDUE_SECONDS

    def close(self) -> None:
        """Give the connections back."""
        self._leases.close()
        self._records.close()
        self._orphans.close()

    def _look_on(self) -> list[tuple[str, str]]:
        """Return the next running jobs and their leases, if it is time to look at them."""
        if self._lost:
            return []
        if self._audit is None and self._audit_at <= time.monotonic():
            self._audit_at = time.monotonic() + self._audit_seconds
            self._audit = self._records.running()
        if self._audit is None:
            return []
        audit, self._audit = self._audit, None  # an error ends it
        running = list(islice(audit, BATCH))
        self._audit = audit if running else None
        return running

    def _take_over_some(self, judgement: Judgement) -> None:
        lost = [self._lost.popleft() for _ in range(min(TAKE_OVER_BATCH, len(self._lost)))]
        if not lost:
            return
        try:
            self._take_over(lost, judgement)
        except ServiceUnavailableError as error:
            if not refused(error):
                raise  # what was left undone is found again by the next audit
            for one in lost:  # one of them is to blame; twice is once for the others
                self._take_over_alone(one, judgement)

    def _take_over_alone(self, lost: tuple[str, str], judgement: Judgement) -> None:
        try:
            self._take_over([lost], judgement)
        except ServiceUnavailableError as error:
            if not refused(error):
                raise
            logger.exception("job %s of lost worker %s cannot be taken over", *lost)

    def _take_over(self, lost: Sequence[tuple[str, str]], judgement: Judgement) -> None:
        calls = self._orphans.of_jobs(lost)
        records = self._records.read([job_id for job_id, _ in lost])
        histories = [history(record.progress, own) for record, own in zip(records, calls, strict=True)]
        statuses = self._records.take_over_all(
            [
                (job_id, lease, attempts, _evidence(lease, attempts, judgement))
                for (job_id, lease), attempts in zip(lost, histories, strict=True)
            ]
        )
        for (job_id, lease), status in zip(lost, statuses, strict=True):
            self._jobs_of[lease] += status is not None
            if status is JobStatus.DEAD:
                logger.error("job %s is dead: too many workers were lost while they ran it, %s the last", job_id, lease)

    def _report(self) -> None:
        for lease, jobs in self._jobs_of.items():
            logger.warning("worker %s was lost; %d of its jobs were taken over", lease, jobs)
        self._jobs_of.clear()


def history(known: Sequence[Attempt], calls: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """Return a job's attempts: its record's, and what its ``calls`` tell of them and of those after them.

    What became of a call may be told later than its record was written; how its model was chosen only the record has.
    """
    recorded = {attempt.call_id: attempt for attempt in known}
    told = {call.call_id for call in calls}
    return (
        *(attempt for attempt in known if attempt.call_id not in told),
        *(
            call.model_copy(update={"decision": recorded[call.call_id].decision}) if call.call_id in recorded else call
            for call in calls
        ),
    )


def _evidence(lease: str, attempts: tuple[Attempt, ...], judgement: Judgement) -> str:
    """Return what an operator should know of a worker that was lost with a job, in one line."""
    calls = [f"{attempt.provider}/{attempt.model_id}" for attempt in attempts if attempt.outcome == "orphaned"]
    latest = f"latest call that it did not live to see answered: {calls[-1]}" if calls else "no call was open"
    return f"{judgement.at:%Y-%m-%dT%H:%M:%SZ} worker {lease} was lost; {latest}"
