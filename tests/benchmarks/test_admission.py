"""The benchmark measures all it promises; limits hold in it as in every run, however slow the machine is."""

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_quick_run_counts_two_commands_and_no_overshoot(tmp_path):
    """ADMIT and SETTLE are one command each, and neither the budget nor the rate is passed."""
    numbers, page = tmp_path / "measured.json", tmp_path / "admission.md"
    command = [sys.executable, str(BENCHMARKS / "admission.py"), "--quick"]
    command += ["--json", str(numbers), "--markdown", str(page)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    measured = json.loads(numbers.read_text())
    assert measured["commands"]["sent"] == 2
    assert [cost["workers"] for cost in measured["costs"]] == measured["size"]["workers"]
    assert all(0 < cost["p50_us"] <= cost["p99_us"] for cost in measured["costs"])
    assert [one["calls"] for one in measured["decisions"]] == measured["size"]["histories"]
    assert measured["overshoot"] == {"budget_usd": "0", "requests": 0}
    budget = measured["budget"]
    assert Decimal(budget["spent_usd"]) == Decimal(budget["counted_usd"]) > 0
    assert measured["rate"]["calls"] > 0
    assert "| a hard budget |" in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 0
