"""Does the page of what ``--json`` prints have every command, and every key of each, and no other?

Each command runs against a Redis with enough behind it that no list is empty and nothing nested is null every time.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from attune_worker import AuthStrategy, EmpathyLLMExecutor, ExecutionContext, Settings, get_settings
from attune_worker.budget import Budgets
from attune_worker.cli import attune
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from tests.conftest import API_KEY, Environ, process_environ
from tests.examples.stack import ROOT

ELSEWHERE = "Described on other pages"
PAGE = (ROOT / "docs" / "reference" / "json.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n)*)", re.MULTILINE)
ROW = re.compile(r"^\| (`.+?`) \|", re.MULTILINE)

FILES = {
    "mean.py": "def mean(values):\n    return sum(values) / len(values)\n",
    "jobs.jsonl": '{"task_type": "summarize", "prompt": "A text."}\nno job\n',
    "none.jsonl": "no job\n",
}

CREDENTIALS = [
    {"name": "revoked", "secret": "sk-revoked"},
    {"name": "team", "mode": "subscription", "secret": "token-of-the-team"},
]
BUDGETS = [{"per": "day", "limit_usd": "5"}, {"per": "month", "limit_usd": "50", "tenant": "*"}]
QUOTA = {"name": "team", "windows": {"5h": {"capacity_tokens": 1000, "used": 0.98, "resets_in_seconds": 600}}}

RUNS = {
    "auth setup": ["auth setup --tier max"],
    "auth status": ["auth status"],
    "auth recommend": ["auth recommend mean.py"],
    "auth reset": ["auth reset", "auth reset --key anthropic/default"],
    "breaker status, breaker trip, breaker override, breaker reset": [
        "breaker status",
        "breaker trip anthropic premium --seconds 60",
        "breaker override open openai cheap --reason upkeep",
        "breaker reset openai",
    ],
    "budget set": ["budget set 8 --per month --tenant acme"],
    "budget show": ["budget show"],
    "costs estimate": ["costs estimate --task-type summarize --prompt Text. --workflow nightly"],
    "costs estimate --jobs": ["costs estimate --jobs jobs.jsonl"],
    "models list": ["models list"],
    "routing best": ["routing best nightly summarize"],
    "routing explain": ["routing explain nightly summarize"],
    "routing stats": ["routing stats nightly", "routing stats nobody"],
    "routing upgrade": ["routing upgrade nightly summarize"],
    "run": ["run none.jsonl -o results.jsonl"],
    "submit": ["submit summarize Text."],
}
"""What is run for each section of the page; the others have a test of their own."""


def sections() -> dict[str, set[str]]:
    """Return the keys of each section of the page."""
    return {
        title: {key for row in ROW.findall(text) for key in re.findall(r"`([^`]+)`", row)}
        for title, text in SECTION.findall(PAGE)
    }


def commands(command: click.Command = attune, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield every command that takes ``--json``, by its words."""
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            yield from commands(child, (*words, name))
    elif any("--json" in option.opts for option in command.params):
        yield " ".join(words)


