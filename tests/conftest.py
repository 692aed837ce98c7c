"""What do tests run against? A real Redis, a simulated provider over HTTP, and real worker processes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from redis import Redis

from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.records import Records

API_KEY = "sk-test-3b1f0c-never-shown"
"""What every simulated provider accepts as its key; no output may ever hold it."""

PATIENCE_SECONDS = 60.0
"""How long a test waits for something that should happen at once, before it fails."""

DAY_SECONDS = 86_400

TICK_SECONDS = 0.01
STALL_SECONDS = 0.1
"""A tick that comes later than this was held up by the machine."""

hypothesis_settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("untimed")  # an example that takes long is no counterexample

Until = Callable[[Callable[[], Any]], Any]
Environ = Callable[..., dict[str, str]]


@pytest.fixture(scope="session", autouse=True)
def _own_processes() -> Iterator[None]:
    """Let Ctrl-C reach what tests start, and end what a test that failed has left running.

    A script's background job, and all that it starts, ignores Ctrl-C unless told otherwise.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="session", autouse=True)
def _own_environment() -> Iterator[None]:
    """Keep the settings and keys of whoever runs the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("ATTUNE_") or name.endswith("_API_KEY"):
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _one_day() -> None:
    """Begin no test in the last minute of a day (UTC): sums and budgets of a day would be those of two."""
    if (left := DAY_SECONDS - time.time() % DAY_SECONDS) < PATIENCE_SECONDS:
        time.sleep(left)


class Stopwatch:
    """Counts the seconds in which this machine ran: not those in which it stood still, or let others go first.

    For a bound that is the claim of a test, such as "within a second": a stall of the machine is no breach of it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Count no more."""
        self._stopping.set()
        self._thread.join()

    def _tick(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(TICK_SECONDS):
            now = time.monotonic()
            self.seconds += min(now - last, STALL_SECONDS)
            last = now


@pytest.fixture
def stopwatch() -> Iterator[Stopwatch]:
    """Return what counts the seconds of this test in which the machine ran."""
    found = Stopwatch()
    yield found
    found.stop()


def longer_and_longer(seconds: float) -> Iterator[float]:
    """Yield a short time, then longer ones: for a test whose time may be up before that begins which it bounds."""
    return itertools.takewhile(lambda so_long: so_long < PATIENCE_SECONDS, (seconds * 4**n for n in itertools.count()))


def answer_now(simulator: Simulator) -> None:
    """Have every call under way answered that the simulator would answer within a minute: its clock is put forward.

    A test that needs calls to be under way while it does something gives them ``PATIENCE_SECONDS`` as latency, and
    ends them by this: it waits for no time to pass, and none passes too early.
    """
    loop: Any = simulator._loop
    before = loop.time
    loop.time = lambda: before() + PATIENCE_SECONDS
    loop.call_soon_threadsafe(lambda: None)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """Run a private Redis; without a server on this machine the tests fail, they do not skip."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(redis_server: EmbeddedRedis) -> Iterator[Redis]:
    """Connect to the private Redis, to look at what was written there."""
    with Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """Run a provider that answers at once; a test sets ``profile`` for other behaviour."""
    with Simulator(Profile(api_keys=(API_KEY,))) as provider:
        yield provider


@pytest.fixture(scope="session")
def make_environ(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Environ:
    """Return a function that makes the environment of a fleet of its own, with ``ATTUNE_`` before each override."""
    nothing = tmp_path_factory.mktemp("config") / "attune.toml"
    nothing.touch()

    def make(simulator: Simulator, **overrides: object) -> dict[str, str]:
        values: dict[str, object] = {
            "CONFIG": nothing,
            "REDIS_URL": redis_server.url,
            "REDIS_TIMEOUT_SECONDS": PATIENCE_SECONDS / 2,  # a test that breaks Redis sets it
            "NAMESPACE": f"test-{uuid4().hex[:12]}",
            "RETRY__BACKOFF_SECONDS": 0.01,
            "ROUTING__EXPLORATION": 0,  # a test that wants chance says so
            "PROVIDERS__ANTHROPIC__BASE_URL": simulator.url,
            "PROVIDERS__ANTHROPIC__API_KEY": API_KEY,
            "PROVIDERS__OPENAI__BASE_URL": simulator.openai_url,
            "PROVIDERS__OPENAI__API_KEY": API_KEY,
            "PROVIDERS__OPENAI__PRICE_LIST": "openai",
            **overrides,
        }
        return {f"ATTUNE_{name}": str(value) for name, value in values.items()}

    return make


@pytest.fixture
def environ(make_environ: Environ, simulator: Simulator) -> dict[str, str]:
    """Return the environment of this test's fleet: its own namespace, its own simulator."""
    return make_environ(simulator)


@pytest.fixture
def settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings of this test's fleet."""
    return Settings.load(environ=environ)


@pytest.fixture
def records(settings: Settings) -> Iterator[Records]:
    """Return the job records of this test's namespace."""
    store = Records(settings)
    yield store
    store.close()


@pytest.fixture(scope="session")
def until() -> Until:
    """Return a function that looks again and again until what it looks at is true, and returns it."""

    def wait(look: Callable[[], Any]) -> Any:
        gives_up = time.monotonic() + PATIENCE_SECONDS
        while not (seen := look()):
            assert time.monotonic() < gives_up, "it did not happen"
            threading.Event().wait(0.01)
        return seen

    return wait


def process_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the full environment of a process: this one's, with the fleet's settings."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ}


@pytest.fixture(scope="module")
def start_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LocalWorker]]:
    """Return a function that starts a worker process and waits until it takes jobs; all are stopped in the end."""
    workers: list[LocalWorker] = []

    def start(environ: Mapping[str, str], *, loglevel: str = "info", **options: Any) -> LocalWorker:
        name = f"worker-{len(workers)}-{uuid4().hex[:6]}"
        log: Path = tmp_path_factory.mktemp(name) / "worker.log"
        worker = LocalWorker(name, process_environ(environ), log, **{"concurrency": 20, **options})
        worker._options += ["--loglevel", loglevel]
        workers.append(worker)
        worker.start()
        worker.wait_until_ready()
        return worker

    yield start
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.stop()


@dataclass
class RawServer:
    """A server that says exactly what a test tells it to, byte by byte, and keeps what it was sent.

    ``script`` is called for each request with the connection, after the request has arrived in full.
    """

    script: Callable[[socket.socket], None]
    received: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The JSON bodies of the requests."""
        return [json.loads(request.partition(b"\r\n\r\n")[2]) for request in self.received]

    def close(self) -> None:
        """Stop listening and end the thread."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # the client may hang up in the middle
                self.received.append(_read_request(connection))
                self.script(connection)


def _read_request(connection: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        request += _received(connection)
    head = request.partition(b"\r\n\r\n")[0]
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    whole = len(head) + 4 + int(lengths[0] if lengths else 0)
    while len(request) < whole:
        request += _received(connection)
    return request


def _received(connection: socket.socket) -> bytes:
    if not (data := connection.recv(65536)):
        raise ConnectionResetError("the client hung up before its request was complete")
    return data


@pytest.fixture
def raw_server() -> Iterator[Callable[[Callable[[socket.socket], None]], RawServer]]:
    """Return a function that starts a ``RawServer``; all are stopped in the end."""
    servers: list[RawServer] = []

    def start(script: Callable[[socket.socket], None]) -> RawServer:
        servers.append(RawServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
