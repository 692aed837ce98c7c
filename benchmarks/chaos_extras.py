"""Why was a job's call made once more? Each call that was answered in vain has a fault to thank for it, or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from chaos_checks import RECOVERY_SECONDS, Extra
from chaos_contenders import Seen
from chaos_fleet import Life

from attune_worker.jobs import JobStatus
from attune_worker.ledger_record import LedgerRecord
from attune_worker.models.admission import LONGEST_OUTAGE_WAIT_SECONDS
from attune_worker.store.record import Record
from attune_worker.worker.runner import CLOSE_SECONDS

SERVED = frozenset({"succeeded", "abandoned"})
"""What a bill says of calls that were answered, or would have been had the caller waited."""

FINISH_SECONDS = 2.0
"""A job's end is written so soon after its call is settled, if Redis is there."""

EVIDENCE_SECONDS = 1.0
"""How exact the time is that a job's record gives for the loss of a worker."""


@dataclass(frozen=True, slots=True)
class Call:
    """One such call: what the ledger says of it, oldest first, and what became of its worker.

    Times are in seconds, monotonic. ``began``: when it was admitted. ``settled``: when its last record was written.
    ``lost``: when it was taken for orphaned, or its job was taken from its worker; None: neither happened.
    """

    history: Sequence[LedgerRecord]
    life: Life | None
    began: float
    settled: float
    lost: float | None


@dataclass(frozen=True, slots=True)
class Faults:
    """What hit the whole fleet: when Redis was away."""

    away: Sequence[tuple[float, float]]

    def run_out(self, since: float, at: float) -> bool:
        """Whether a lease that nobody renewed from ``since`` on may have been found run out ``at`` this moment.

        Not long after; while Redis is away nobody looks, and the last renewal may come right after it.
        """
        by = since + RECOVERY_SECONDS
        for start, end in sorted(self.away):
            if start < by and end > since:
                by = max(by, end + RECOVERY_SECONDS)
        return since <= at <= by

    def kept_end(self, settled: float, until: float) -> bool:
        """Whether the end of a job may still have been unwritten at ``until``, though its call was settled before."""
        if until <= settled + FINISH_SECONDS:
            return True
        waited = until - FINISH_SECONDS - LONGEST_OUTAGE_WAIT_SECONDS
        return any(start < settled + FINISH_SECONDS and end > waited for start, end in self.away)

    def cut_off(self, ended: float) -> bool:
        """Whether Redis was away when a worker ended, or shortly before, so that it could write down no end."""
        return any(start < ended and end > ended - CLOSE_SECONDS for start, end in self.away)


def extras(seen: Seen, written: Sequence[LedgerRecord], records: Mapping[str, Record]) -> Iterator[Extra]:
    """Yield all such calls but one of each job: that which gave its answer, or the last where it has none."""
    faults = Faults(seen.away)
    history: defaultdict[str, list[LedgerRecord]] = defaultdict(list)
    for record in written:
        history[record.call_id].append(record)
    served: defaultdict[str, list[str]] = defaultdict(list)
    for line in sorted(seen.bill, key=lambda line: line["time"]):
        call_id = line["client_request_id"]
        if line["outcome"] in SERVED and call_id in history:
            served[history[call_id][-1].job_id].append(call_id)
    for job_id, call_ids in served.items():
        used = _answering(records[job_id]) or call_ids[-1]
        for call_id in call_ids:
            if call_id != used:
                wasted = _call(seen, call_id, history[call_id], records[job_id].lost)
                yield Extra(job_id, call_id, reason(wasted, faults))


def _answering(record: Record) -> str | None:
    """Return the call that a job has its answer from."""
    result = record.to_result()
    return result.attempts[-1].call_id if result.status is JobStatus.SUCCEEDED and result.attempts else None


