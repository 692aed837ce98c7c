"""Does a process know whether it is still taken for alive?"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import FleetKeys
from attune_worker.store.leases import Leases
from attune_worker.worker.liveness import Lease

Until = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def environ(make_environ: Any, simulator: Simulator) -> dict[str, str]:
    """An eighth of a lease Redis may take to answer; where one must be over, the test sees to that itself."""
    environ: dict[str, str] = make_environ(simulator, RECOVERY__LEASE_SECONDS=8)
    return environ


@pytest.fixture
def lease(settings: Settings) -> Iterator[Lease]:
    found = Lease(settings)
    yield found
    found.stop()


@pytest.fixture
def leases(settings: Settings) -> Iterator[Leases]:
    with closing(Leases(settings)) as found:
        yield found


def test_lease_is_held_before_anything_is_claimed_under_it(lease: Lease, leases: Leases) -> None:
    """Or else the job would at once be taken for one whose worker is gone."""
    assert leases.live() == {}
    held = lease.id
    assert set(leases.live()) == {held}
    assert lease.holds(held)
    assert not lease.holds("")
    assert not lease.holds("another")
    host, pid, random = lease.id.rsplit(":", 2)
    assert host
    assert (int(pid), len(random)) == (os.getpid(), 8)


def test_lease_is_renewed_for_as_long_as_the_process_lives(
    make_environ: Any, simulator: Simulator, until: Until, redis: Redis
) -> None:
    """Again and again before it is over; and given up at its end, so that nobody has to wait for that."""
    settings = Settings.load(environ=make_environ(simulator, RECOVERY__LEASE_SECONDS=2))
    lease, leases = Lease(settings), Leases(settings)
    lease.start()
    lease.start()
    first = lease.id
    ends_ms: list[float] = []

    def two_leases_have_passed() -> bool:
        ends_ms.append(redis.zscore(FleetKeys(settings.namespace).workers, first) or 0)
        return ends_ms[-1] > ends_ms[0] + 4000

    until(two_leases_have_passed)
    assert len(set(ends_ms)) > 3
    until(lambda: lease.holds(first))
    lease.stop()
    assert leases.live() == {}
    leases.close()
    assert not lease.holds(first)


def test_process_that_was_taken_for_dead_takes_a_new_lease(
    lease: Lease, leases: Leases, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    """Its old one never holds again; the log says once what happened."""
    lost = lease.id
    lease.start()
    leases.drop(lost)
    until(lambda: lease.id != lost)
    assert not lease.holds(lost)
    assert set(leases.live()) == {lease.id}
    assert caplog.text.count("taken for dead") == 1


def test_lease_that_nobody_renewed_is_asked_about_before_the_next_claim(lease: Lease, leases: Leases) -> None:
    """A process that stood still claims no job under a lease that others may have taken away meanwhile."""
    lost = lease.id
    leases.drop(lost)
    lease._held_until = time.monotonic()  # it is over, by its own clock
    assert not lease.holds(lost)
    assert lease.id != lost
    assert set(leases.live()) == {lease.id}


def test_lease_that_was_late_and_not_missed_goes_on(lease: Lease) -> None:
    """Nobody had judged it, so its jobs are still its own."""
    first = lease.id
    lease._held_until = time.monotonic()
    assert not lease.holds(first)
    assert lease.id == first
    assert lease.holds(first)


def test_crowd_of_threads_shares_one_lease(lease: Lease, leases: Leases) -> None:
    """Whoever comes first takes it."""
    seen: list[str] = []
    start = threading.Barrier(16)

    def claim() -> None:
        start.wait()
        seen.append(lease.id)

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1
    assert set(leases.live()) == set(seen)


def test_child_process_has_a_lease_of_its_own(lease: Lease, leases: Leases) -> None:
    """In a pool of processes each may die alone."""
    lease.start()
    parent = lease.id
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here
        ours = not lease.holds(parent) and f":{os.getpid()}:" in lease.id and lease.holds(lease.id)
        lease.start()
        lease.stop()
        os.write(writer, b"y" if ours else b"n")
        os._exit(0)
    assert os.read(reader, 1) == b"y"
    os.waitpid(child, 0)
    assert lease.holds(parent)
    assert set(leases.live()) == {parent}


def test_lease_outlives_redis_for_its_time_and_no_longer(
    make_environ: Any, simulator: Simulator, tmp_path: Path, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that cannot renew it knows when it may be over, and takes it up again when Redis is back."""
    with EmbeddedRedis(tmp_path, configuration="appendfsync always\n") as server:
        environ = make_environ(simulator, REDIS_URL=server.url, REDIS_TIMEOUT_SECONDS=0.5, RECOVERY__LEASE_SECONDS=4)
        lease = Lease(Settings.load(environ=environ))
        lease.start()
        first = lease.id
        server.stop()
        assert lease.holds(first)
        until(lambda: not lease.holds(first))
        with pytest.raises(ServiceUnavailableError):
            lease.id  # noqa: B018  # reading it is what is tried
        until(lambda: "not renewed" in caplog.text)
        server.start()
        until(lambda: lease.holds(first))
        assert lease.id == first
        lease.stop()
    assert server._password not in caplog.text
