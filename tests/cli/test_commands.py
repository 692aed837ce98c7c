import json
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal

import httpx
import psutil
import pytest
from redis import Redis

from attune_worker import Client, JobStatus, Settings
from attune_worker.cli.main import COMMANDS
from attune_worker.store.embedded import EmbeddedRedis

COMMAND = [sys.executable, "-m", "attune_worker"]
PROVIDER_KEYS = {"ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY"}


@pytest.fixture
def environ():
    """The environment of a newcomer: no setting of ours, no provider's key."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ATTUNE_") and name not in PROVIDER_KEYS
    }


def command(environ, *arguments, **options):
    """Run a command to its end."""
    return process(environ, *COMMAND, *arguments, **options)


def process(environ, *words, closed="", **options):
    """Run a process to its end; ``closed`` is what a shell puts behind it, such as ``<&-``."""
    words = ("/bin/sh", "-c", f'exec "$@" {closed}', "sh", *words) if closed else words
    return subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["auth", "setup"], "there is no terminal to ask at"),
        (["auth", "reset"], "this would be lost: default_mode = api; to forget it, give --confirm"),
        (["submit", "summarize", "-"], "standard input: is closed"),
        (["costs", "estimate", "--task-type", "summarize", "--file", "-"], "standard input: is closed"),
    ],
    ids=str,
)
def test_a_closed_standard_input_is_no_terminal_and_nothing_to_read(environ, tmp_path, words, said):
    """As ``<&-`` leaves it: wrong usage, exit code 2, and nothing is changed; so it is without standard error."""
    file = tmp_path / "auth.json"
    file.write_text('{"default_mode": "api"}')
    environ["ATTUNE_AUTH__FILE"] = str(file)
    ran = command(environ, *words, closed="<&-")
    assert (ran.returncode, said in ran.stdout + ran.stderr, "Traceback" in ran.stderr) == (2, True, False)
    assert command(environ, *words, closed="</dev/null 2>&-").returncode == 2
    assert file.read_text() == '{"default_mode": "api"}'


def test_functions_return_their_exit_code_where_standard_input_is_closed(environ, tmp_path):
    """A daemon has neither terminal nor standard input."""
    environ["ATTUNE_AUTH__FILE"] = str(tmp_path / "auth.json")
    code = "import sys; assert sys.stdin is None; from attune_worker import cmd_auth_setup; sys.exit(cmd_auth_setup())"
    ran = process(environ, sys.executable, "-c", code, closed="<&-")
    assert (ran.returncode, ran.stderr.splitlines()[0][:18]) == (2, "Error: auth setup:")


def test_an_export_without_standard_output_says_where_it_could_go(environ):
    """As ``>&-`` leaves it."""
    ran = command(environ, "costs", "export", closed=">&-")
    assert (ran.returncode, "say where to write by -o" in ran.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--file", "/etc/passwd/x"], "/etc/passwd/x: cannot be looked at: Not a directory; see --file"),
        (["--file", ""], "it is empty"),
        (["--file", "x", "--within", "nan"], "'nan' is not a number"),
    ],
    ids=str,
)
def test_healthy_refuses_what_can_say_nothing_of_a_worker(environ, words, said):
    """Exit code 2, not 1: a restart does not help."""
    ran = command(environ, "healthy", *words)
    assert (ran.returncode, said in ran.stderr) == (2, True)


def test_the_demo_needs_nothing_and_its_costs_equal_the_invoice(environ, tmp_path):
    """From an empty folder and an empty environment to answers for every job, exact to the nano-dollar."""
    ran = command(environ, "demo", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert {job["status"] for job in said["jobs"]} == {"succeeded"}
    assert {job["tier"] for job in said["jobs"]} == {"cheap", "capable"}
    assert said["total_usd"] == said["invoice_usd"]
    assert sum(Decimal(job["cost_usd"]) for job in said["jobs"]) == Decimal(said["invoice_usd"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_demo_shows_a_table_and_says_which_provider_it_asked(environ, tmp_path):
    """What a newcomer reads: the simulator was asked, and both totals."""
    ran = command({**environ, "ANTHROPIC_API_KEY": "sk-real"}, "demo", "--simulator", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "no real provider is called" in ran.stdout
    assert "the same to the nano-dollar" in ran.stdout
    assert "sk-real" not in ran.stdout + ran.stderr


def test_the_demo_keeps_to_itself_in_a_redis_that_others_use(environ, tmp_path):
    """Its worker takes no job but its own, whatever attune.toml says, and nothing of it stays behind."""
    (tmp_path / "attune.toml").write_text('provider_order = ["openai"]\n')
    with EmbeddedRedis(tmp_path / "redis") as server:
        reached = {**environ, "ATTUNE_REDIS_URL": server.url}
        with Client(Settings.load(environ=reached)) as client:
            theirs = client.submit("summarize", "Somebody else's job.")
            ran = command(reached, "demo", "--json", cwd=tmp_path)
            assert ran.returncode == 0, ran.stderr
            assert "Using Redis at redis://:***@127.0.0.1" in ran.stderr
            assert {job["provider"] for job in json.loads(ran.stdout)["jobs"]} == {"anthropic"}
            assert theirs.status() is JobStatus.QUEUED
        with Redis.from_url(server.url) as redis:
            assert list(redis.scan_iter("*demo*")) == []


def test_the_demo_cleans_up_after_ctrl_c(environ, tmp_path):
    """Redis and the worker that it started are gone when it is."""
    process = subprocess.Popen(
        [*COMMAND, "demo"], env=environ, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ends = time.monotonic() + 60
    while len(family := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_a_wrong_setting_ends_every_command_with_one_line_and_code_2(environ, tmp_path):
    """The line names file, key and what is allowed; Celery's own command line says the same."""
    (tmp_path / "attune.toml").write_text('[[models]]\nid = "m"\nprovider = "openai"\ntier = "cheep"\n')
    told = "attune.toml: models.0.tier: it should be 'cheap', 'capable' or 'premium'"
    for ran in (
        command(environ, "worker", cwd=tmp_path),
        command(environ, "demo", cwd=tmp_path),
        subprocess.run(
            [sys.executable, "-m", "celery", "-A", "attune_worker", "worker"],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        ),
    ):
        assert ran.returncode == 2
        assert told in ran.stderr
        assert "Traceback" not in ran.stderr


def test_the_same_group_is_mounted_under_celery(environ):
    """``celery -A attune_worker attune`` lists our commands."""
    ran = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "attune_worker", "attune", "--help"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in ran.stdout


def test_a_wrong_command_is_answered_with_the_right_ones(environ):
    """Exit code 2, and the names there are."""
    ran = command(environ, "wroker")
    assert ran.returncode == 2
    assert ", ".join(sorted(COMMANDS)) in " ".join(ran.stderr.split())


def test_the_simulator_says_where_it_listens_and_ends_on_sigterm(environ):
    """The printed URL answers."""
    process = subprocess.Popen(
        [*COMMAND, "simulator", "--port", "0"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        url = process.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/_sim/health", timeout=60).status_code == 200
    finally:
        process.terminate()
    assert process.wait(60) == 0
    process.stdout.close()
