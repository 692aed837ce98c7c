import json
import re
from uuid import uuid4

import pytest

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.jobs import Attempt, JobError, JobResult, JobStatus
from attune_worker.wake_ups import messages_waiting
from tests.examples.stack import ROOT

PROMPT, ANSWER, USER = "zebra-crossing-4711", "okapi-answer-0815", "user-of-this-job"
ESCAPE = "\x1b[2J"

LISTED = {
    "job_id", "status", "accepted_at", "started_at", "ended_at", "due_at", "deadline_at", "starts", "crashes", "worker",
    "reason", "model_id", "provider", "tier", "cost_usd", "cost_is_complete", "error_type",
}  # fmt: skip
SHOWN = LISTED | {"usage", "latency_ms", "queue_ms", "finish_reason", "attempts", "error", "lost", "job"}


def attempt(cost="0.000120000", **fields):
    known = {"model_id": "claude-haiku-5-5", "provider": "anthropic", "tier": "cheap", "latency_ms": 12}
    return Attempt(**{**known, "outcome": "succeeded", "cost_usd": cost, **fields})


@pytest.fixture
def client(settings):
    """Submit jobs, and play the worker for them."""
    with Client(settings) as found:
        yield found


@pytest.fixture
def submit(client):
    """Return a function that submits one job and returns its id; no worker is there to take it."""

    def one(**fields):
        given = {"task_type": "summarize", "workflow": "nightly", "metadata": {"k": PROMPT}, "user_id": USER}
        return client.submit(prompt=PROMPT, system=PROMPT, **given, **fields).id

    return one


@pytest.fixture
def claim(records):
    """Return a function that starts a job as a worker with this lease would."""
    return lambda job_id, lease="host:1:aaaa": records.claim(job_id, uuid4().hex, lease)


@pytest.fixture
def succeeded(records, submit, claim):
    """A job with an answer."""
    job_id = submit()
    told = {"content": ANSWER, "model_id": "claude-haiku-5-5", "provider": "anthropic", "tier": "cheap"}
    calls = (attempt(None, outcome="failed", error_type="timeout"), attempt())
    result = JobResult(job_id=job_id, status="succeeded", attempts=calls, cost_usd="0.000120000", **told)
    records.finish(claim(job_id).fence, result)
    return job_id


@pytest.fixture
def failed(records, submit, claim):
    """A job without an answer, whose error would clear a terminal."""
    job_id = submit()
    error = JobError(type="bad_request", message=f"the provider said {ESCAPE}")
    records.finish(claim(job_id).fence, JobResult(job_id=job_id, status="failed", error=error))
    return job_id


@pytest.fixture
def dead(records, submit, claim):
    """A job that three workers were lost with."""
    job_id = submit()
    for number in range(3):
        lease = f"host:{number}:dead"
        claim(job_id, lease)
        records.take_over(job_id, lease, (attempt(None, outcome="orphaned"),), f"{lease} {ESCAPE} was lost")
    assert records.read([job_id])[0].status is JobStatus.DEAD
    return job_id


@pytest.fixture
def messages(settings):
    """Return a function that counts the wake-ups in the queue."""
    with make_app(settings) as app:
        yield lambda: messages_waiting(app)


def test_the_list_has_jobs_of_every_state(invoke, submit, claim, records, succeeded, failed, dead):
    """What is under way comes first; each line says where its job is, what it cost, and why."""
    waits = submit()
    records.put_back(waits, claim(waits).fence, 60, f"all models rest {ESCAPE}", ())
    runs, queued = submit(deadline_seconds=600), submit()
    claim(runs, "host:7:bbbb")
    told = {one["job_id"]: one for one in json.loads(invoke("jobs", "list", "--json").stdout)}
    assert {job_id: one["status"] for job_id, one in told.items()} == {
        runs: "running", waits: "waiting", queued: "queued", succeeded: "succeeded", failed: "failed", dead: "dead",
    }  # fmt: skip
    assert list(told)[:3] == [runs, waits, queued]
    assert all(set(one) == LISTED for one in told.values())
    assert (told[runs]["worker"], told[runs]["starts"]) == ("host:7:bbbb", 1)
    assert told[runs]["deadline_at"] > told[runs]["accepted_at"]
    assert told[waits]["due_at"] > told[waits]["started_at"]
    assert (told[succeeded]["cost_usd"], told[succeeded]["cost_is_complete"]) == ("0.000120000", False)
    assert (told[dead]["crashes"], told[dead]["error_type"], told[dead]["cost_usd"]) == (3, "poison", None)
    shown = invoke("jobs", "list").stdout
    assert all(job_id in shown for job_id in told)
    assert "≥0.000120000" in shown
    assert r"all models rest \x1b[2J" in shown
    assert "known when its start has ended" in invoke("jobs", "show", runs).stdout
    assert ESCAPE not in shown


