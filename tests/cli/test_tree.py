"""What holds for each of our commands, under both of the names it can be called by?"""

import json
import os
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from attune_worker.cli import attune
from attune_worker.settings import get_settings

NOTHING_TO_READ = {
    ("budget", "set"): "has --json nevertheless",
    ("completion",): "prints a script",
    ("costs", "export"): "writes CSV or JSONL",
    ("dashboard",): "runs until it is stopped",
    ("healthy",): "its exit code is its answer",
    ("simulator",): "runs until it is stopped",
    ("worker",): "runs until it is stopped",
}
"""Commands that need no --json, and why."""

WITHOUT_REDIS = {
    ("auth", "recommend"),
    ("auth", "reset"),
    ("auth", "setup"),
    ("auth", "status"),
    ("completion",),
    ("demo",),
    ("dashboard",),
    ("doctor",),
    ("healthy",),
    ("models", "list"),
    ("run",),
    ("simulator",),
    ("worker",),
}
"""They need none, bring their own, wait for it, or say what they find; the last ones have tests of their own."""

ARGUMENTS = {
    ("breaker", "trip"): ["anthropic"],
    ("breaker", "override"): ["open", "anthropic"],
    ("budget", "set"): ["1", "--per", "day"],
    ("costs", "estimate"): ["--task-type", "summarize", "--prompt", "a text"],
    ("jobs", "show"): ["some-id"],
    ("jobs", "cancel"): ["some-id"],
    ("jobs", "retry"): ["some-id"],
    ("routing", "best"): ["w", "fix_bug"],
    ("routing", "explain"): ["w", "fix_bug"],
    ("routing", "stats"): ["w"],
    ("routing", "upgrade"): ["w", "fix_bug"],
    ("submit",): ["summarize", "a text"],
}
"""What a command has to be given."""

WITH_A_FILE = {("costs", "reconcile")}

BUDGETS = json.dumps([{"per": "day", "limit_usd": "50"}])
DEAD = "redis://:top-secret@127.0.0.1:1/0"


def commands(
    command: click.Command = attune, path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], click.Command]]:
    """Return every command there is, groups too, by its words."""
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found += commands(child, (*path, name))
    return found


COMMANDS = commands()
LEAVES = [(path, command) for path, command in COMMANDS if not isinstance(command, click.Group)]
NEED_REDIS = [path for path, _ in LEAVES if path not in WITHOUT_REDIS | WITH_A_FILE]


def named(path: tuple[str, ...]) -> str:
    """Return a command's words as the id of its test."""
    return "-".join(path) or "attune-worker"


@pytest.fixture(scope="module")
def celery():
    """Return Celery's own command group, in which ours is mounted."""
    os.environ.setdefault("ATTUNE_NAMESPACE", "test-tree")
    from celery.bin.celery import celery as group

    yield group
    os.environ.pop("ATTUNE_NAMESPACE", None)


@pytest.fixture(params=["attune-worker", "celery"])
def call(request, environ, celery):
    """Return a function that runs a command by one of its two names, in this process."""
    group, prefix = (attune, []) if request.param == "attune-worker" else (celery, ["-A", "attune_worker", "attune"])

    def run(*arguments, **overrides):
        get_settings.cache_clear()
        try:
            return CliRunner(env={**environ, **overrides}).invoke(group, [*prefix, *arguments])
        finally:
            get_settings.cache_clear()

    return run


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[named(path) for path, _ in COMMANDS])
def test_help_has_an_example_that_is_understood(call, path, command):
    """Under both names; what it shows can be typed."""
    ran = call(*path, "--help")
    assert ran.exit_code == 0
    assert "Example: " in ran.output
    example = " ".join((command.help or "").partition("Example: ")[2].split())
    assert example.startswith("attune-worker ")
    if not isinstance(command, click.Group):
        options = {option for param in command.params for option in param.opts}
        assert " ".join(path) in example
        assert {word for word in shlex.split(example) if word.startswith("--")} <= options


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[named(path) for path, _ in LEAVES])
def test_whatever_can_be_read_can_be_read_by_a_program(path, command):
    """--json, on each command that shows something."""
    has_json = any("--json" in param.opts for param in command.params)
    assert has_json or path in NOTHING_TO_READ


@pytest.mark.parametrize("path", NEED_REDIS, ids=named)
def test_a_redis_that_is_away_is_one_line_with_what_to_do(call, path):
    """Which URL, without its password; what was tried; exit code 3."""
    away = {"ATTUNE_REDIS_URL": DEAD, "ATTUNE_REDIS_TIMEOUT_SECONDS": "5"}
    ran = call(*path, *ARGUMENTS.get(path, []), **away, ATTUNE_BUDGETS=BUDGETS)
    assert ran.exit_code == 3, ran.output + repr(ran.exception)
    line = ran.stderr.strip()
    assert line.count("\n") == 0
    assert line.startswith("Error: Redis at redis://:***@127.0.0.1:1/0 cannot be reached")
    assert "Connection refused, tried 4 times with up to 5 s each; start it, or set ATTUNE_REDIS_URL" in line
    assert "top-secret" not in ran.output


@pytest.mark.parametrize("path", [path for path in NEED_REDIS if path != ("breaker", "watch")], ids=named)
def test_each_command_runs_under_both_names(call, path):
    """With the same exit code: the unknown job is 1, all else is done."""
    ran = call(*path, *ARGUMENTS.get(path, []), ATTUNE_BUDGETS=BUDGETS)
    assert ran.exit_code == (1 if path[0] == "jobs" and ARGUMENTS.get(path) else 0), ran.output + repr(ran.exception)


def test_doctor_says_of_redis_what_the_others_say(call):
    """And goes on to what else there is to see; exit code 3."""
    ran = call("doctor", ATTUNE_REDIS_URL=DEAD)
    assert ran.exit_code == 3
    assert "redis://:***@127.0.0.1:1/0 cannot be reached" in ran.output
    assert "top-secret" not in ran.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["breaker", "trip", "nobody"], "providers: anthropic, google, openai"),
        (["budget", "set", "1", "--per", "day", "--tenant", "x"], "configured: none"),
        (["submit", "summarize"], "give either a PROMPT"),
        (["models", "list", "--tier", "x"], "'x' is not one of"),
        (["nonsense"], "No such command 'nonsense'"),
        (["jobs", "list", "--limit", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage_is_code_2_under_both_names(call, arguments, told):
    """With what would be right, and no traceback."""
    ran = call(*arguments)
    assert ran.exit_code == 2, ran.output + repr(ran.exception)
    assert told in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.output


@pytest.mark.parametrize(
    ("arguments", "url", "code", "told"),
    [
        (["breaker", "trip", "anthropic", "--json"], None, 0, '"forced": "open"'),
        (["breaker", "status"], DEAD, 3, "Error: Redis at redis://:***@127.0.0.1:1/0 cannot be reached"),
        (["breaker", "watch"], DEAD, 3, "Error: Redis at redis://:***@127.0.0.1:1/0 cannot be reached"),
        (["jobs", "show", "nothing"], None, 1, "Error: no job 'nothing'"),
        (["budget", "set", "x", "--per", "day"], None, 2, "is no amount"),
    ],
)
def test_celery_in_a_process_of_its_own_says_the_same(environ, arguments, url, code, told):
    """Exit codes and error lines reach the shell."""
    ran = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "attune_worker", "attune", *arguments],
        env={**os.environ, **environ, **({"ATTUNE_REDIS_URL": url} if url else {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, told in ran.stdout + ran.stderr) == (code, True), ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
