"""Is everything written that could not be at first, in order, and once?"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from attune_worker.errors import ServiceUnavailableError
from attune_worker.store import backlog as module
from attune_worker.store.backlog import Backlog
from attune_worker.store.outage import Outage

Until = Callable[[Callable[[], Any]], Any]


class Store:
    """What entries are written to, while it is there; its time passes faster than ours."""

    def __init__(self) -> None:
        self.there = True
        self.written: list[int] = []
        self.tries = 0
        self.gate = threading.Event()
        self.gate.set()
        self.seconds = 0.0
        self.outage = Outage(self._clock)
        self.backlog = Backlog(self._write, self.outage)

    def _clock(self) -> float:
        self.seconds += 1.0  # each look at the clock: a second
        return self.seconds

    def _write(self, entries: Sequence[int]) -> None:
        self.gate.wait()
        self.tries += 1
        if not self.there:
            raise ServiceUnavailableError("away")
        self.written += entries


@pytest.fixture
def store() -> Store:
    return Store()


def test_entries_are_written_in_order(store: Store, until: Until) -> None:
    """From a thread that ends when nothing is left, and begins again with the next entry."""
    for number in range(20):
        store.backlog.add(number)
    until(lambda: not len(store.backlog) and store.backlog._thread is None)
    assert store.written == list(range(20))
    store.backlog.add(20)
    until(lambda: store.written[-1] == 20)


def test_nothing_is_lost_while_the_store_is_away(store: Store, until: Until, caplog: pytest.LogCaptureFixture) -> None:
    """One warning when it goes and one line when it comes back, however many entries wait."""
    caplog.set_level(logging.INFO)
    store.there = False
    for number in range(50):
        store.backlog.add(number)
    until(lambda: store.tries > 1)
    assert (store.written, len(store.backlog)) == ([], 50)
    store.there = True
    until(lambda: not len(store.backlog))
    assert store.written == list(range(50))
    levels = [(record.levelname, record.message.partition(":")[0]) for record in caplog.records]
    assert levels == [
        ("WARNING", "settlements are kept until Redis answers"),
        ("INFO", "Redis answers again; 50 settlements wait to be written"),
    ]


def test_many_threads_add_at_once(store: Store, until: Until) -> None:
    """Each thread's entries stay in their order, and none is written twice."""
    threads = [
        threading.Thread(target=lambda base=base: [store.backlog.add(base + n) for n in range(100)])
        for base in range(0, 800, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not len(store.backlog))
    assert sorted(store.written) == list(range(800))
    for base in range(0, 800, 100):
        own = [entry for entry in store.written if base <= entry < base + 100]
        assert own == sorted(own)


def test_close_writes_what_is_left(store: Store) -> None:
    """Without waiting for the next turn of an outage that may be over."""
    store.gate.clear()
    for number in range(10):
        store.backlog.add(number)
    store.gate.set()
    store.backlog.close(30)
    assert store.written == list(range(10))


def test_close_says_what_it_could_not_write(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """It gives up after the time it was given, and the log has the number."""
    store.there = False
    for number in range(3):
        store.backlog.add(number)
    store.backlog.close(0.05)
    assert "3 settlements could not be written" in caplog.text
    store.there = True


def test_nothing_goes_on_after_the_close(store: Store, until: Until) -> None:
    """What could not be written in that time is given up, and no thread keeps on trying."""
    store.there = False
    store.backlog.add(1)
    thread = store.backlog._thread
    assert thread is not None
    store.backlog.close(0.05)
    until(lambda: not thread.is_alive())
    store.there = True


def test_full_is_said_before_memory_is(store: Store) -> None:
    """Whoever would need a place begins nothing; what is under way still finds one."""
    store.gate.clear()
    for number in range(module.CAPACITY):
        store.backlog.add(number)
    assert store.backlog.full
    store.backlog.add(-1)
    store.gate.set()
    store.backlog.close(30)
    assert store.written[-1] == -1
    assert not store.backlog.full


def test_fork_writes_only_its_own(store: Store, until: Until) -> None:
    """What the parent keeps, the parent writes: a prefork worker's child begins with nothing."""
    store.gate.clear()
    store.backlog.add(1)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        store.gate.set()
        store.backlog.add(2)
        store.backlog.close(30)
        os.write(write, repr(store.written).encode())
        os._exit(0)
    store.gate.set()
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"[2]"
    os.close(read)
    os.close(write)
    until(lambda: not len(store.backlog))
    assert store.written == [1]


def test_fork_under_a_crowd_finds_no_lock_held(store: Store) -> None:
    """Whoever held it is not in the child."""
    with store.backlog._lock:
        if (child := os.fork()) == 0:
            store.backlog.add(1)
            store.backlog.close(30)
            os._exit(0 if store.written == [1] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_end_of_the_process_closes_those_that_nobody_closed(store: Store) -> None:
    """One that was closed had its time, and is not waited for again."""
    given_up = Store()
    given_up.there = False
    given_up.backlog.add(1)
    given_up.backlog.close(0)
    store.gate.clear()
    store.backlog.add(2)
    store.gate.set()
    module._close_all()
    assert (store.written, given_up.written) == ([2], [])
    given_up.there = True
