import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from attune_worker.cli import attune
from attune_worker.cli.completion import PROGRAM, VARIABLE
from attune_worker.settings import get_settings

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def complete(environ):
    """Return a function that asks for completions as a shell's script does, without any Redis."""

    def ask(shell, *words, **overrides):
        *before, incomplete = words
        line = " ".join([PROGRAM, *words])
        asked = {
            "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words))},
            "zsh": {"COMP_WORDS": line, "COMP_CWORD": str(len(words))},
            "fish": {"COMP_WORDS": " ".join([PROGRAM, *before, incomplete]), "COMP_CWORD": incomplete},
        }[shell]
        nowhere = {"ATTUNE_REDIS_URL": "redis://127.0.0.1:1"}
        get_settings.cache_clear()
        env = {**environ, **nowhere, **asked, VARIABLE: f"{shell}_complete", **overrides}
        ran = CliRunner(env=env).invoke(attune, [], prog_name=PROGRAM)
        get_settings.cache_clear()
        assert (ran.exit_code, ran.stderr) == (0, "")
        lines = ran.stdout.splitlines()
        if shell == "zsh":
            return [name.replace("\\:", ":") for kind, name in zip(lines[::3], lines[1::3], strict=False) if kind]
        return [line.partition(",")[2].split("\t")[0] for line in lines if line]

    return ask


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_completes_commands_providers_tiers_and_models(complete, shell):
    """Through the protocol of its own script."""
    assert complete(shell, "bre") == ["breaker"]
    assert complete(shell, "breaker", "t") == ["trip"]
    assert complete(shell, "breaker", "trip", "an") == ["anthropic"]
    assert complete(shell, "breaker", "trip", "anthropic", "c") == ["capable", "cheap"]
    assert complete(shell, "submit", "fix_") == ["fix_bug"]
    assert complete(shell, "submit", "fix_bug", "--model", "claude-haiku-4") == ["claude-haiku-4-5"]
    assert complete(shell, "models", "list", "--tier", "p") == ["premium"]
    assert complete(shell, "budget", "show", "--provider", "op") == ["openai"]
    assert complete(shell, "budget", "set", "--for") == ["--for-good"]


def test_completion_with_broken_settings_is_empty(complete):
    """A shell that completes has nowhere to show an error."""
    assert complete("bash", "breaker", "trip", "a", ATTUNE_NAMESPACE="{") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_the_script_of_a_shell(invoke, shell):
    """Which asks this program."""
    script = invoke("completion", shell).output
    assert f"{VARIABLE}={shell}_complete" in script
    assert PROGRAM in script


def test_bash_runs_its_script(invoke, environ, tmp_path):
    """A real shell loads it, and gets the completions where it looks for them."""
    program = tmp_path / PROGRAM
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -m attune_worker\n")
    program.chmod(0o755)
    (tmp_path / "script").write_text(invoke("completion", "bash").output)
    asked = f"COMP_WORDS=({program} breaker o); COMP_CWORD=2; _attune_worker_completion {program}"
    ran = subprocess.run(
        [shutil.which("bash"), "--norc", "-c", f'. ./script; {asked}; echo "${{COMPREPLY[@]}}"'],
        env={**os.environ, **environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.stdout.strip(), ran.returncode) == ("override", 0), ran.stderr
