import gc
import subprocess
import sys
import threading
import weakref

import pytest

from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.telemetry.snapshot import MAX_STAGES, Snapshot
from attune_worker.telemetry.store import Telemetry
from tests.conftest import process_environ


@pytest.fixture
def snapshot(telemetry):
    """What one process knows, refreshed often."""
    found = Snapshot(telemetry, 0.02)
    yield found
    found.close()


def test_a_stage_is_known_at_once_and_kept_fresh(learning, snapshot, until):
    """The first look asks Redis; what other workers learn afterwards arrives by itself."""
    learning.call("a/m")
    assert snapshot.view("w", "s").stage.seen == 1
    learning.call("a/m")
    until(lambda: snapshot.view("w", "s").stage.seen == 2)
    assert snapshot.view("w", "s").stage.of("a/m").recent == "11"


def test_looking_again_asks_nothing_of_redis(learning, telemetry):
    """Between two refreshes it is the same object, whatever happens in Redis."""
    snapshot = Snapshot(telemetry, 3600)
    learning.call("a/m")
    first = snapshot.view("w", "s")
    learning.call("a/m")
    assert snapshot.view("w", "s") is first
    snapshot.close()


def test_without_redis_nothing_is_known_until_it_is_back(settings, tmp_path, until):
    """A decision is made without it at once, and by what is known as soon as it can be read."""
    with EmbeddedRedis(tmp_path) as server:
        values = settings.model_dump() | {"redis_url": server.url}
        telemetry = Telemetry(Settings(**values))
        server.stop()
        snapshot = Snapshot(telemetry, 0.02)
        view = snapshot.view("w", "s")
        assert view.empty
        assert snapshot.view("another", "stage").empty
        server.start()
        until(lambda: snapshot.view("w", "s") is not view)
        snapshot.close()
        telemetry.close()


def test_stages_have_a_bound(telemetry):
    """The one unused for longest is forgotten first, and loaded again when it is needed."""
    snapshot = Snapshot(telemetry, 3600)
    first = snapshot.view("w", "s")
    for number in range(MAX_STAGES):
        snapshot.view("w", f"s{number}")
    assert len(snapshot._views) == len(snapshot._used) == MAX_STAGES
    assert snapshot.view("w", "s") is not first
    snapshot.close()


def test_many_threads_may_ask_for_the_same_new_stage(learning, telemetry):
    """One of them loads it; all get the same view."""
    snapshot = Snapshot(telemetry, 3600)
    learning.call("a/m")
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(snapshot.view("w", "s"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20
    assert len({id(view) for view in seen}) == 1
    snapshot.close()


FORK = """
import os, sys, time
from attune_worker.settings import Settings
from attune_worker.store.connection import connect
from attune_worker.store.keys import FleetKeys
from attune_worker.telemetry.snapshot import Snapshot
from attune_worker.telemetry.store import Telemetry
settings = Settings.load()
key = FleetKeys(settings.namespace).evidence("w", "s")
snapshot = Snapshot(Telemetry(settings), 0.02)
assert snapshot.view("w", "s").stage.seen == 0
child = os.fork()
if child == 0:
    connect(settings).hset(key, "n", 1)
gives_up = time.monotonic() + 60
while snapshot.view("w", "s").stage.seen == 0 and time.monotonic() < gives_up:
    time.sleep(0.01)
if child == 0:
    os._exit(snapshot.view("w", "s").stage.seen)
assert snapshot.view("w", "s").stage.seen == 1
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
assert connect(settings).hset(key, "n", 2) == 0
while snapshot.view("w", "s").stage.seen == 1 and time.monotonic() < gives_up:
    time.sleep(0.01)
assert snapshot.view("w", "s").stage.seen == 2
"""


def test_a_forked_process_learns_on(environ):
    """Celery's workers fork: parent and child both hear what the fleet learns, each by a thread of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", FORK],
        env=process_environ(environ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_a_snapshot_that_nobody_has_ends(telemetry, until):
    """Its thread does not keep it alive, and ends with it."""
    snapshot = Snapshot(telemetry, 0.02)
    snapshot.view("w", "s")
    thread, gone = snapshot._thread, weakref.ref(snapshot)
    del snapshot
    until(lambda: gc.collect() is not None and gone() is None)
    until(lambda: not thread.is_alive())