def keys(value: Any, described: set[str], above: str = "") -> Iterator[str]:
    """Yield the keys of a JSON value by their paths: with ``*`` where the page has it instead of names.

    What the page describes elsewhere, and marks by an ellipsis, is not looked into.
    """
    if isinstance(value, list):
        for one in value:
            yield from keys(one, described, above)
    elif isinstance(value, Mapping):
        named = any(path.startswith(f"{above}.*") for path in described)
        for name, one in value.items():
            path = f"{above}.{'*' if named else name}".removeprefix(".")
            if f"{path}.…" in described:
                yield f"{path}.…"
                continue
            if not (named and isinstance(one, Mapping)):
                yield path
            yield from keys(one, described, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that commands read."""
    found = tmp_path_factory.mktemp("json")
    for name, text in FILES.items():
        (found / name).write_text(text)
    return found


@pytest.fixture(scope="module")
def fleet(make_environ: Environ, folder: Path) -> Iterator[dict[str, str]]:
    """Return the environment of a fleet with calls, a refused key, a quota that is used up, and a limit that was set.

    Of two keys each is the first of a call soon.
    """
    file = folder / "auth.json"
    AuthStrategy(subscription_tier="max").save(file)
    profile = {"api_keys": [API_KEY], "subscriptions": {"token-of-the-team": QUOTA}}
    with Simulator(Profile.parse(profile)) as simulator:
        environ = make_environ(
            simulator,
            AUTH__FILE=file,
            BUDGETS=json.dumps(BUDGETS),
            PROVIDERS__ANTHROPIC__CREDENTIALS=json.dumps(CREDENTIALS),
        )
        settings = Settings.load(environ=environ)
        with EmpathyLLMExecutor(settings) as executor, closing(Budgets(settings)) as budgets:
            place = ExecutionContext(workflow_name="nightly", step_name="summarize")
            for mode in ["api"] * 20 + ["subscription"]:
                executor.run("summarize", "A text.", context=place, model="claude-haiku-5-5", auth_mode=mode)
            budgets.set_limit("day", (None, None, None), Decimal(7), by="ada")
        yield environ


def printed(line: str, environ: Mapping[str, str]) -> Any:
    """Run a command line with ``--json``, in this process, and return what it printed."""
    get_settings.cache_clear()
    try:
        ran = CliRunner(env=environ).invoke(attune, [*shlex.split(line), "--json"])
    finally:
        get_settings.cache_clear()
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.output
    return json.loads(ran.stdout)


def test_every_command_that_prints_json_is_on_the_page() -> None:
    """Once, there or by a link to the page that describes it."""
    titles = [name for title in sections() if title != ELSEWHERE for name in title.split(", ")]
    there = {title.removesuffix(" --jobs") for title in titles} | sections()[ELSEWHERE]
    assert there == set(commands())
    assert set(RUNS) == set(sections()) - {ELSEWHERE, "breaker watch", "demo"}


@pytest.mark.parametrize("title", RUNS)
def test_the_keys_that_a_command_prints_are_those_of_the_page(
    fleet: Mapping[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch, title: str
) -> None:
    """Both ways, nested ones too."""
    monkeypatch.chdir(folder)
    described = sections()[title]
    for name in title.removesuffix(" --jobs").split(", "):
        assert any(line.startswith(name) for line in RUNS[title])
    found = {line: set(keys(printed(line, fleet), described)) for line in RUNS[title]}
    assert {line: told - described for line, told in found.items() if told - described} == {}
    assert described - set().union(*found.values()) == set()


def test_the_keys_that_the_demo_prints_are_those_of_the_page(fleet: Mapping[str, str], folder: Path) -> None:
    """It runs as a process of its own, with workers of its own."""
    command = [sys.executable, "-m", "attune_worker", "demo", "--simulator", "--json"]
    environ = process_environ(fleet)
    ran = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=240, check=True)
    described = sections()["demo"]
    assert set(keys(json.loads(ran.stdout), described)) == described


def test_the_lines_that_watch_prints_have_the_keys_of_the_page(fleet: Mapping[str, str], tmp_path: Path) -> None:
    """Those of a circuit, and those of Redis' going."""
    described = sections()["breaker watch"]
    circuit = sections()["breaker status, breaker trip, breaker override, breaker reset"]
    with EmbeddedRedis(tmp_path) as server:
        environ = {**fleet, "ATTUNE_REDIS_URL": server.url}
        printed("breaker trip anthropic", environ)
        process = subprocess.Popen(
            [sys.executable, "-m", "attune_worker", "breaker", "watch", "--interval", "0.05", "--json"],
            env=process_environ(environ),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process, process.stdout as lines:
            assert set(json.loads(lines.readline())) == {"at"} | circuit
            server.stop()
            assert set(json.loads(lines.readline())) == described
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
