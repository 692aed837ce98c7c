import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from attune_worker.local import simulated_providers
from attune_worker.simulator import FixedLatency, Profile, Simulator

COMMAND = [sys.executable, "-m", "attune_worker"]


@pytest.fixture
def simulator():
    """A provider that takes a moment, so that a run can be interrupted."""
    with Simulator(Profile(latency=FixedLatency(seconds=0.05))) as running:
        yield running


@pytest.fixture
def environ(simulator):
    """An environment with no Redis configured, and the simulator as provider."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTUNE_")}
    return clean | simulated_providers(simulator.url, simulator.openai_url)


def write_jobs(path: Path, count: int) -> Path:
    """Write a file of jobs."""
    lines = [{"id": f"job-{n}", "task_type": "summarize", "prompt": f"Text number {n}."} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(environ, *arguments, **options):
    """Run ``attune-worker run`` to its end."""
    return subprocess.run(
        [*COMMAND, "run", *map(str, arguments)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def results_of(path: Path):
    """Return the lines of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupt(environ, jobs: Path, out: Path, after: int, how: signal.Signals) -> subprocess.Popen:
    """Start a run, send it a signal after some results, and see that all it started ends."""
    log = out.with_suffix(".log")
    with log.open("wb") as told:
        process = subprocess.Popen(
            [*COMMAND, "run", str(jobs), "-o", str(out), "--local", "2"],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=told,
        )
    ends = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= after):
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(how)
    process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "what the run had started must end with it"
    return process


def test_a_thousand_jobs_survive_ctrl_c(environ, simulator, tmp_path):
    """Interrupted and run again: one result for each line, no id twice, and no call paid for twice."""
    jobs, out = write_jobs(tmp_path / "jobs.jsonl", 1000), tmp_path / "results.jsonl"
    process = interrupt(environ, jobs, out, 200, signal.SIGINT)
    assert process.returncode == 130, out.with_suffix(".log").read_text()
    assert len(results_of(out)) < 1000
    again = run(environ, jobs, "-o", out, "--local", 2)
    assert again.returncode == 0, again.stderr
    results = results_of(out)
    assert len(results) == 1000
    assert {entry["id"] for entry in results} == {f"job-{n}" for n in range(1000)}
    assert {entry["status"] for entry in results} == {"succeeded"}
    assert simulator.invoice(summary=True)["count"] == 1000


def test_a_run_that_is_killed_loses_and_repeats_no_result(environ, tmp_path):
    """After kill -9 the next run does what is missing; Redis and workers have gone with the first."""
    jobs, out = write_jobs(tmp_path / "jobs.jsonl", 300), tmp_path / "results.jsonl"
    interrupt(environ, jobs, out, 50, signal.SIGKILL)
    assert run(environ, jobs, "-o", out, "--local", 2).returncode == 0
    assert Counter(entry["id"] for entry in results_of(out)) == Counter(f"job-{n}" for n in range(300))


def test_a_run_with_nothing_missing_starts_nothing(environ, simulator, tmp_path):
    """It says so and leaves the file as it is."""
    jobs, out = write_jobs(tmp_path / "jobs.jsonl", 3), tmp_path / "results.jsonl"
    assert run(environ, jobs, "-o", out, "--local", 1).returncode == 0
    before = out.read_bytes()
    again = run(environ, jobs, "-o", out, "--local", 1)
    assert again.returncode == 0
    assert "nothing was missing" in again.stderr
    assert out.read_bytes() == before
    assert simulator.invoice(summary=True)["count"] == 3


def test_bad_lines_are_reported_with_their_numbers_while_the_good_ones_run(environ, tmp_path):
    """Exit code 1, and a result line for every input line."""
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    jobs.write_text(
        '{"id": "good", "task_type": "summarize", "prompt": "Fine."}\n'
        "nonsense\n"
        '{"id": "typo", "task_type": "summarize", "promt": "x"}\n'
        '{"id": "model", "task_type": "summarize", "prompt": "x", "model": "claude-haiku-55"}\n'
    )
    ran = run(environ, jobs, "-o", out, "--local", 1, "--json")
    assert ran.returncode == 1
    assert "line 2: not JSON" in ran.stderr
    assert "line 3: 'promt': unknown field" in ran.stderr
    assert "line 4: 'model': no model 'claude-haiku-55' is configured; did you mean 'claude-haiku-5-5'" in ran.stderr
    assert json.loads(ran.stdout)["statuses"] == {"invalid": 3, "succeeded": 1}
    assert sorted((entry["line"], entry["status"]) for entry in results_of(out)) == [
        (1, "succeeded"),
        (2, "invalid"),
        (3, "invalid"),
        (4, "invalid"),
    ]


def test_jobs_that_failed_are_done_again_on_request(environ, simulator, tmp_path):
    """Without ``--retry-failed`` a failed line counts as done."""
    jobs, out = write_jobs(tmp_path / "jobs.jsonl", 4), tmp_path / "results.jsonl"
    simulator.profile = Profile.parse({"errors": {"bad_request": 1.0}})
    failed = run(environ, jobs, "-o", out, "--local", 1)
    assert failed.returncode == 1
    assert "4 failed" in failed.stderr
    simulator.profile = Profile()
    again = run(environ, jobs, "-o", out, "--local", 1)
    assert again.returncode == 1
    assert "nothing was missing" in again.stderr
    assert "4 lines failed before" in again.stderr
    assert run(environ, jobs, "-o", out, "--local", 1, "--retry-failed").returncode == 0
    assert [entry["status"] for entry in results_of(out)] == ["succeeded"] * 4


def test_results_are_not_written_over_the_jobs(environ, tmp_path):
    """The jobs stay as they are, and the exit code is 2."""
    jobs = write_jobs(tmp_path / "jobs.jsonl", 2)
    before = jobs.read_bytes()
    ran = run(environ, jobs, "-o", jobs, "--local", 1)
    assert ran.returncode == 2
    assert jobs.read_bytes() == before


def test_lines_that_share_a_key_share_a_job_and_its_cost(environ, simulator, tmp_path):
    """Two result lines, one call, and its cost counted once."""
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    line = {"task_type": "summarize", "prompt": "Twice.", "idempotency_key": "once"}
    jobs.write_text("\n".join(json.dumps({"id": name, **line}) for name in (1, "two")))
    ran = run(environ, jobs, "-o", out, "--local", 1, "--json")
    assert ran.returncode == 0, ran.stderr
    assert [entry["id"] for entry in results_of(out)] == [1, "two"]
    assert json.loads(ran.stdout)["cost_usd"] == simulator.invoice()["total_usd"]


def test_a_configured_redis_that_is_away_is_not_replaced(environ, tmp_path):
    """Exit code 3, with the URL but not its password, and what to do."""
    jobs, out = write_jobs(tmp_path / "jobs.jsonl", 1), tmp_path / "results.jsonl"
    ran = run({**environ, "ATTUNE_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0"}, jobs, "-o", out, "--local", 1)
    assert ran.returncode == 3
    assert "redis://:***@127.0.0.1:1/0 cannot be reached" in ran.stderr
    assert "hunter2" not in ran.stderr + ran.stdout
