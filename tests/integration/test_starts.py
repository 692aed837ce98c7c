"""Does a job go on that stands as run by a process which does not run it?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from attune_worker.errors import ServiceUnavailableError
from attune_worker.inbox import Inbox
from attune_worker.jobs import Attempt, Job, JobStatus
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import new_job_id
from attune_worker.store.records import Claim, Records
from attune_worker.worker.ends import Ends
from attune_worker.worker.liveness import Lease
from attune_worker.worker.runner import Runner
from attune_worker.worker.starts import STRAY, Starts
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, Until, answer_now

SOON = 60.0
STRAY_SECONDS = 0.2


@pytest.fixture
def runner(settings: Settings) -> Iterator[Runner]:
    with closing(Runner(settings, stray_seconds=STRAY_SECONDS)) as found:
        yield found


def accepted(records: Records) -> str:
    job_id = new_job_id()
    job = Job.parse({"task_type": "summarize", "prompt": "a prompt", "model": "gpt-6-luna"})
    records.accept([(job_id, job, job.to_json())])
    return job_id


def claimed(records: Records, lease: str) -> str:
    """Return a job that nobody runs, and that stands as run under ``lease``."""
    job_id = accepted(records)
    assert isinstance(records.claim(job_id, new_job_id(), lease), Claim)
    return job_id


def test_job_that_its_worker_does_not_run_is_handed_back_and_succeeds(
    runner: Runner, records: Records, until: Until
) -> None:
    """A claim that nobody waited for any more leaves such a job; it costs no worker and no call."""
    first = accepted(records)
    assert runner.run(first).succeeded
    lease = records.read([first])[0].worker
    assert lease is not None
    stray, elsewhere = claimed(records, lease), claimed(records, "another")
    until(lambda: records.read([stray])[0].status is JobStatus.WAITING)
    record = records.read([stray])[0]
    assert (record.reason, record.crashes, record.progress) == (STRAY, 0, ())
    assert records.due_in_seconds(stray) == 0
    result = runner.run(stray)
    assert (result.status, len(result.attempts)) == (JobStatus.SUCCEEDED, 1)
    assert records.read([elsewhere])[0].status is JobStatus.RUNNING


def test_job_that_runs_here_is_left_alone(runner: Runner, records: Records, simulator: Simulator, until: Until) -> None:
    """Though a call takes many looks."""
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": PATIENCE_SECONDS})
    job_id = accepted(records)
    thread = threading.Thread(target=runner.run, args=[job_id])
    thread.start()
    until(lambda: simulator.requests()["in_flight"])
    lease = records.read([job_id])[0].worker
    assert lease is not None
    stray = claimed(records, lease)
    until(lambda: records.read([stray])[0].status is JobStatus.WAITING)
    assert records.read([job_id])[0].status is JobStatus.RUNNING
    answer_now(simulator)
    thread.join(SOON)
    record = records.read([job_id])[0]
    assert (record.status, record.attempts) == (JobStatus.SUCCEEDED, 1)
    assert simulator.invoice(summary=True)["count"] == 1


def test_job_whose_end_is_kept_is_not_handed_back_and_keeps_its_calls(
    settings: Settings, records: Records, until: Until
) -> None:
    """Its answer was paid for and will be written; a job that is handed back takes the calls it made along."""
    call = Attempt(model_id="m", provider="p", tier="cheap", outcome="failed", latency_ms=1, call_id="c")
    inbox, lease = Inbox(settings), Lease(settings)
    lease.start()
    kept, stray = claimed(records, lease.id), claimed(records, lease.id)
    asked: list[tuple[str, str]] = []

    def calls(job_id: str, under: str) -> list[Attempt]:
        asked.append((job_id, under))
        return [call]

    starts = Starts(records, inbox, lease, kept=lambda: {kept}, calls=calls, stray_seconds=STRAY_SECONDS)
    with starts.begin("another"):
        until(lambda: records.read([stray])[0].status is JobStatus.WAITING)
    record, other = records.read([kept, stray])
    assert (record.status, other.progress) == (JobStatus.RUNNING, (call,))
    assert asked == [(stray, lease.id)]
    starts.close()
    lease.stop()
    inbox.close()


def test_ends_tell_whose_they_keep(make_environ: Environ, simulator: Simulator, tmp_path: Path, until: Until) -> None:
    """From the moment that Redis was away until it is written."""
    ends = Ends(patience_seconds=0.0)
    with EmbeddedRedis(tmp_path) as server:
        environ: Any = make_environ(simulator, REDIS_URL=server.url, REDIS_TIMEOUT_SECONDS=1)
        with closing(Records(Settings.load(environ=environ))) as records:
            look: Callable[[], object] = lambda: records.read(["a"])  # noqa: E731
            assert ends.write(look, job_id="written at once") is not None
            server.stop()
            with pytest.raises(ServiceUnavailableError):
                look()
            assert ends.write(look, job_id="kept") is None
            ends.keep(look, job_id="kept")
            assert ends.kept() == {"kept"}
            server.start()
            until(lambda: not ends.kept())
        ends.close(SOON)
