"""Does the page for operators have every command, and nothing of the machine that ran them?"""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import pytest

from attune_worker.cli import attune
from docs.howto.transcripts import BLOCK, PAGE, WITHOUT_REDIS, run

LIVE, _, DEAD = PAGE.read_text(encoding="utf-8").partition(WITHOUT_REDIS)
NEEDS_NOTHING = {"demo", "dashboard", "simulator"}
"""Were run against a live fleet only: they start what they need, or have a test of their own."""


def leaves(command: click.Command = attune, words: tuple[str, ...] = ()) -> list[str]:
    """Return every command that does something, by its words."""
    if not isinstance(command, click.Group):
        return [" ".join(words)]
    found = [leaves(child, (*words, name)) for name, child in command.commands.items()]
    return [leaf for several in found for leaf in several]


def on(part: str) -> set[str]:
    lines = [block[1].removeprefix("attune-worker ") for block in BLOCK.finditer(part)]
    return {leaf for leaf in leaves() if any(re.match(rf"{leaf}\b", line) for line in lines)}


def test_every_command_is_there_with_a_fleet_and_without_redis() -> None:
    """So an operator finds what it says in either case."""
    assert set(leaves()) == on(LIVE)
    assert set(leaves()) - NEEDS_NOTHING == on(DEAD)


def test_every_command_has_an_answer() -> None:
    """A block that was added and not run would be empty."""
    assert [block[1] for block in BLOCK.finditer(LIVE + DEAD) if not block[2].strip()] == []


@pytest.mark.parametrize("word", ["/home/", "/root/", "/tmp/", "site-packages", "Traceback", "a-password"])
def test_page_has_nothing_that_only_one_machine_has(word: str) -> None:
    """Nor a traceback, nor the password that was set."""
    assert word not in LIVE + DEAD


def test_what_runs_the_page_returns_screen_and_exit_code(tmp_path: Path) -> None:
    """A command that fails is shown with its error."""
    environ = {**os.environ, "ATTUNE_REDIS_URL": "redis://:a-password@127.0.0.1:1/0"}
    screen, code = run("attune-worker breaker status", environ, tmp_path)
    assert code == 3
    assert "redis://:***@127.0.0.1:1/0" in screen
