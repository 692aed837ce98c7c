"""How are the processes of a benchmark started, watched and ended?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

STOP_SECONDS = 15.0
MEGABYTE = 2**20


class BenchmarkError(Exception):
    """Raised when a run did not do what it should have measured."""


class Memory(NamedTuple):
    """Memory of a process tree in MB; pages that processes share count once in PSS, never in USS."""

    pss: float
    uss: float


class PythonProcess:
    """A Python program that runs while the context is entered, in a session of its own, its output in a file."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], folder: Path, log: str) -> None:
        self._command = [sys.executable, *arguments]
        self._environ = dict(environ)
        self._folder = folder
        self.log = folder / log

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                cwd=self._folder,  # no attune.toml or celeryconfig.py of the caller's
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends what it started
            )
        self.tree = ProcessTree(self._process.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM if kind is None else signal.SIGKILL)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            kind = kind or subprocess.TimeoutExpired
        if kind is not None:  # the leader alone was asked; now its children go too
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def check(self) -> None:
        """Raise ``BenchmarkError`` with the end of its output if the process has ended by itself."""
        if self._process.poll() is not None:
            raise BenchmarkError(f"it ended with exit code {self._process.returncode}:\n{self.trouble()}")

    def trouble(self, lines: int = 15) -> str:
        """Return the first errors and warnings in its output, or where there are none its last lines."""
        output = self.log.read_text(errors="replace").splitlines()
        troubles = [line for line in output if ": ERROR/" in line or ": WARNING/" in line or ": CRITICAL/" in line]
        return "\n".join(troubles[:lines] or output[-lines:])


class ProcessTree:
    """A process and its children, measured together."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._processes = [self._root]

    def look_again(self) -> None:
        """Find the children there are now; it reads the whole process list, so it is not done each time."""
        self._processes = [self._root, *self._root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far, in user and kernel."""
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._processes))

    def rss_mb(self) -> float:
        """Return the resident memory, in MB; pages shared between processes count in each of them."""
        return sum(process.memory_info().rss for process in self._processes) / MEGABYTE

    def memory(self) -> Memory:
        """Return what only the kernel's page tables know; slow, and USS where there is no PSS (not on Linux)."""
        details = [process.memory_full_info() for process in self._processes]
        uss = sum(detail.uss for detail in details) / MEGABYTE
        return Memory(pss=sum(getattr(detail, "pss", detail.uss) for detail in details) / MEGABYTE, uss=uss)
