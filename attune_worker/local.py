"""How does one machine run a whole fleet for a while? Private Redis, simulator and workers as needed.

For the demo, for ``run --local``, and for tests; everything that was started here is stopped here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import ParamSpec, Self, TypeVar

from attune_worker.errors import AttuneError, ServiceUnavailableError
from attune_worker.settings import DEFAULT_PROVIDERS, Settings, masked
from attune_worker.store.connection import connect, reaching
from attune_worker.store.embedded import EmbeddedRedis, end_with_owner

STOP_SECONDS = 30.0

SERVICE_SETTINGS = frozenset({"ATTUNE_REDIS_URL", "ATTUNE_BROKER_URL", "ATTUNE_RESULT_BACKEND"})
"""The environment variables that say which services are used."""

PUT_OFF_SECONDS = 0.01

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_unbroken: set[CodeType] = set()


def unbroken(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Have signals that ``end_on_signals`` handles wait for the end of this function: half of it would be wrong."""
    _unbroken.add(function.__code__)
    return function


def end_on_signals() -> None:
    """Have this process clean up on SIGTERM as it does on Ctrl-C, and on either of them wherever it comes.

    Python drops what a finalizer raises, so a ``KeyboardInterrupt`` that falls into a ``__del__`` would be
    lost; there, and in ``unbroken`` functions, the signal is put off until they are done. A signal that the
    parent had ignored (``nohup``, a shell's background job) stays ignored.
    """

    def interrupt(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "__del__" or frame.f_code in _unbroken:
                signal.setitimer(signal.ITIMER_REAL, PUT_OFF_SECONDS)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


@contextmanager
def local_environment(
    environ: Mapping[str, str], folder: Path, say: Callable[[str], object], *, insist: bool
) -> Iterator[dict[str, str]]:
    """Yield ``environ`` with a Redis that can be reached: the configured one, else a private one in ``folder``.

    ``say`` is told which of them it is. With ``insist`` a Redis that was configured and is away is not
    replaced: ``ServiceUnavailableError`` is raised, as when no private one can be started.
    """
    settings = Settings.load(environ=environ)
    try:
        with closing(connect(settings)) as redis, reaching(settings):
            redis.ping()
    except ServiceUnavailableError as error:
        if insist and "redis_url" in settings.model_fields_set:
            raise
        say(f"No Redis at {error.url}: starting a private one.")
    else:
        say(f"Using Redis at {masked(settings.redis_url.get_secret_value())}.")
        yield dict(environ)
        return
    with EmbeddedRedis(folder / "redis") as redis_server:
        private = {name: value for name, value in environ.items() if name not in SERVICE_SETTINGS}
        yield private | {"ATTUNE_REDIS_URL": redis_server.url}


def simulated_providers(anthropic_url: str, openai_url: str) -> dict[str, str]:
    """Return the environment variables that point every default provider at a simulator."""
    pointed = {}
    for name, provider in DEFAULT_PROVIDERS.items():
        prefix = f"ATTUNE_PROVIDERS__{name.upper()}__"
        pointed[f"{prefix}BASE_URL"] = anthropic_url if provider["kind"] == "anthropic" else openai_url
        pointed[f"{prefix}API_KEY"] = "simulated"
    return pointed


class LocalWorker:
    """One worker process, as ``attune-worker worker`` starts it, with its log in a file."""

    def __init__(
        self,
        name: str,
        environ: Mapping[str, str],
        log: Path,
        *,
        concurrency: int = 50,
        pool: str = "threads",
        liveness_file: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._environ = dict(environ)
        self._options = ["--concurrency", str(concurrency), "--pool", pool, "--name", name]
        if liveness_file is not None:
            self._options += ["--liveness-file", str(liveness_file)]
        self.process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def start(self) -> None:
        """Start the process; it takes jobs about two seconds later."""
        self._asked = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "attune_worker", "worker", *self._options],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: we stop the workers in good order
                preexec_fn=end_with_owner(signal.SIGKILL),  # noqa: PLW1509  # one system call, which takes no lock
            )

    def check(self) -> None:
        """Raise ``AttuneError`` with the end of its log if the worker has ended by itself."""
        if self.process is not None and self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise AttuneError(f"worker {self.name} ended with exit code {self.process.returncode}:\n{tail}")

    def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Return once the worker takes jobs; raises ``AttuneError`` if it ended or took too long."""
        ends = time.monotonic() + timeout_seconds
        while " ready." not in self.log.read_text(errors="replace"):
            self.check()
            if time.monotonic() > ends:
                raise AttuneError(f"worker {self.name} was not ready after {timeout_seconds:g} s; see {self.log}")
            time.sleep(0.05)

    def terminate(self) -> None:
        """Ask the worker, once, to finish what it runs and end (SIGTERM); a second signal would hurry it."""
        if self.process is not None and self.process.poll() is None and not self._asked:
            self._asked = True
            self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """End the worker: first asking, then, after ``timeout_seconds``, killing it."""
        if self.process is None:
            return
        self.terminate()
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class LocalFleet:
    """Some workers on this machine, started on entering the context and stopped on leaving it."""

    def __init__(
        self, count: int, environ: Mapping[str, str], folder: Path, *, concurrency: int = 50, pool: str = "threads"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.workers = [
            LocalWorker(f"local-{index}", environ, folder / f"worker-{index}.log", concurrency=concurrency, pool=pool)
            for index in range(1, count + 1)
        ]

    def __enter__(self) -> Self:
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise ``AttuneError`` if a worker has ended by itself."""
        for worker in self.workers:
            worker.check()

    def wait_until_ready(self) -> None:
        """Return once all workers take jobs."""
        for worker in self.workers:
            worker.wait_until_ready()

    def stop(self) -> None:
        """Stop all workers at once, each finishing what it runs."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.stop()
