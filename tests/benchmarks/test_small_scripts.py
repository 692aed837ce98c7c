"""Do the scripts behind single figures of the pages still print them?"""

import json
import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEGABYTE = 2**20


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_line_of_code_has_about_as_many_tokens_as_are_assumed() -> None:
    """Whatever the version of Python: the default is rounded."""
    tokens, default = map(float, re.findall(r"([\d.]+) tokens \(default: ([\d.]+)\)", run("source_lines.py"))[0])
    assert abs(tokens - default) < 1


def test_endless_answers_are_cut_off_at_the_limit(tmp_path: Path) -> None:
    """Each is refused, and takes no more than the limit, once more where it is unpacked, and some."""
    file = tmp_path / "measured.json"
    run("huge_answers.py", "--megabytes", "100", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 5
    assert {row["outcome"] for row in rows} == {"malformed_answer"}
    assert all(row["grown_bytes"] < 96 * MEGABYTE for row in rows)
