"""Do calls that block wait their turn, and only as long as somebody answers?"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from attune_worker.errors import ServiceUnavailableError
from attune_worker.line import THREADS, Line
from attune_worker.settings import Settings
from tests.conftest import PATIENCE_SECONDS, Stopwatch, Until

TIMEOUT_SECONDS = 0.2
SLACK_SECONDS = 2.0
URL = "redis://:hunter2@127.0.0.1:6379/0"


@pytest.fixture
def line() -> Iterator[Line]:
    settings = {"ATTUNE_REDIS_URL": URL, "ATTUNE_REDIS_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS)}
    line = Line(Settings.load(environ=settings), "test-line")
    yield line
    line.close()


class Blocked:
    """Calls that go on until they are let go, and count how many of them began."""

    def __init__(self) -> None:
        self.begun = 0
        self.released = threading.Event()

    def answered(self) -> str:
        self.begun += 1
        self.released.wait(PATIENCE_SECONDS)
        return "answer"

    def refused(self) -> str:
        self.answered()
        raise ServiceUnavailableError("no answer", url="redis://127.0.0.1:6380")


def fill(line: Line, function: Callable[[], str]) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(line.call(function)) for _ in range(THREADS)]


async def passed(seconds: float) -> None:
    """Return when the loop's clock has gone on by so much, for a claim about what has not happened by then."""
    await asyncio.sleep(seconds)


def test_line_that_moves_is_not_left(line: Line) -> None:
    """However long it is: a crowd that has to wait for its turn says nothing about Redis."""

    async def use() -> list[str]:
        blocked = Blocked()
        calls = [*fill(line, blocked.answered), *(asyncio.create_task(line.call(lambda: "next")) for _ in range(50))]
        await passed(2 * TIMEOUT_SECONDS)
        assert not any(call.done() for call in calls)
        blocked.released.set()
        return await asyncio.gather(*calls)

    assert asyncio.run(use()) == ["answer"] * THREADS + ["next"] * 50
    assert not line._overdue


def test_calls_in_line_are_given_up_when_those_before_them_hear_nothing(line: Line) -> None:
    """They never begin, and the error says so; a line that moves again is stood in again."""
    blocked, behind = Blocked(), Blocked()
    behind.released.set()

    async def use() -> None:
        first = fill(line, blocked.refused)
        calls = [asyncio.create_task(line.call(behind.answered)) for _ in range(50)]
        await passed(2 * TIMEOUT_SECONDS)
        blocked.released.set()
        for heard in await asyncio.gather(*first, return_exceptions=True):
            assert str(heard) == "no answer"
        for heard in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(heard, ServiceUnavailableError)
            assert str(heard).startswith("redis://127.0.0.1:6380 cannot be reached: after 0.2 s")
            assert str(heard).endswith("nothing of it was sent")
        assert behind.begun == 0
        assert await line.call(behind.answered) == "answer"

    asyncio.run(use())
    assert not line._overdue


def test_nobody_waits_much_longer_than_his_time(
    line: Line, stopwatch: Stopwatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the call has begun or stands in line, and if nothing at all is heard; the password stays hidden."""
    blocked = Blocked()

    async def use() -> None:
        ends = asyncio.get_running_loop().time() + TIMEOUT_SECONDS
        calls = [line.call(blocked.refused, ends) for _ in range(100)]
        heard = await asyncio.gather(*calls, return_exceptions=True)
        assert stopwatch.seconds < 2 * TIMEOUT_SECONDS + SLACK_SECONDS
        assert {type(error) for error in heard} == {ServiceUnavailableError}
        assert sum(str(error).endswith("no answer came in time") for error in heard) == THREADS
        assert not any("hunter2" in str(error) for error in heard)
        assert blocked.begun == THREADS
        blocked.released.set()

    asyncio.run(use())
    assert blocked.begun == THREADS
    assert caplog.records == []


def test_whose_turn_does_not_come_in_time_hears_so_and_of_no_outage(line: Line) -> None:
    """Calls are answered all the time, there are only too many of them."""
    begun: list[int] = []

    def slow() -> str:
        begun.append(1)
        time.sleep(TIMEOUT_SECONDS / 4)
        return "answer"

    async def use() -> None:
        ends = asyncio.get_running_loop().time()
        calls = [line.call(slow, ends) for _ in range(50 * THREADS)]
        heard = await asyncio.gather(*calls, return_exceptions=True)
        assert "answer" in heard
        last = heard[-1]
        assert isinstance(last, TimeoutError)

    asyncio.run(use())
    assert len(begun) < 50 * THREADS


def test_an_outage_that_is_over_gives_nobody_up(line: Line) -> None:
    """It was heard of before the caller came; now long calls hold the threads, and are answered."""
    refused, blocked = Blocked(), Blocked()
    refused.released.set()

    async def use() -> str:
        with pytest.raises(ServiceUnavailableError):
            await line.call(refused.refused)
        first = fill(line, blocked.answered)
        call = asyncio.create_task(line.call(lambda: "next"))
        await passed(2 * TIMEOUT_SECONDS)
        assert not call.done()
        blocked.released.set()
        await asyncio.gather(*first)
        return await call

    assert asyncio.run(use()) == "next"


def test_call_of_a_caller_who_has_gone_does_not_begin(line: Line, until: Until) -> None:
    """A request that was broken off while it stood in line sends nothing later."""
    blocked, gone = Blocked(), Blocked()

    async def use() -> None:
        first = fill(line, blocked.answered)
        call = asyncio.create_task(line.call(gone.answered))
        await asyncio.to_thread(until, lambda: blocked.begun == THREADS)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        blocked.released.set()
        await asyncio.gather(*first)
        assert await line.call(lambda: "next") == "next"

    asyncio.run(use())
    assert gone.begun == 0