def test_the_list_says_why_a_job_waits_and_not_only_for_which_model(invoke, submit, claim, records):
    """The long name of a model does not push out what holds the job up; ``--json`` has all of it."""
    reason = "anthropic/claude-haiku-5-5-20261001: its circuit is open"
    waits = submit()
    records.put_back(waits, claim(waits).fence, 60, reason, ())
    assert "its circuit is open" in invoke("jobs", "list", "--status", "waiting").stdout
    assert json.loads(invoke("jobs", "list", "--json").stdout)[0]["reason"] == reason


@pytest.mark.parametrize("status", ["queued", "dead", "failed", "succeeded"])
def test_the_list_can_be_of_one_state(invoke, submit, succeeded, failed, dead, status):
    """``--status`` leaves the others out."""
    ids = {"queued": submit(), "succeeded": succeeded, "failed": failed, "dead": dead}
    told = json.loads(invoke("jobs", "list", "--status", status, "--json").stdout)
    assert [one["job_id"] for one in told] == [ids[status]]


def test_the_list_is_as_short_as_asked_for(invoke, submit):
    """``--limit`` counts jobs; an empty list is said in words."""
    assert invoke("jobs", "list").stdout == "no jobs\n"
    assert invoke("jobs", "list", "--status", "dead").stdout == "no job is dead\n"
    for _ in range(5):
        submit()
    assert len(json.loads(invoke("jobs", "list", "--limit", "3", "--json").stdout)) == 3
    assert "0" in invoke("jobs", "list", "--limit", "0", code=2).output


def test_a_job_is_shown_with_its_calls_and_without_its_contents(invoke, succeeded):
    """State, times, calls and cost, for a reader and for a program; no prompt, no answer, no user."""
    told = json.loads(invoke("jobs", "show", succeeded, "--json").stdout)
    assert set(told) == SHOWN
    assert (told["status"], told["cost_usd"], told["starts"]) == ("succeeded", "0.000120000", 1)
    assert [one["outcome"] for one in told["attempts"]] == ["failed", "succeeded"]
    shown = invoke("jobs", "show", succeeded).stdout
    assert "≥0.000120000" in shown
    assert "timeout" in shown
    for text in (shown, json.dumps(told)):
        assert not any(secret in text for secret in (PROMPT, ANSWER, USER))


def test_contents_are_shown_when_asked_for(invoke, submit, succeeded):
    """Prompt and system of a job under way, and the answer of one that has it."""
    waiting = submit()
    shown = invoke("jobs", "show", waiting, "--content").stdout
    assert shown.count(PROMPT) == 3
    assert USER in shown
    told = json.loads(invoke("jobs", "show", waiting, "--content", "--json").stdout)
    assert (told["job"]["prompt"], told["job"]["metadata"], told["content"]) == (PROMPT, {"k": PROMPT}, None)
    assert ANSWER in invoke("jobs", "show", succeeded, "--content").stdout
    assert json.loads(invoke("jobs", "show", succeeded, "--content", "--json").stdout)["content"] == ANSWER


def test_what_was_submitted_is_shown_without_what_it_says(invoke, submit):
    """Task, workflow and wishes are no secret."""
    job_id = submit(tenant="acme", priority=2)
    shown = invoke("jobs", "show", job_id).stdout
    assert "summarize" in shown
    assert "tenant acme" in shown
    assert not any(secret in shown for secret in (PROMPT, USER))
    told = json.loads(invoke("jobs", "show", job_id, "--json").stdout)["job"]
    assert (told["workflow"], told["priority"]) == ("nightly", 2)
    assert not {"prompt", "messages", "system", "metadata", "user_id", "session_id", "stop"} & set(told)


def test_a_dead_job_is_shown_with_the_workers_that_were_lost(invoke, dead):
    """Each of the three is named, as is the call that nobody heard the end of."""
    told = json.loads(invoke("jobs", "show", dead, "--json").stdout)
    assert (told["crashes"], told["error"]["type"]) == (3, "poison")
    assert [line.split()[0] for line in told["lost"]] == ["host:0:dead", "host:1:dead", "host:2:dead"]
    shown = invoke("jobs", "show", dead).stdout
    assert all(f"host:{number}:dead" in shown for number in range(3))
    assert "orphaned" in shown
    assert "$?" in shown
    assert ESCAPE not in shown


