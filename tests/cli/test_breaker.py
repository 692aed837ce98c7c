import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from attune_worker.cli.circuit_view import CircuitView, print_circuits
from attune_worker.cli.names import operator
from attune_worker.models.breaker import CircuitBreaker
from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis
from tests.conftest import process_environ


@pytest.fixture
def breaker(settings):
    found = CircuitBreaker(settings=settings, owner="worker-1")
    yield found
    found.close()


def test_status_of_a_fleet_in_which_all_is_well(invoke):
    """One line, and an empty list for a program."""
    assert "all circuits are closed" in invoke("breaker", "status").output
    assert json.loads(invoke("breaker", "status", "--json").output) == []


def test_status_says_what_an_operator_needs(invoke, breaker):
    """State, failures, since when, the error's class, the next probe, and by whom and why."""
    for _ in range(5):
        breaker.record_failure("anthropic", "capable", TimeoutError("late"))
    breaker.record_failure("openai", "cheap", ConnectionError("lost"))
    breaker.trip("google", reason="too dear", by="ada@host")
    said = {(one["provider"], one["tier"]): one for one in json.loads(invoke("breaker", "status", "--json").output)}
    opened, troubled, forced = said["anthropic", "capable"], said["openai", "cheap"], said["google", None]
    assert (opened["state"], opened["failure_count"], opened["error"]) == ("open", 5, "TimeoutError")
    assert opened["opened_at"] < opened["next_probe"] == opened["retry_at"]
    assert (troubled["state"], troubled["failure_count"], troubled["error"]) == ("closed", 1, "ConnectionError")
    assert (forced["forced"], forced["by"], forced["reason"]) == ("open", "ada@host", "too dear")
    assert forced["forced_at"] is not None
    assert forced["forced_until"] is forced["next_probe"] is None
    shown = invoke("breaker", "status").output
    for text in ("anthropic:capable", "5 failures in a row", "google:*", "forced open", "after a reset", "ada@host"):
        assert text in shown
    assert "google" not in invoke("breaker", "status", "openai").output


def test_status_changes_nothing(invoke, breaker, redis, settings, until):
    """A circuit whose time is up stays open until a call asks."""
    breaker.trip("anthropic", "cheap", 0.001)
    before = redis.hgetall(f"{{{settings.namespace}}}:breaker:anthropic:cheap")
    assert json.loads(invoke("breaker", "status", "--json").output)[0]["state"] == "open"
    assert redis.hgetall(f"{{{settings.namespace}}}:breaker:anthropic:cheap") == before
    until(lambda: breaker.is_available("anthropic", "cheap"))
    probing = json.loads(invoke("breaker", "status", "--json").output)[0]
    assert (probing["state"], probing["probes"]) == ("half_open", 1)
    assert "1 probe under way" in invoke("breaker", "status").output


def test_status_shows_a_circuit_that_the_index_has_lost(invoke, breaker, redis, settings):
    """An evicted index hides no break of a configured provider."""
    breaker.trip("anthropic", "cheap")
    redis.delete(f"{{{settings.namespace}}}:breakers")
    assert "anthropic:cheap" in invoke("breaker", "status").output


def test_trip_stops_calls_for_its_time(invoke, breaker):
    """With who and why, for a tier or the whole provider; it prints the circuit as it is then."""
    said = json.loads(
        invoke("breaker", "trip", "anthropic", "premium", "--seconds", "600", "--reason", "upkeep", "--json").output
    )
    assert (said["provider"], said["tier"], said["state"], said["is_open"]) == ("anthropic", "premium", "open", True)
    assert (said["by"], said["reason"]) == (operator(), "upkeep")
    assert not breaker.is_available("anthropic", "premium")
    assert breaker.is_available("anthropic", "cheap")
    assert "forced open" in invoke("breaker", "trip", "anthropic").output
    assert not breaker.is_available("anthropic", "cheap")


