"""Can a supervisor tell a worker that takes no messages from one that is busy, or waits for its broker?"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from attune_worker.client import Client
from attune_worker.local import LocalWorker
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.worker.consumer import OVERDUE_SECONDS
from benchmarks.tcp_proxy import TcpProxy
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, Until, process_environ
from tests.faults.conftest import assert_each_ran_once, kill, paused, process_id, submit

StartWorker = Callable[..., LocalWorker]


class HalfOpenProxy(TcpProxy):
    """A proxy whose connections can go silent without being closed."""

    def silence(self) -> None:
        """Carry nothing more on the connections there are now; new ones work."""
        done = threading.Event()

        def silence() -> None:
            for writer in self._open:
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # stream transports can
            done.set()

        self._loop.call_soon_threadsafe(silence)
        assert done.wait(PATIENCE_SECONDS)


@pytest.fixture
def proxy(own_server: EmbeddedRedis) -> Iterator[HalfOpenProxy]:
    assert own_server.port is not None
    with HalfOpenProxy(own_server.port) as proxy:
        yield proxy


@pytest.fixture
def environ(
    make_environ: Environ, simulator: Simulator, own_server: EmbeddedRedis, proxy: HalfOpenProxy
) -> dict[str, str]:
    through_proxy = own_server.url.replace(f":{own_server.port}/", f":{proxy.port}/")
    return make_environ(simulator, REDIS_URL=own_server.url, BROKER_URL=through_proxy, REDIS_TIMEOUT_SECONDS=5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "worker.alive"


@pytest.fixture
def worker(environ: dict[str, str], file: Path, start_worker: StartWorker, until: Until) -> Iterator[LocalWorker]:
    worker = start_worker(environ, concurrency=2, liveness_file=file)
    until(file.exists)
    yield worker
    kill(worker)


@pytest.mark.usefixtures("worker")
def test_busy_worker_is_healthy(file: Path, client: Client, simulator: Simulator, until: Until) -> None:
    """All its threads are busy for longer than a question for messages may take, and it asks none."""
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": 10 * PATIENCE_SECONDS})
    submit(client, 5)
    until(lambda: simulator.requests()["in_flight"] == 2)
    full_since = time.time()
    until(lambda: file.stat().st_mtime > full_since + OVERDUE_SECONDS + 2)


def test_worker_that_stands_still_is_not_healthy(
    worker: LocalWorker, file: Path, environ: dict[str, str], until: Until
) -> None:
    """It says so in a line, with exit code 1 because a restart would help; going on, it is healthy again."""
    with paused(process_id(worker)):
        said = until(lambda: unhealthy(file, environ))
        assert said.returncode == 1
        assert "though the broker answers" in said.stderr
    until(lambda: not unhealthy(file, environ))


def test_worker_recovers_from_a_connection_that_went_silent(
    worker: LocalWorker,
    file: Path,
    proxy: HalfOpenProxy,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    until: Until,
) -> None:
    """Its loop turns and its connections stand, but it takes no messages: it says so before it has noticed itself."""
    proxy.silence()
    silent_since = time.time()
    handles = submit(client, 1)
    touched = [0.0]

    def noticed() -> bool:
        touched.append(file.stat().st_mtime)
        return "BRPOP got no reply" in worker.log.read_text()

    until(noticed)  # which takes Kombu two seconds longer, at least
    assert touched[-2] < silent_since + OVERDUE_SECONDS + 0.7
    until(lambda: not unhealthy(file, environ))
    assert_each_ran_once(client, handles, simulator, until)


@pytest.mark.usefixtures("worker")
def test_outage_of_the_broker_is_not_the_workers_fault(
    file: Path, own_server: EmbeddedRedis, environ: dict[str, str], until: Until
) -> None:
    """Then the exit code is 3: whoever restarts workers can leave this one alone."""
    with paused(process_id(own_server)):
        said = until(lambda: unhealthy(file, environ))
    assert said.returncode == 3
    assert "cannot be reached" in said.stderr
    assert own_server._password not in said.stderr
    until(lambda: not unhealthy(file, environ))


def test_file_that_no_worker_has_touched_is_unhealthy(file: Path, environ: dict[str, str]) -> None:
    """A worker that has not come up is none."""
    said = healthy(file, environ)
    assert said.returncode == 1
    assert "no worker has taken messages" in said.stderr


def test_worker_that_waits_for_its_broker_from_the_start_is_not_to_blame(file: Path, environ: dict[str, str]) -> None:
    """It has taken no message yet, and no restart would change that."""
    said = healthy(file, environ | {"ATTUNE_BROKER_URL": "redis://:a-password@127.0.0.1:1/0"})
    assert said.returncode == 3
    assert "no worker has taken messages" in said.stderr
    assert "cannot be reached" in said.stderr
    assert "a-password" not in said.stderr


def healthy(file: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Ask as a supervisor does, in a process of its own."""
    command = [sys.executable, "-m", "attune_worker", "healthy", "--file", str(file), "--within", "3"]
    return subprocess.run(command, env=process_environ(environ), capture_output=True, text=True, check=False)


def unhealthy(file: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str] | None:
    """Return what is said of a worker that is not healthy."""
    said = healthy(file, environ)
    return said if said.returncode else None
