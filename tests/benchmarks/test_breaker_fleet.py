"""The benchmark of breakers runs everyone through both outages; who does better is for its reader to judge."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "breaker_fleet.py"


def test_quick_run_measures_everyone(tmp_path):
    """Each fleet wastes some calls, and comes back."""
    numbers, table = tmp_path / "measured.json", tmp_path / "table.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(numbers), "--markdown", str(table)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    outcomes = json.loads(numbers.read_text())["outcomes"]
    breakers = {"per process", "pybreaker, Redis", "attune-worker"}
    assert {(found["failing"], found["breaker"]) for found in outcomes} == {
        (failing, breaker) for failing in ("fast", "slow") for breaker in breakers
    }
    for found in outcomes:
        assert found["wasted_calls"] > 0
        assert found["seconds_to_first_success"] > 0
    page = table.read_text()
    assert page.startswith("# How many calls does an outage cost a fleet of 10 workers?\n")
    assert "| slow | attune-worker |" in page
    assert "probes: 1 at most; together 11." in page
    assert page.endswith("--markdown docs/benchmarks/breaker-fleet.md`.\n")
    assert "wasted" in done.stdout
