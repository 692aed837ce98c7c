"""The benchmark measures everyone in the same run; who costs how much is for its reader to judge."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def test_quick_run_measures_attune_worker_beside_bare_httpx(tmp_path):
    """Each caller has as many rounds as the other, and the page holds both and a figure."""
    numbers, page = tmp_path / "measured.json", tmp_path / "overhead.md"
    done = run("--caller", "attune", "--json", str(numbers), "--markdown", str(page))
    assert done.returncode == 0, done.stderr

    measured = json.loads(numbers.read_text())
    cases = {case["caller"]: case for case in measured["cases"]}
    assert set(cases) == {"httpx", "attune"}
    for case in cases.values():
        assert len(case["rounds"]) == measured["size"]["rounds"]
        assert all(used["wall_ms"] > 0 for used in case["rounds"])
    assert cases["httpx"]["wall_ratio"] == 1
    assert "| bare httpx " in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 0


def test_caller_that_fails_is_named(tmp_path):
    """A Python without litellm ends the benchmark with the reason, and leaves no traceback of its own."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no litellm here >&2\nexit 1\n")
    python.chmod(0o755)
    done = run("--caller", "litellm", "--litellm-python", str(python))
    assert done.returncode == 1
    assert "litellm Router with Redis has failed" in done.stderr
    assert "no litellm here" in done.stderr
    assert "Traceback" not in done.stderr
