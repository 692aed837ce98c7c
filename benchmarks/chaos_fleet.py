"""What became of each worker of the fleet? Workers in numbered places; one that goes is replaced by another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attune_worker.local import LocalWorker

CLOCK_HOUR_SECONDS = 3600
NEW_SECONDS = 6.0
"""A worker that has just been started runs nothing yet, so that it would show nothing to break it."""

LOG_BEGINS_CHARACTERS = 8_000
"""A worker has said so early in its log when it takes jobs."""

BY_ITSELF = "ended by itself"
DID_NOT_END = "killed: it did not end"
"""How workers end that should not."""

LIBFAKETIME = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")

_SHIFT = """\
import os, time
_seconds = int(os.environ["CHAOS_CLOCK_SHIFT_SECONDS"])
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _seconds
time.time_ns = lambda: _time_ns() + _seconds * 10**9
"""


@dataclass
class Life:
    """One worker process; times in seconds of the machine's monotonic clock.

    ``told``: when it was first told to end, if it was. ``how`` it ended; None: it lives.
    """

    name: str
    pid: int
    began: float
    clock_shift_seconds: int = 0
    told: float | None = None
    ended: float | None = None
    how: str | None = None
    stops: list[tuple[float, float]] = field(default_factory=list)

    def was_stopped(self, since: float, until: float) -> bool:
        """Whether it stood still at any moment in between."""
        return any(start < until and end > since for start, end in self.stops)


Maker = Callable[[str, Mapping[str, str], Path], LocalWorker]
"""Makes a worker of a name, with these additions to its environment and its log there."""


class Fleet:
    """Workers that are started, broken and replaced; ``lives`` keeps what became of each."""

    def __init__(self, places: int, make: Maker, folder: Path) -> None:
        self.lives: list[Life] = []
        self._make = make
        self._folder = folder
        self._here: list[tuple[LocalWorker, Life]] = []
        self._leaving: list[tuple[LocalWorker, Life]] = []
        self._stopped: dict[str, float] = {}
        self._started = 0
        for _ in range(places):
            self._here.append(self._start())

    def wait_until_ready(self) -> None:
        """Return once all take jobs."""
        for worker, _ in self._here:
            worker.wait_until_ready()

    def can_spare_one(self) -> bool:
        """Whether two or more take jobs: hit one, and another is there to see what becomes of it."""
        return sum(life.name not in self._stopped and _is_ready(worker) for worker, life in self._here) > 1

    def choose(self, choice: float) -> int:
        """Return the place of a worker that runs; ``choice``, 0 to 1, says which of those that are not new."""
        places = [place for place, (_, life) in enumerate(self._here) if life.name not in self._stopped]
        now = time.monotonic()
        busy = [place for place in places if now - self._here[place][1].began > NEW_SECONDS] or places
        return busy[int(choice * len(busy))]

    def kill(self, place: int) -> Life:
        """Kill a worker, put another in its place, and return the one that died."""
        worker, life = self._here[place]
        os.killpg(life.pid, signal.SIGKILL)
        assert worker.process is not None
        worker.process.wait()
        self._end(life, "killed")
        self._here[place] = self._start()
        return life

    def terminate(self, place: int, clock_shift_seconds: int = 0) -> None:
        """Tell a worker to end, and put another in its place at once."""
        worker, life = self._here[place]
        life.told, life.how = time.monotonic(), "told to end"
        worker.terminate()
        self._leaving.append((worker, life))
        self._here[place] = self._start(clock_shift_seconds)

    def stop(self, place: int) -> Life:
        """Have a worker stand still."""
        life = self._here[place][1]
        os.killpg(life.pid, signal.SIGSTOP)
        self._stopped[life.name] = time.monotonic()
        return life

    def resume(self, life: Life) -> None:
        """Let a worker that stands still go on."""
        began = self._stopped.pop(life.name, None)
        if began is not None:
            os.killpg(life.pid, signal.SIGCONT)
            life.stops.append((began, time.monotonic()))

    def look_after(self) -> None:
        """Note those that have ended, and replace those that did so by themselves, as a supervisor would."""
        for place, (worker, life) in enumerate(self._here):
            assert worker.process is not None
            if (code := worker.process.poll()) is not None:
                self._end(life, f"{BY_ITSELF} with exit code {code}")
                self._here[place] = self._start()
        for worker, life in list(self._leaving):
            assert worker.process is not None
            if (code := worker.process.poll()) is not None:
                self._end(life, f"told to end, exit code {code}")
                self._leaving.remove((worker, life))

    def end(self, seconds: float) -> None:
        """Tell all to end, and kill those that have not after ``seconds``."""
        everyone = [*self._here, *self._leaving]
        for _, life in everyone:
            self.resume(life)
        for worker, life in everyone:
            life.told = life.told or time.monotonic()
            worker.terminate()
        for worker, life in everyone:
            worker.stop(seconds)
            assert worker.process is not None
            code = worker.process.returncode
            self._end(life, DID_NOT_END if code == -signal.SIGKILL else f"told to end, exit code {code}")
        self._here, self._leaving = [], []

    def kill_all(self) -> None:
        """Leave nothing behind, whatever happened."""
        for worker, life in [*self._here, *self._leaving]:
            if worker.process is not None and worker.process.poll() is None:
                os.killpg(life.pid, signal.SIGKILL)
                worker.process.wait()
        self._here, self._leaving = [], []

    def _start(self, clock_shift_seconds: int = 0) -> tuple[LocalWorker, Life]:
        self._started += 1
        name = f"chaos-{self._started:03}"
        shifted = clock_shifted(self._folder, clock_shift_seconds) if clock_shift_seconds else {}
        worker = self._make(name, shifted, self._folder / f"{name}.log")
        worker.start()
        assert worker.process is not None
        life = Life(name, worker.process.pid, time.monotonic(), clock_shift_seconds)
        self.lives.append(life)
        return worker, life

    @staticmethod
    def _end(life: Life, how: str) -> None:
        life.ended, life.how = time.monotonic(), how


def _is_ready(worker: LocalWorker) -> bool:
    with worker.log.open(errors="replace") as log:
        return " ready." in log.read(LOG_BEGINS_CHARACTERS)


def clock_library() -> str | None:
    """Return the path of libfaketime, if it is installed."""
    found = (str(path) for pattern in LIBFAKETIME for path in Path("/").glob(pattern.removeprefix("/")))
    return next(found, None)


def clock_shifted(folder: Path, seconds: int) -> dict[str, str]:
    """Return what makes a Python process see another time: libfaketime where it is installed, else ``time.time``."""
    if (library := clock_library()) is not None:
        return {"LD_PRELOAD": library, "FAKETIME": f"{seconds:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    customized = folder / "shifted-clock"
    customized.mkdir(exist_ok=True)
    (customized / "sitecustomize.py").write_text(_SHIFT)
    return {"PYTHONPATH": str(customized), "CHAOS_CLOCK_SHIFT_SECONDS": str(seconds)}
