"""The benchmark measures every mode; how fast they are is for its reader to judge."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throughput.py"
MODES = {"bare-threads", "attune-threads", "attune-prefork", "bare-prefork"}
NUMBERS = {
    "jobs_per_second",
    "cpu_ms_per_job",
    "peak_rss_mb",
    "pss_mb",
    "uss_mb",
    "max_in_flight",
    "provider_cpu_ms_per_job",
    "redis_cpu_ms_per_job",
}


def test_smallest_run_measures_all_modes(tmp_path):
    """Two hundred jobs in each mode, many ticks of the CPU clock, give a positive number for everything measured."""
    file = tmp_path / "measured.json"
    options = ["--jobs", "200", "--rounds", "1", "--latency", "0", "--json", str(file), "--markdown"]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    cases = {case["mode"]: case for case in json.loads(file.read_text())["cases"]}
    assert set(cases) == MODES
    for case in cases.values():
        [measured] = case["rounds"]
        assert set(measured) == NUMBERS
        assert measured["jobs_per_second"] > 0
        assert measured["cpu_ms_per_job"] > 0
        assert measured["peak_rss_mb"] > 0
        assert measured["max_in_flight"] >= 1
    assert {mode for mode, case in cases.items() if case["ratio_to_bare"]} == {"attune-threads", "attune-prefork"}
    assert "| 0 s | threads |" in done.stdout
