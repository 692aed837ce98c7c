import json
from io import BytesIO

import pytest
from click.testing import CliRunner

from attune_worker.cli import attune
from attune_worker.client import Client
from attune_worker.jobs import Job, JobStatus
from attune_worker.settings import get_settings


@pytest.fixture
def client(settings):
    with Client(settings) as client:
        yield client


@pytest.fixture
def job(invoke, client):
    """Return a function that submits a job and returns what the fleet was given."""

    def submit(*arguments):
        return client.records.read_job(invoke("submit", *arguments).output.strip())

    return submit


def test_submit_prints_the_id_of_a_job_that_is_there(invoke, client):
    """On a line by itself, for scripts; as JSON too."""
    job_id = invoke("submit", "summarize", "A text.").output.strip()
    assert client.status(job_id) is JobStatus.QUEUED
    assert client.records.read_job(job_id).prompt == "A text."
    said = json.loads(invoke("submit", "summarize", "A text.", "--json").output)
    assert client.status(said["job_id"]) is JobStatus.QUEUED


def test_each_field_of_a_job_is_an_option(job):
    """Typed as the job has it; what is not given is not set."""
    given = job(
        *("fix_bug", "x = 1", "--system", "Be brief.", "--workflow", "w", "--stage", "s", "--tier-hint", "premium"),
        *("--provider-hint", "openai", "--max-cost", "0.1", "--max-latency-ms", "9000", "--min-success-rate", "0.5"),
        *("--no-best-effort", "--max-tokens", "50", "--temperature", "0", "--stop", "END", "--stop", "FIN"),
        *("--tenant", "acme", "--user-id", "u", "--session-id", "c", "--idempotency-key", "k", "--priority", "0"),
        *(
            "--deadline-seconds",
            "60.5",
            "--metadata",
            "ticket=4711",
            "--metadata",
            "who=kim",
            "--metadata",
            'a={"b":1}',
        ),
    )
    assert given == Job.parse(
        {
            "task_type": "fix_bug",
            "prompt": "x = 1",
            "system": "Be brief.",
            "workflow": "w",
            "stage": "s",
            "tier_hint": "premium",
            "provider_hint": "openai",
            "max_cost": "0.1",
            "max_latency_ms": 9000,
            "min_success_rate": 0.5,
            "best_effort": False,
            "max_tokens": 50,
            "temperature": 0,
            "stop": ["END", "FIN"],
            "tenant": "acme",
            "user_id": "u",
            "session_id": "c",
            "idempotency_key": "k",
            "priority": 0,
            "deadline_seconds": 60.5,
            "metadata": {"ticket": 4711, "who": "kim", "a": {"b": 1}},
        }
    )
    assert job("fix_bug", "x = 1") == Job(task_type="fix_bug", prompt="x = 1")


def test_every_field_has_an_option():
    """Also one that is added to jobs later."""
    options = {param.name for param in attune.get_command(None, "submit").params}
    assert set(Job.model_fields) - {"messages"} <= options


def test_the_prompt_comes_from_an_argument_a_file_or_standard_input(job, environ, client, tmp_path):
    """As it is, line breaks and all."""
    text = "Zeile 1\nZeile ü\n"
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    assert job("summarize", "--file", str(file)).prompt == text
    get_settings.cache_clear()
    ran = CliRunner(env=environ).invoke(attune, ["submit", "summarize", "-"], input=BytesIO(text.encode()))
    get_settings.cache_clear()
    assert client.records.read_job(ran.stdout.strip()).prompt == text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["summarize"], "give either a PROMPT"),
        (["summarize", " "], "'prompt' is empty"),
        (["summarize", "x", "--model", "nobodys"], "nobodys"),
        (["summarize", "x", "--priority", "12"], "priority"),
        (["summarize", "x", "--max-cost", "1e-20"], "max_cost"),
        (["summarize", "x", "--metadata", "ticket"], "ticket=4711"),
        (["summarize", "x", "--tier-hint", "dear"], "dear"),
        (["summarize", "--file", "/nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_submitted_is_refused_with_code_2(invoke, redis, settings, arguments, told):
    """And nothing is written."""
    shown = invoke("submit", *arguments, code=2).output
    assert told in " ".join(shown.split())
    assert list(redis.scan_iter(f"{{{settings.namespace}:*")) == []


def test_a_file_that_is_no_text_is_refused(invoke, tmp_path):
    """With its name, not a traceback."""
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\xff")
    assert "is not UTF-8" in invoke("submit", "summarize", "--file", str(file), code=2).output


def test_wait_prints_the_answer_or_why_there_is_none(invoke, environ, start_worker):
    """Exit code 1 without an answer; --json has the whole result, also of a job that failed."""
    start_worker(environ, concurrency=4)
    answer = invoke("submit", "summarize", "A text.", "--wait", "--timeout", "30").output
    result = json.loads(invoke("submit", "summarize", "A text.", "--wait", "--timeout", "30", "--json").output)
    assert answer.strip() == result["content"].strip() != ""
    assert (result["status"], result["cost_usd"]) == ("succeeded", result["attempts"][0]["cost_usd"])
    failing = ("submit", "summarize", "A text.", "--max-cost", "0.000000001", "--no-best-effort", "--wait")
    failed = invoke(*failing, "--timeout", "30", code=1).output
    assert "is failed: no_candidate" in failed
    assert json.loads(invoke(*failing, "--timeout", "30", "--json", code=1).output)["status"] == "failed"


def test_a_wait_that_is_too_long_says_that_the_job_goes_on(invoke, client):
    """With its id, and exit code 1."""
    shown = invoke("submit", "summarize", "A text.", "--wait", "--timeout", "0.05", code=1).output
    assert client.status(shown.splitlines()[0]) is JobStatus.QUEUED
    assert "it goes on" in shown
