"""Why was a job's call made once more? Each call that was answered in vain has a fault to thank for it, or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chaos_checks import Extra
from chaos_contenders import Seen
from chaos_fleet import Life

from attune_worker.ledger import LedgerRecord
from attune_worker.worker.runner import CLOSE_SECONDS

SERVED = frozenset({"succeeded", "abandoned"})
"""What a bill says of calls that were answered, or would have been had the caller waited."""


@dataclass(frozen=True, slots=True)
class Call:
    """One such call: what the ledger says of it, oldest first, and what became of its worker.

    ``stopped``: its worker stood still at some time after the call was admitted. ``job_crashed``: the job was taken
    over from some worker. ``cut_off``: Redis was away when the worker ended, or shortly before.
    """

    history: Sequence[LedgerRecord]
    life: Life | None
    stopped: bool
    job_crashed: bool
    cut_off: bool = False


def extras(seen: Seen, written: Sequence[LedgerRecord], crashes: Mapping[str, int]) -> Iterator[Extra]:
    """Yield all such calls but the last of each job; ``crashes`` says how often each job was taken over."""
    history: defaultdict[str, list[LedgerRecord]] = defaultdict(list)
    for record in written:
        history[record.call_id].append(record)
    served: defaultdict[str, list[str]] = defaultdict(list)
    for line in sorted(seen.bill, key=lambda line: line["time"]):
        call_id = line["client_request_id"]
        if line["outcome"] in SERVED and call_id in history:
            served[history[call_id][-1].job_id].append(call_id)
    for job_id, call_ids in served.items():
        for call_id in call_ids[:-1]:
            wasted = _call(seen, call_id, history[call_id], job_crashed=crashes.get(job_id, 0) > 0)
            yield Extra(job_id, call_id, reason(wasted))


def _call(seen: Seen, call_id: str, history: Sequence[LedgerRecord], *, job_crashed: bool) -> Call:
    """Find the worker of a call; one that was made while Redis was away is not known to have any."""
    admitted = seen.journal.calls.get(call_id)
    if admitted is None:
        return Call(history, None, stopped=False, job_crashed=job_crashed)
    life = next((life for life in seen.lives if life.pid == pid_of(admitted.lease)), None)
    since = admitted.seconds - seen.clock_seconds
    stopped = life is not None and any(end > since for _, end in life.stops)
    ended = None if life is None else life.ended
    cut_off = ended is not None and seen.redis_was_away(ended - CLOSE_SECONDS, ended)
    return Call(history, life, stopped, job_crashed, cut_off)


def reason(call: Call) -> str | None:
    """Return which fault made another call unavoidable; None: none did."""
    if call.life is None or not call.history:
        return None
    killed, told = call.life.how == "killed", (call.life.how or "").startswith("told")
    last, orphaned = call.history[-1], any(record.outcome == "orphaned" for record in call.history)
    reasons = (
        (orphaned and call.stopped, "under way when their worker was stopped for longer than its lease"),
        (orphaned and killed, "under way when their worker was killed"),
        (orphaned, None),
        (last.error == "stopped" and told, "broken off when their worker was told to end"),
        (last.error == "timeout" and call.stopped, "timed out while their worker was stopped"),
        (last.error == "timeout", "not answered within the timeout"),
        (last.outcome == "succeeded" and call.job_crashed and call.stopped, "answered when their job was elsewhere"),
        (last.outcome == "succeeded" and call.job_crashed and killed, "answered, but their worker was killed at once"),
        (
            last.outcome == "succeeded" and told and call.cut_off,
            "answered, but their worker was told to end without Redis",
        ),
    )
    return next((why for holds, why in reasons if holds), None)


def pid_of(lease: str) -> int:
    """Return the process that a lease names, ``<host>:<pid>:<digits>``; 0 for none."""
    parts = lease.rsplit(":", 2)
    return int(parts[1]) if len(parts) == 3 else 0