def _call(seen: Seen, call_id: str, history: Sequence[LedgerRecord], evidence: Sequence[str]) -> Call:
    """Find the worker of a call, and when it was lost; one without an intent has none, and nothing explains it."""

    def monotonic(moment: datetime) -> float:
        return moment.timestamp() - seen.clock_seconds

    began, settled = monotonic(history[-1].time), monotonic(history[-1].written)
    admitted = seen.journal.calls.get(call_id)
    if admitted is None:
        return Call(history, None, began, settled, None)
    life = next((life for life in seen.lives if life.pid == pid_of(admitted.lease)), None)
    lost = [monotonic(record.written) for record in history if record.outcome == "orphaned"]
    lost += [monotonic(at) + EVIDENCE_SECONDS for at in _losses(evidence, admitted.lease)]
    return Call(history, life, began, settled, lost[0] if lost else None)


def _losses(evidence: Sequence[str], lease: str) -> Iterator[datetime]:
    """Yield when a job was taken from a lease, by the lines that its record keeps."""
    for line in evidence:
        at, _, what = line.partition(" ")
        if what.startswith(f"worker {lease} was lost"):
            yield datetime.fromisoformat(at)


def reason(call: Call, faults: Faults) -> str | None:
    """Return which fault made another call unavoidable, at the time when that call was made; None: none did."""
    if call.life is None or not call.history:
        return None
    last, orphaned = call.history[-1], any(record.outcome == "orphaned" for record in call.history)
    stopped, killed = _lost_by_stop(call, call.life, faults), _lost_by_kill(call, call.life, faults)
    answered, cut_off = last.outcome == "succeeded", _lost_without_redis(call, call.life, faults)
    stood_still = call.life.was_stopped(call.began, call.settled)
    reasons = (
        (orphaned and stopped, "under way when their worker was stopped for longer than its lease"),
        (orphaned and killed, "under way when their worker was killed"),
        (orphaned and cut_off, "under way when their worker was told to end without Redis"),
        (orphaned, None),
        (last.error == "stopped" and _told(call, call.life), "broken off when their worker was told to end"),
        (last.error == "timeout" and stood_still, "timed out while their worker was stopped"),
        (last.error == "timeout", "not answered within the timeout"),
        (answered and stopped, "answered when their job was elsewhere"),
        (answered and killed, "answered, but their worker was killed at once"),
        (answered and cut_off, "answered, but their worker was told to end without Redis"),
    )
    return next((why for holds, why in reasons if holds), None)


def _lost_by_stop(call: Call, life: Life, faults: Faults) -> bool:
    """Whether its worker stood still during the call, or before its job's end was written, and was lost by that."""
    return call.lost is not None and any(
        end > call.began and faults.kept_end(call.settled, start) and faults.run_out(start, call.lost)
        for start, end in life.stops
    )


def _lost_by_kill(call: Call, life: Life, faults: Faults) -> bool:
    """Whether its worker was killed during the call, or before its job's end was written, and was lost by that."""
    if life.how != "killed" or life.ended is None or call.lost is None:
        return False
    return faults.kept_end(call.settled, life.ended) and faults.run_out(life.ended, call.lost)


def _lost_without_redis(call: Call, life: Life, faults: Faults) -> bool:
    """Whether its worker was told to end during the call, or shortly after, and could not say what became of it."""
    if life.told is None or life.ended is None or call.lost is None or not faults.cut_off(life.ended):
        return False
    seen_gone = max(call.lost, life.ended)  # a lease that is given up is gone before the process is
    return (
        call.lost >= life.told and faults.kept_end(call.settled, life.ended) and faults.run_out(life.ended, seen_gone)
    )


def _told(call: Call, life: Life) -> bool:
    """Whether the call ended between the signal to its worker and the end of that."""
    return life.told is not None and life.ended is not None and life.told <= call.settled <= life.ended


def pid_of(lease: str) -> int:
    """Return the process that a lease names, ``<host>:<pid>:<digits>``; 0 for none."""
    parts = lease.rsplit(":", 2)
    return int(parts[1]) if len(parts) == 3 else 0
