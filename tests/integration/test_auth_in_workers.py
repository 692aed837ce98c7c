"""The auth strategy as workers follow it: for each job, by the size of its module, and as it stands by now."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from attune_worker import AuthStrategy, Client, Settings, get_auth_strategy
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.models.learned_lines import ENOUGH_JOBS
from attune_worker.simulator import Profile, Simulator
from tests.conftest import API_KEY

Until = Callable[[Callable[[], Any]], Any]
TOKEN = "subscription-token-7f3a"
WAIT_SECONDS = 60.0


@pytest.fixture
def simulator() -> Any:
    """Run a provider with a key, and a subscription with plenty of quota."""
    plenty = {"windows": {"5h": {"capacity_tokens": 100_000_000}}}
    with Simulator(Profile.parse({"api_keys": [API_KEY], "subscriptions": {TOKEN: plenty}})) as provider:
        yield provider


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "auth.json"


@pytest.fixture
def environ(make_environ: Any, simulator: Simulator, file: Path) -> Mapping[str, str]:
    credentials = json.dumps([{"name": "plan", "mode": "subscription", "secret": TOKEN, "burst": 1}])
    environ: dict[str, str] = make_environ(
        simulator, AUTH__FILE=file, PROVIDERS__ANTHROPIC__CREDENTIALS=credentials, PROVIDER_ORDER='["anthropic"]'
    )
    del environ["ATTUNE_PROVIDERS__OPENAI__API_KEY"]
    return environ


@pytest.fixture
def client(environ: Mapping[str, str], start_worker: Callable[..., LocalWorker]) -> Any:
    start_worker(environ)
    with Client(Settings.load(environ=environ)) as found:
        yield found


def mode_of(client: Client, lines: int) -> str | None:
    job = client.submit("summarize", "A module.", model="claude-haiku-4-5", module_lines=lines)
    result = job.result(WAIT_SECONDS)
    assert result.status is JobStatus.SUCCEEDED, result.error
    return result.auth_mode


def test_workers_go_by_the_strategy_and_notice_when_it_changes(client: Client, file: Path, until: Until) -> None:
    """Its borders decide; what is saved while workers run holds within seconds, without a restart."""
    assert [mode_of(client, lines) for lines in (499, 1999, 2000)] == ["subscription", "subscription", "api"]
    AuthStrategy(prefer_subscription=False).save(file)
    until(lambda: mode_of(client, 1999) == "api")
    assert [mode_of(client, lines) for lines in (499, 500)] == ["subscription", "api"]


def test_jobs_wait_for_a_broken_strategy_to_be_mended(client: Client, file: Path, until: Until) -> None:
    """None is paid for by a guess, and none is lost; the reason names file and line."""
    file.write_text('{\n  "subscription_tier": "gold"\n}\n')
    job = until(lambda: _waiting(client))
    assert "auth.json" in client.records.read([job.id])[0].reason
    file.unlink()
    assert job.result(WAIT_SECONDS).status is JobStatus.SUCCEEDED


def _waiting(client: Client) -> Any:
    """Submit a job, and return it if it waits: workers look at the file once a second."""
    job = client.submit("summarize", "A module.", model="claude-haiku-4-5", module_lines=10)
    status = job.status()
    while status not in {JobStatus.WAITING, JobStatus.SUCCEEDED}:
        status = job.status()
    return job if status is JobStatus.WAITING else None


def test_tokens_of_a_line_are_learned_from_jobs(client: Client, environ: Mapping[str, str], until: Until) -> None:
    """Those that said how many lines they were about, and what their prompts came to."""
    settings = Settings.load(environ=environ)
    jobs = client.submit_many(
        [
            {"task_type": "summarize", "prompt": "word " * 400, "model": "claude-haiku-4-5", "module_lines": 20}
            for _ in range(ENOUGH_JOBS)
        ]
    )
    tokens = [job.result(WAIT_SECONDS).usage for job in jobs]
    assert tokens[0] is not None
    per_line = tokens[0].input_tokens / 20
    strategy = get_auth_strategy(settings)
    until(lambda: strategy.multiplier().source == "learned")
    assert strategy.multiplier().tokens_per_line == pytest.approx(per_line, rel=0.01)
