"""What is a worker told that lacks something when it starts?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from attune_worker.worker.readiness import complaints
from tests.conftest import Until, process_environ

SUBSCRIPTION = {"name": "team", "mode": "subscription", "secret": "env:TEAM_TOKEN"}


def test_worker_that_has_all_it_needs_is_told_nothing(settings: Settings) -> None:
    """No line that everybody learns to overlook."""
    assert list(complaints(settings)) == []


def test_missing_token_of_a_subscription_is_said_as_it_costs_money(make_environ: Any, simulator: Simulator) -> None:
    """Which variable is empty, and what happens instead; with the token nothing is said."""
    environ = make_environ(simulator, PROVIDERS__ANTHROPIC__CREDENTIALS=json.dumps([SUBSCRIPTION]))
    settings = Settings.load(environ=environ)
    [complaint] = complaints(settings, {})
    assert "anthropic/team" in complaint
    assert complaint.endswith("(TEAM_TOKEN is empty): calls go by API keys and are paid by the token")
    assert list(complaints(settings, {"TEAM_TOKEN": "sk-a-token"})) == []


def test_worker_without_redis_says_what_to_do_and_goes_on_trying(
    make_environ: Any, simulator: Simulator, tmp_path: Path, until: Until
) -> None:
    """Its URL is told without the password."""
    environ = make_environ(simulator, REDIS_URL="redis://:hunter2@127.0.0.1:1/0")
    log = tmp_path / "worker.log"
    worker = LocalWorker("lonely", process_environ(environ), log, concurrency=1)
    worker.start()
    try:
        until(lambda: log.exists() and "this worker goes on trying" in log.read_text())
        until(lambda: "Trying again in" in log.read_text())
        assert worker.process is not None
        assert worker.process.poll() is None
    finally:
        worker.stop()
    assert "set ATTUNE_REDIS_URL" in log.read_text()
    assert "hunter2" not in log.read_text()


def test_log_names_who_speaks_and_leaves_out_the_chatter(
    make_environ: Any, simulator: Simulator, start_worker: Callable[..., LocalWorker], until: Until
) -> None:
    """At level DEBUG decisions can be found by their logger's name."""
    from attune_worker.client import Client

    environ = make_environ(simulator)
    worker = start_worker(environ, loglevel="debug")
    with Client(Settings.load(environ=environ)) as client:
        assert client.submit("summarize", "a prompt").result(60).succeeded
    until(lambda: "attune_worker.models" in worker.log.read_text())
    assert not [line for line in worker.log.read_text().splitlines() if "DEBUG" in line and " httpcore" in line]
