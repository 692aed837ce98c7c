"""What does an example need around it? A private Redis, a simulated provider, and processes that end with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from attune_worker.local import LocalWorker
from attune_worker.simulator import Simulator
from attune_worker.store.embedded import EmbeddedRedis

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE_SECONDS = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class Stack:
    """A running Redis and simulator, and the environment in which programs find them."""

    folder: Path
    environ: Mapping[str, str]
    simulator: Simulator

    @contextmanager
    def worker(self, **environ: str) -> Iterator[LocalWorker]:
        """Run a worker that takes jobs."""
        worker = LocalWorker("examples", {**self.environ, **environ}, self.folder / "worker.log", concurrency=50)
        worker.start()
        try:
            worker.wait_until_ready()
            yield worker
        finally:
            worker.stop()

    @contextmanager
    def program(self, name: str, command: Sequence[str], cwd: Path = ROOT, **environ: str) -> Iterator[Path]:
        """Run a program and give its log; it and its children are gone afterwards."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**self.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield log
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_SECONDS)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """Start Redis and the simulator; programs of the stack see nothing of this machine's own settings."""
    own = ("ATTUNE_", "FLOWER_", "ANTHROPIC_", "OPENAI_", "GEMINI_", "DJANGO_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    with EmbeddedRedis(folder / "redis") as redis, Simulator() as simulator:
        environ |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "ATTUNE_REDIS_URL": redis.url,
            "ANTHROPIC_API_KEY": "simulated",
            "ATTUNE_PROVIDERS__ANTHROPIC__BASE_URL": simulator.url,
        }
        yield Stack(folder, environ, simulator)


def eventually(look: Callable[[], T | None], what: str, within_seconds: float = PATIENCE_SECONDS) -> T:
    """Return the first true thing that ``look`` returns; fails when there is none in time."""
    ends = time.monotonic() + within_seconds
    while not (found := look()):
        assert time.monotonic() < ends, f"not within {within_seconds:g} s: {what}"
        time.sleep(0.05)
    return found
