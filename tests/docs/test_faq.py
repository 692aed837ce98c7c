"""Does every command that the FAQ names run? Its Python blocks run with those of all other pages."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attune_worker import Client, Settings
from tests.examples.stack import PATIENCE_SECONDS, ROOT, Stack, running_stack

FAQ = (ROOT / "docs" / "faq.md").read_text()
COMMANDS = sorted(set(re.findall(r"`(attune-worker [^`…]+|jobs show JOB)`", FAQ)))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis, a simulated provider, and a worker that takes jobs."""
    with running_stack(tmp_path_factory.mktemp("faq")) as stack, stack.worker():
        yield stack


@pytest.fixture(scope="module")
def names(stack: Stack) -> dict[str, str]:
    """What stands for the words in capitals: a job that has ended, its workflow and stage, and a file of code."""
    file = stack.folder / "mean.py"
    file.write_text("def mean(values):\n    return sum(values) / len(values)\n")
    with Client(Settings.load(environ=stack.environ)) as client:
        job = client.submit("fix_bug", "def mean(v): ...", workflow="nightly")
        job.result(PATIENCE_SECONDS)
    return {"JOB": job.id, "WORKFLOW": "nightly", "STAGE": "fix_bug", "FILE": str(file)}


def test_commands_were_found() -> None:
    """The test below has something to look at."""
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_faq_runs(stack: Stack, names: dict[str, str], command: str) -> None:
    """As it stands there, with names for the words in capitals."""
    words = [names.get(word, word) for word in shlex.split(command)]
    if words[0] == "attune-worker":
        words = words[1:]
    if words == ["costs", "estimate"]:
        words += ["--task-type", "fix_bug", "--file", names["FILE"]]
    ran = subprocess.run(
        [sys.executable, "-m", "attune_worker", *words],
        cwd=Path(stack.folder),
        env=stack.environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_first_thing_to_run_selects_the_features_tests() -> None:
    """``pytest -k "models" -v``, as the FAQ has it; what it selects runs with all other tests."""
    line = re.search(r"^pytest .*$", FAQ, re.MULTILINE)
    assert line is not None
    command = [sys.executable, "-m", *shlex.split(line[0]), "--collect-only", "-qq", "tests/models"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "tests/models/test_breaker.py" in listed
    assert "tests/models/test_auth.py" in listed