def test_a_record_that_cannot_be_read_is_shown_as_far_as_it_can(invoke, redis, keys, succeeded, submit):
    """A garbled result or job does not hide the rest."""
    redis.hset(keys(succeeded).record, "result", "{")
    assert "cannot be read" in invoke("jobs", "show", succeeded).stdout
    assert succeeded in invoke("jobs", "list").stdout
    strange = submit()
    redis.hset(keys(strange).record, "job", '{"v":99}')
    assert "upgrade" in invoke("jobs", "show", strange).stdout


def test_an_unknown_job_is_an_error(invoke):
    """Exit code 1, with what it can mean."""
    assert "no job 'nope'" in invoke("jobs", "show", "nope", code=1).output


def test_cancel_says_what_became_of_each(invoke, submit, claim, succeeded):
    """One that waits is cancelled, one that runs will be; one that has its answer keeps it, and the exit code is 1."""
    queued, running = submit(), submit()
    claim(running)
    assert invoke("jobs", "cancel", queued, running).stdout.splitlines() == [
        f"{queued}: cancelled",
        f"{running}: is being cancelled",
    ]
    told = json.loads(invoke("jobs", "cancel", queued, succeeded, "nope", "--json", code=1).stdout)
    assert [(one["status"], one["cancelled"]) for one in told] == [
        ("cancelled", True), ("succeeded", False), ("unknown", False),
    ]  # fmt: skip
    assert "is being cancelled" in invoke("jobs", "show", running).stdout


def test_dead_jobs_are_listed_with_their_evidence(invoke, dead):
    """Who was lost is what decides whether to try again."""
    shown = invoke("jobs", "dead").stdout
    assert f"{dead}: dead since" in shown
    assert shown.count(r"\x1b[2J was lost") == 3
    assert ESCAPE not in shown
    [told] = json.loads(invoke("jobs", "dead", "--json").stdout)
    assert set(told) == LISTED | {"lost"}
    assert len(told["lost"]) == 3


def test_all_dead_jobs_can_be_run_again(invoke, records, dead, messages):
    """They are queued as new, and workers are told; with none left that is said."""
    before = messages()
    assert invoke("jobs", "dead", "--retry").stdout == f"{dead}: was dead, is queued again\n"
    [record] = records.read([dead])
    assert (record.status, record.crashes, record.lost) == (JobStatus.QUEUED, 0, ())
    assert messages() == before + 1
    assert invoke("jobs", "dead").stdout == "no job is dead\n"
    assert invoke("jobs", "dead", "--retry").stdout == "no job is dead\n"
    assert json.loads(invoke("jobs", "dead", "--retry", "--json").stdout) == []


def test_retry_takes_what_ended_without_an_answer(invoke, records, submit, succeeded, failed, messages):
    """A failed job is queued and woken; what is under way or has its answer is left alone: exit code 1."""
    under_way = submit()
    before = messages()
    told = json.loads(invoke("jobs", "retry", failed, succeeded, under_way, "nope", "--json", code=1).stdout)
    assert [(one["was"], one["retried"]) for one in told] == [
        ("failed", True), ("succeeded", False), ("queued", False), ("unknown", False),
    ]  # fmt: skip
    assert records.read([failed])[0].status is JobStatus.QUEUED
    assert messages() == before + 1
    assert invoke("jobs", "retry", failed, code=1).stdout == f"{failed}: queued\n"


def test_a_retried_job_runs(invoke, environ, client, failed, start_worker):
    """The command is all that it takes."""
    invoke("jobs", "retry", failed)
    start_worker(environ)
    assert client.result(failed, timeout=60).succeeded


def test_the_fields_of_the_json_are_documented():
    """Whoever reads them in a program finds each in the page."""
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs/howto/inspect-jobs.md").read_text()))
    assert {*SHOWN, "was", "retried", "cancelled", "content"} <= named


@pytest.mark.parametrize(
    "arguments", [["list"], ["show", "x"], ["cancel", "x"], ["dead"], ["dead", "--retry"], ["retry", "x"]], ids=" ".join
)
def test_without_redis_every_command_says_so(invoke, arguments):
    """Exit code 3, one line, no traceback."""
    ran = invoke("jobs", *arguments, code=3, REDIS_URL="redis://:hush@127.0.0.1:1/0")
    assert "cannot be reached" in ran.output
    assert "hush" not in ran.output
