from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from attune_worker import Client, JobResult, Settings
from attune_worker.simulator import answer
from attune_worker.store.embedded import free_port
from attune_worker.worker.summary import Summary
from tests.examples.stack import PATIENCE_SECONDS, ROOT, Stack, eventually, running_stack

PASSWORD = "not-for-production"
LOGIN = ("admin", PASSWORD)
PROMPT = "Nobody but the model and the caller should read this sentence."

HONCHO = [sys.executable, "-m", "honcho", "-e", os.devnull, "-f", str(ROOT / "Procfile"), "start"]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Redis and a simulated provider; the Procfile brings the rest."""
    with running_stack(tmp_path) as stack:
        yield stack


def groups_in(log: Path) -> list[int]:
    """Return the process groups that honcho has started."""
    return [int(pid) for pid in re.findall(r"started \(pid=(\d+)\)", log.read_text())]


def is_alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def procfile(stack: Stack, port: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start the Procfile as a developer would, and give honcho and its log."""
    log = stack.folder / "honcho.log"
    environ = {**stack.environ, "FLOWER_PASSWORD": PASSWORD, "FLOWER_PORT": str(port), "ATTUNE_CONCURRENCY": "20"}
    with log.open("wb") as output:
        honcho = subprocess.Popen(
            HONCHO, cwd=stack.folder, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield honcho, log
    finally:
        for group in [honcho.pid, *groups_in(log)]:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        honcho.wait()


def status_of(url: str, login: tuple[str, str] | None) -> int | None:
    """Return the HTTP status, None while nobody listens."""
    try:
        return httpx.get(url, auth=login, timeout=PATIENCE_SECONDS).status_code
    except httpx.TransportError:
        return None


def test_the_procfile_runs_jobs_and_flower_shows_their_summaries_to_those_with_the_password(stack):
    """Worker and Flower start together; Flower asks for the password and shows neither prompts nor answers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with procfile(stack, port) as (honcho, log), Client(Settings.load(environ=stack.environ)) as client:
        eventually(lambda: " ready." in log.read_text(), "the worker takes jobs")
        eventually(lambda: status_of(f"{url}/healthcheck", None), "Flower answers")
        for page in ("", "/workers", "/tasks", "/api/tasks", "/api/workers"):
            assert status_of(f"{url}{page}", None) == 401
            assert status_of(f"{url}{page}", ("admin", "guessed")) == 401
        assert status_of(f"{url}/workers", LOGIN) == 200

        result, task = eventually(lambda: a_job_that_flower_has_seen(client, url), "Flower shows an ended job")
        assert result.content == answer(result.model_id, "", [("user", PROMPT)]).text
        assert task["result"] == repr(Summary(result))
        pages = [
            httpx.get(f"{url}{page}", auth=LOGIN, timeout=PATIENCE_SECONDS)
            for page in ("/api/tasks", f"/task/{task['uuid']}")
        ]
        assert all(page.status_code == 200 and task["uuid"] in page.text for page in pages)
        for words in (PROMPT, result.content, result.content[-20:]):
            assert all(words not in text for text in (*(page.text for page in pages), log.read_text()))

        honcho.send_signal(signal.SIGTERM)
        honcho.wait(PATIENCE_SECONDS)
        groups = [honcho.pid, *groups_in(log)]
        assert len(groups) == 3
        eventually(lambda: not any(map(is_alive, groups)), "every process of the Procfile has ended")


def a_job_that_flower_has_seen(client: Client, url: str) -> tuple[JobResult, dict[str, Any]] | None:
    """Run one more job; Flower switches task events on some seconds after its start, and sees those that follow."""
    client.submit("summarize", PROMPT).result(PATIENCE_SECONDS)
    tasks: dict[str, dict[str, Any]] = httpx.get(f"{url}/api/tasks", auth=LOGIN, timeout=PATIENCE_SECONDS).json()
    ended = [task for task in tasks.values() if task["state"] == "SUCCESS" and task["result"]]
    return (client.result(ended[0]["uuid"], 0), ended[0]) if ended else None


def test_flower_does_not_start_without_a_password(stack):
    """Whoever forgets the password is told so, instead of opening Flower to everybody."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        subprocess.run(
            HONCHO, cwd=stack.folder, env=stack.environ, stdout=subprocess.PIPE, timeout=PATIENCE_SECONDS, check=True
        )
    assert b"FLOWER_PASSWORD: is not set" in refused.value.stdout