@pytest.mark.parametrize("kind", ["disabled", "metrics-only"])
def test_override_lets_calls_through_and_none_lifts_it(invoke, breaker, kind):
    """The state below is left alone."""
    breaker.trip("openai", "cheap", 600)
    said = json.loads(invoke("breaker", "override", kind, "openai", "cheap", "--seconds", "60", "--json").output)
    assert (said["forced"], said["state"], said["is_open"]) == (kind.replace("-", "_"), "open", False)
    assert said["forced_until"] is not None
    assert breaker.is_available("openai", "cheap")
    assert json.loads(invoke("breaker", "override", "none", "openai", "cheap", "--json").output)["is_open"]
    assert not breaker.is_available("openai", "cheap")


def test_reset_closes_one_circuit_those_of_a_provider_or_all(invoke, breaker):
    """And says which; who and why are kept with each."""
    for provider in ("anthropic", "openai"):
        for tier in ("cheap", "premium", None):
            breaker.trip(provider, tier)

    def still_open():
        return {name for name, one in breaker.get_status().items() if one["is_open"]}

    assert invoke("breaker", "reset", "anthropic", "cheap").output == "closed: anthropic:cheap\n"
    assert "anthropic:cheap" not in still_open()
    said = json.loads(invoke("breaker", "reset", "anthropic", "--reason", "mended", "--json").output)
    assert {(one["state"], one["by"], one["reason"]) for one in said} == {("closed", operator(), "mended")}
    assert {name.partition(":")[0] for name in still_open()} == {"openai"}
    invoke("breaker", "reset")
    assert still_open() == set()


def test_reset_of_nothing_is_no_error(invoke):
    """It is what was asked for."""
    assert invoke("breaker", "reset").output == "closed: nothing was there\n"


def test_circuit_that_closed_by_itself_is_nobodys_reset(breaker, until):
    """Who reset it before the last break is history."""
    breaker.reset("anthropic", "cheap", by="ada@host", reason="mended")
    assert breaker.circuits()["anthropic", "cheap"]["reset_at"] is not None
    breaker.trip("anthropic", "cheap", 0.001)
    until(lambda: breaker.is_available("anthropic", "cheap"))
    breaker.record_success("anthropic", "cheap")
    found = breaker.circuits()["anthropic", "cheap"]
    assert (found["state"], found["by"], found["reason"], found["reset_at"]) == ("closed", "", "", None)


@pytest.mark.parametrize("command", [["trip"], ["override", "open"], ["reset"], ["status"]])
def test_unknown_provider_is_refused_with_the_ones_there_are(invoke, command):
    """A trip of nothing would calm an operator and stop no call."""
    shown = " ".join(invoke("breaker", *command, "antropic", code=2).output.split())
    assert "'antropic' is not a provider; providers: anthropic, google, openai" in shown
    assert "Did you mean 'anthropic'?" in shown


def test_unknown_tier_is_refused_with_the_ones_there_are(invoke):
    """The provider alone is no help then."""
    shown = " ".join(invoke("breaker", "trip", "openai", "cheep", code=2).output.split())
    assert "'cheep' is not a tier; tiers: capable, cheap, premium. Did you mean 'cheap'?" in shown


def test_circuit_that_is_there_can_be_steered_whoever_configured_it(invoke, breaker):
    """Programs have providers of their own; a warning says that they are not in the settings."""
    breaker.trip("my-provider", "fast", by="a program")
    shown = invoke("breaker", "reset", "my-provider", "fast").output
    assert "warning: 'my-provider' is not a provider" in shown
    assert "closed: my-provider:fast" in shown
    invoke("breaker", "reset", "my-provider", "slow", code=2)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9", "x"])
def test_time_that_makes_no_sense_is_refused(invoke, breaker, seconds):
    """In one line, and nothing is done."""
    invoke("breaker", "trip", "openai", "--seconds", seconds, code=2)
    assert breaker.get_status() == {}


def test_names_and_reasons_are_shown_and_not_obeyed(invoke, breaker):
    """A terminal and rich see text only."""
    breaker.trip("evil\x1b[2J", reason="[bold]\x1b]0;title\x07", by="eve")
    shown = invoke("breaker", "status").output
    assert "\x1b" not in shown
    assert "[bold]" in shown


