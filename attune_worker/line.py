"""How does an event loop make calls that block? In a few threads; the others stand in line, if it moves."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings, masked

T = TypeVar("T")

THREADS = 8
"""Round trips under way at once."""


class Line:
    """Runs blocking calls in a few threads, in the order in which they come.

    While calls are answered, the line takes as long as it takes. While Redis or the broker is away, each call may cost
    a whole timeout. So one that has stood in line for ``redis_timeout_seconds`` is given up then, and never begins.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self._patience_seconds = settings.redis_timeout_seconds
        self._url = masked(settings.redis_url.get_secret_value())
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=name)
        self._overdue: set[Future[Any]] = set()
        self._answered_at = self._failed_at = -math.inf  # by the monotonic clock
        self._failed_url = self._url

    async def call(self, function: Callable[[], T], ends: float | None = None) -> T:
        """Return what ``function`` returns.

        Raises ``ServiceUnavailableError`` when it was given up in line; nothing has been sent then. ``ends`` is the end
        of the caller's time, by the loop's clock: one ``redis_timeout_seconds`` later this raises in any case, also if
        the call has begun, and ``TimeoutError`` if only its turn did not come. Give it only for a call that may go on
        unheard.
        """
        loop, joined = asyncio.get_running_loop(), time.monotonic()
        overdue = loop.time() + self._patience_seconds
        gives_up = None if ends is None else ends + self._patience_seconds
        call = self._threads.submit(self._run, function)
        answer = asyncio.wrap_future(call)
        try:
            if not await _answered(answer, overdue if gives_up is None else min(overdue, gives_up)):
                self._overdue.add(call)  # first, so that either this or a thread that hears of an outage gives it up
                if self._is_away(joined):
                    call.cancel()  # which does nothing to a call that has begun
                await _answered(answer, gives_up)
            if answer.done() and not answer.cancelled():
                return answer.result()
            outage = call.cancelled() or self._is_away(joined)
            begun = not call.cancel()
            if not begun and not outage and self._answered_at >= joined:
                raise TimeoutError
            raise self._unanswered(begun=begun)
        finally:
            self._overdue.discard(call)
            answer.cancel()  # also if it is an error: asyncio would log one at which nobody has looked

    def close(self) -> None:
        """Take no more calls, and end the threads when those in line are done."""
        self._threads.shutdown(wait=False)

    def _run(self, function: Callable[[], T]) -> T:
        try:
            answer = function()
        except ServiceUnavailableError as error:
            self._failed_url, self._failed_at = error.url or self._url, time.monotonic()
            for call in tuple(self._overdue):
                call.cancel()
            raise
        self._answered_at = time.monotonic()
        return answer

    def _is_away(self, since: float) -> bool:
        """Whether the last that was heard since then is that there was no answer."""
        return self._failed_at >= since and self._failed_at >= self._answered_at

    def _unanswered(self, *, begun: bool) -> ServiceUnavailableError:
        url = self._failed_url
        outcome = "no answer came in time"
        if not begun:
            waited = f"{self._patience_seconds:g} s (redis_timeout_seconds)"
            outcome = f"after {waited} in line behind others this call was given up, and nothing of it was sent"
        return ServiceUnavailableError(f"{url} cannot be reached: {outcome}", url=url)


async def _answered(answer: asyncio.Future[Any], until: float | None) -> bool:
    """Wait, and return whether there is an answer now. Unlike ``wait_for`` this leaves the future alone."""
    seconds = None if until is None else max(0.0, until - asyncio.get_running_loop().time())
    done, _ = await asyncio.wait({answer}, timeout=seconds)
    return bool(done)
