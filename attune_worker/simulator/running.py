"""How is the simulator started and stopped? In a thread beside a test, or as a process of its own."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from attune_worker.simulator.profile import Profile
from attune_worker.simulator.server import SimulatorServer
from attune_worker.simulator.service import REMEMBERED_REQUESTS, Service

LOOPBACK = "127.0.0.1"
OPEN_FILES = 65_536

T = TypeVar("T")


class Simulator:
    """A simulated provider that serves from a background thread until it is closed.

    It listens as soon as it is made (``port=0``: a free port); use it as a context manager, or call
    ``close``. Raises ``ConfigurationError`` when it cannot listen.
    """

    def __init__(self, profile: Profile | None = None, port: int = 0, *, host: str = LOOPBACK) -> None:
        self._service = Service(profile or Profile())
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        listening: Future[int] = Future()
        self._thread = Thread(target=self._run, args=(port, listening), name="attune-simulator", daemon=True)
        self._thread.start()
        try:
            self.port = listening.result()
        except BaseException:
            self._thread.join()
            raise

    @property
    def url(self) -> str:
        """Where it listens: the ``base_url`` for the Anthropic format."""
        return _url(self._host, self.port)

    @property
    def openai_url(self) -> str:
        """The ``base_url`` for the OpenAI format, which ends in ``/v1``."""
        return f"{self.url}/v1"

    @property
    def profile(self) -> Profile:
        """How it behaves; a new profile holds for every call that arrives after it was set."""
        return self._service.profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        self._service.profile = profile

    def invoice(self, *, summary: bool = False) -> dict[str, Any]:
        """Return what ``GET /_sim/invoice`` shows."""
        return self._service.invoice.report(summary=summary)

    def requests(self, last: int = REMEMBERED_REQUESTS) -> dict[str, Any]:
        """Return what ``GET /_sim/requests`` shows."""
        return self._in_loop(lambda: self._service.requests(last))

    def subscriptions(self) -> dict[str, Any]:
        """Return what ``GET /_sim/subscriptions`` shows: calls and use of each subscription, by its shown name."""
        return self._in_loop(self._service.subscriptions)

    def reset(self) -> None:
        """Forget all calls, as ``POST /_sim/reset`` does; the profile stays."""
        self._in_loop(self._service.reset)

    def close(self) -> None:
        """Close every connection and end the thread; closing twice does no harm."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _in_loop(self, action: Callable[[], T]) -> T:
        """Run ``action`` where the calls are answered, so that it never meets one half done."""
        if not self._thread.is_alive():
            return action()

        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _run(self, port: int, listening: Future[int]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(_serve(self._service, self._host, port, self._stop, listening.set_result))
            except Exception as error:
                if listening.done():
                    raise
                listening.set_exception(error)


def serve(host: str = LOOPBACK, port: int = 0, profile: Profile | None = None) -> None:
    """Serve until SIGINT or SIGTERM, and print the URL once it listens.

    Raises ``ConfigurationError`` when it cannot listen.
    """
    _allow_many_connections()
    asyncio.run(_serve_until_signalled(Service(profile or Profile()), host, port))


async def _serve_until_signalled(service: Service, host: str, port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await _serve(service, host, port, stop, lambda bound: _announce(_url(host, bound)))


def _announce(url: str) -> None:
    # on standard output, so that a script can read where to send its calls
    print(url, flush=True)  # noqa: T201


async def _serve(service: Service, host: str, port: int, stop: asyncio.Event, started: Callable[[int], None]) -> None:
    """Serve until ``stop`` is set; ``started`` is told the port as soon as callers can connect."""
    server = SimulatorServer(service)
    started(server.listen(host, port))
    await stop.wait()
    await server.close()


def _allow_many_connections() -> None:
    """Raise this process's limit of open files, often 1024, so that thousands of callers can wait at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