@pytest.mark.parametrize("width", [30, 80, 160])
def test_reasons_are_told_on_any_terminal(width):
    """Below the table, where it has no room for them."""
    fields = dict.fromkeys(
        ("opened_at", "forced_at", "forced_until", "next_probe", "error", "retry_at", "reset_at", "forced")
    )
    fields |= {"state": "open", "failure_count": 5, "reason": "5 failures in a row", "by": "host:1", "probes": 0}
    on = Console(width=width, force_terminal=True, color_system=None, file=StringIO())
    print_circuits(on, [CircuitView("anthropic", "capable", fields)])
    assert "5 failures in a row" in " ".join(on.file.getvalue().split())


class Watch:
    """``breaker watch --json`` in a process of its own."""

    def __init__(self, environ, *options):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attune_worker", "breaker", "watch", "--interval", "0.05", *options],
            env=process_environ(environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self):
        return json.loads(self.process.stdout.readline())

    def end(self, number=signal.SIGINT):
        self.process.send_signal(number)
        rest, errors = self.process.communicate(timeout=60)
        return self.process.returncode, rest, errors


def test_watch_prints_a_line_for_each_circuit_and_then_for_each_change(environ, breaker):
    """A success of a circuit that is well is no change. Ctrl-C ends it without a word."""
    breaker.trip("anthropic", "cheap", reason="first")
    watch = Watch(environ, "--json")
    first = watch.line()
    assert (first["provider"], first["tier"], first["reason"]) == ("anthropic", "cheap", "first")
    breaker.record_failure("openai", "cheap", TimeoutError())
    changed = watch.line()
    assert (changed["provider"], changed["failure_count"], changed["error"]) == ("openai", 1, "TimeoutError")
    breaker.reset("anthropic", "cheap", by="ada")
    assert (watch.line()["state"], watch.process.poll()) == ("closed", None)
    assert watch.end() == (0, "", "")


def test_watch_of_a_pipe_prints_the_table_when_it_changes(environ, breaker):
    """And ends on SIGTERM as on Ctrl-C."""
    watch = Watch(environ)
    assert "UTC" in watch.process.stdout.readline()
    assert "all circuits are closed" in watch.process.stdout.readline()
    breaker.trip("anthropic", "cheap")
    assert "UTC" in watch.process.stdout.readline()
    returned, rest, errors = watch.end(signal.SIGTERM)
    assert (returned, errors) == (0, "")
    assert rest == "" or "anthropic:cheap" in rest


def test_watch_on_a_terminal_is_live(environ, breaker, until):
    """The table is drawn anew in its place, and Ctrl-C leaves the terminal as it was."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "attune_worker", "breaker", "watch", "--interval", "0.05"],
        env={**process_environ(environ), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""

    def shows(text):
        nonlocal shown
        with suppress(BlockingIOError):
            shown += os.read(ours, 65536)
        return text in shown

    try:
        until(lambda: shows(b"all circuits are closed"))
        breaker.trip("anthropic", "cheap", reason="upkeep")
        until(lambda: shows(b"upkeep"))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        with suppress(OSError):  # the other end is closed
            shows(b"")
        assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is back
        assert b"Traceback" not in shown
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_watch_goes_on_while_redis_is_away(environ, tmp_path):
    """It says so, once, tries on, and shows what has changed meanwhile."""
    server = EmbeddedRedis(Path(tmp_path / "redis"), configuration="appendfsync always\n")
    with server:
        settings = Settings.load(environ={**environ, "ATTUNE_REDIS_URL": server.url})
        breaker = CircuitBreaker(settings=settings)
        breaker.trip("anthropic", "cheap")
        watch = Watch({**environ, "ATTUNE_REDIS_URL": server.url}, "--json")
        assert watch.line()["forced"] == "open"
        server.stop()
        away = watch.line()
        assert away["redis"] == "away"
        assert "cannot be reached" in away["error"]
        server.start()
        assert (watch.line()["redis"], watch.process.poll()) == ("back", None)
        breaker.reset("anthropic", "cheap")
        assert watch.line()["state"] == "closed"
        breaker.close()
        assert watch.end()[0] == 0
