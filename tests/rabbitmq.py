"""Where does a RabbitMQ for tests come from? A private node of the one that is installed, on loopback only."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from attune_worker.store.embedded import end_with_owner, free_port

START_SECONDS = 60.0
STOP_SECONDS = 30.0
INSTALL = "RabbitMQ is not installed: apt-get install rabbitmq-server (Debian, Ubuntu), brew install rabbitmq (macOS)"

_PLACES = (Path("/usr/lib/rabbitmq/bin"), Path("/opt/homebrew/sbin"), Path("/usr/local/sbin"))
"""Debian's own ``rabbitmq-server`` on the PATH insists on running as the system's user."""

_CONFIGURATION = """\
listeners.tcp.local = 127.0.0.1:{port}
default_user = {user}
default_pass = {password}
log.console = false
log.file.level = info
vm_memory_high_watermark.absolute = 1GB
disk_free_limit.absolute = 1MB
"""


def find_program(name: str) -> str:
    """Return the path of one of RabbitMQ's programs; the test fails, and says what to install, if there is none."""
    for place in _PLACES:
        if (place / name).exists():
            return str(place / name)
    path = shutil.which(name)
    assert path is not None, INSTALL
    return path


class RabbitMQ:
    """A RabbitMQ node with ports, data and an Erlang name service of its own, running while the context is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.url = ""
        self._environ: dict[str, str] = {}
        self._epmd: subprocess.Popen[bytes] | None = None
        self._node: subprocess.Popen[bytes] | None = None

    def _configure(self) -> None:
        """Choose ports that are free now, and a password; write them where the node reads them."""
        self.port, dist_port, epmd_port = free_port(), free_port(), free_port()
        user, password = "attune", secrets.token_hex(8)
        self.url = f"amqp://{user}:{password}@127.0.0.1:{self.port}//"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rabbitmq.conf").write_text(_CONFIGURATION.format(port=self.port, user=user, password=password))
        (self.folder / "plugins").write_text("[].\n")
        (self.folder / "env.conf").touch()
        self._environ = {
            **os.environ,
            "HOME": str(self.folder),  # the cookie that nodes and their tools share is kept there
            "RABBITMQ_NODENAME": f"attune-{self.port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2",
            "RABBITMQ_CTL_ERL_ARGS": "+S 1:1",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP": str(self.folder / "erl_crash.dump"),  # a tool that fails leaves it where it was started
        }

    def start(self) -> None:
        """Start the node, on the ports that it had if it ran before, and wait until it takes connections."""
        if self._epmd is not None:
            assert (log := self._start_node()) is None, log
            return
        for _ in range(3):  # ports are free when we look, and may be taken when the node asks for them
            self._configure()
            epmd = shutil.which("epmd")
            assert epmd is not None, INSTALL
            self._epmd = self._spawn([epmd, "-port", self._environ["ERL_EPMD_PORT"], "-address", "127.0.0.1"])
            if (log := self._start_node()) is None:
                return
            self._stop_all()
        raise AssertionError(log)

    def _start_node(self) -> str | None:
        """Start the node and wait until it takes connections; returns the end of its log if it never does."""
        self._node = self._spawn([find_program("rabbitmq-server")])
        ends = time.monotonic() + START_SECONDS
        while self._node.poll() is None and time.monotonic() < ends:
            try:
                self.control("await_startup", "--timeout", "30")
            except subprocess.CalledProcessError:
                continue
            return None
        return (self.folder / "output.log").read_text(errors="replace")[-2000:]

    def control(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` against this node and return what it says."""
        command = [find_program("rabbitmqctl"), "--quiet", *arguments]
        return subprocess.run(
            command, env=self._environ, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ).stdout

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop the node; what it has written down stays in the folder."""
        if self._node is not None:
            _end(self._node, how)
            self._node = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_all()

    def _stop_all(self) -> None:
        """Stop the node and its name service."""
        self.stop()
        if self._epmd is not None:
            _end(self._epmd, signal.SIGTERM)
            self._epmd = None

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_owner(),  # noqa: PLW1509  # one system call, which takes no lock
            )


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """End a process with all that it started, which share its session; it may have ended by itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
