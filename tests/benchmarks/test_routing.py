"""The routing benchmark runs every rule in every world; how good they are is for its reader to judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "routing.py"


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    options = ["--quick", "--json", str(folder / "routing.json")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "routing.json").read_text())


def test_made_up_data_is_called_so(benchmark):
    """Without recorded answers it says so, to the reader and in the numbers."""
    done, measured = benchmark
    assert "No --data" in done.stderr
    assert not any(case["real_data"] for case in measured["cases"])


def test_every_rule_is_measured_in_every_world(benchmark):
    """Each world has the same rules, with shares for numbers; always-premium costs what it costs."""
    _, measured = benchmark
    cases = {(case["world"], case["rule"]): case for case in measured["cases"]}
    worlds, rules = {world for world, _ in cases}, {rule for _, rule in cases}
    assert worlds == {"synthetic", "degrades", "cheaper", "newcomer"}
    assert len(cases) == len(worlds) * len(rules)
    for case in cases.values():
        assert 0 < case["success"] <= 1
        assert case["cost"] > 0
        assert 0 <= case["shortfall"] < 1
    for world in worlds:
        assert cases[world, "always premium"]["cost"] == pytest.approx(1)
        assert cases[world, "oracle"]["shortfall"] == pytest.approx(0)


def test_the_rule_that_ships_is_between_the_extremes(benchmark):
    """On stages like MMLU's it costs less than always-premium and misses the floor by less than always-cheap."""
    _, measured = benchmark
    cases = {case["rule"]: case for case in measured["cases"] if case["world"] == "synthetic"}
    ours = cases["attune-worker, from premium"]
    assert ours["cost"] < 0.95 * cases["always premium"]["cost"]
    assert ours["shortfall"] < 0.5 * cases["always cheap"]["shortfall"]
