"""What can a provider that breaks every rule do to the worker that calls it, and to the other jobs?"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from attune_worker.budget import Budgets
from attune_worker.client import Client
from attune_worker.jobs import JobResult, JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, RawServer, Stopwatch, process_environ

SECRET = "zebra-crossing-4711"
SOON = 60.0
MEGABYTE = 2**20
TIMEOUT_SECONDS = 5.0
MAX_RESPONSE_BYTES = 8 * MEGABYTE
MEMORY_BYTES = 60 * MEGABYTE
"""What one answer at the limit may cost: the answer, its text, and what Python and C keep of both for a while."""

Script = Callable[[socket.socket], None]


class Target:
    """A worker that calls a server of ours for one model, and a simulator that behaves for all others."""

    def __init__(self, environ: dict[str, str], worker: LocalWorker, server: RawServer) -> None:
        self.environ = environ
        self.client = Client(Settings.load(environ=environ))
        self.server = server
        self.worker = worker
        self._heard = 0

    @property
    def process(self) -> psutil.Process:
        assert self.worker.process is not None
        return psutil.Process(self.worker.process.pid)

    def ask(self, script: Script) -> JobResult:
        """Have a job ask the server, which does as ``script`` says."""
        self.server.script = script
        return self.client.submit("summarize", SECRET, model="gpt-6-luna", max_tokens=50).result(SOON)

    def serves(self) -> bool:
        """Whether the next job is done, by the process that was there before."""
        assert self.worker.process is not None
        result = self.client.submit("summarize", "?", model="claude-haiku-5-5").result(SOON)
        return result.status is JobStatus.SUCCEEDED and self.worker.process.poll() is None

    def said(self) -> str:
        """Return the log since the last look."""
        with self.worker.log.open("rb") as log:
            log.seek(self._heard)
            text = log.read()
            self._heard += len(text)
        return text.decode(errors="replace")

    def measured(self, script: Script) -> tuple[JobResult, int]:
        """Return what came of asking, and how many bytes of memory more than before it took at its peak."""
        self.serves()  # what the process needs in any case is there now
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        before = self._peak_bytes()
        result = self.ask(script)
        return result, self._peak_bytes() - before

    def _peak_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.fixture(scope="module")
def shared_target(make_environ: Environ, start_worker: Callable[..., LocalWorker]) -> Iterator[Target]:
    server = RawServer(lambda _: None)
    with Simulator() as simulator:
        environ = make_environ(
            simulator,
            PROVIDERS__OPENAI__BASE_URL=f"{server.url}/v1",
            HTTP__REQUEST_TIMEOUT_SECONDS=TIMEOUT_SECONDS,
            HTTP__MAX_RESPONSE_BYTES=MAX_RESPONSE_BYTES,
            RETRY__MAX_ATTEMPTS=1,
            BREAKER__FAILURE_THRESHOLD=100,
            AUTH__RECHECK_SECONDS=0.01,  # a key that one test has refused is there for the next
            BUDGETS='[{"per": "day", "limit_usd": 1000}]',
        )
        target = Target(environ, start_worker(environ, loglevel="debug", concurrency=1), server)
        yield target
        target.worker.stop()
        target.client.close()
    server.close()


@pytest.fixture
def target(shared_target: Target) -> Iterator[Target]:
    """Return the worker; after each test it serves others, and has said nothing that is nobody's business."""
    shared_target.said()
    yield shared_target
    assert shared_target.serves()
    log = shared_target.said()
    for secret in (SECRET, API_KEY, "\x1b"):
        assert secret not in log


def answers(*parts: bytes) -> Script:
    return lambda connection: connection.sendall(b"".join(parts))


def ok(body: bytes, *headers: bytes) -> Script:
    """Answer with status 200, the right length, and ``headers``."""
    head = [b"HTTP/1.1 200 OK", b"Connection: close", b"Content-Length: %d" % len(body), *headers, b"", b""]
    return answers(b"\r\n".join(head), body)


def completion(content: object = "fine", **changes: Any) -> bytes:
    """Return the body of an answer, with the fields that a test changes."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    return json.dumps({"model": "gpt-6-luna", "choices": [choice], "usage": usage, **changes}).encode()


def assert_failed(result: JobResult, kind: str) -> None:
    """The job ended with one failed call and an error of this type, which repeats nothing of the prompt."""
    assert result.error is not None
    assert (result.status, result.error.type) == (JobStatus.FAILED, kind)
    assert [attempt.error_type for attempt in result.attempts] == [kind]
    assert SECRET not in result.model_dump_json()


def floods(*headers: bytes, frame: bytes = b"%b") -> Script:
    """Send 500 MB, or as much of it as is taken."""
    piece = frame.replace(b"%b", b"x" * MEGABYTE)

    def script(connection: socket.socket) -> None:
        connection.sendall(b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"", b""]))
        for _ in range(500):
            connection.sendall(piece)

    return script


@pytest.mark.parametrize(
    "script",
    [
        floods(b"Content-Length: %d" % (500 * MEGABYTE)),
        floods(b"Connection: close"),
        floods(b"Transfer-Encoding: chunked", frame=b"100000\r\n%b\r\n"),
    ],
    ids=["with its length", "without a length", "in chunks"],
)
def test_answer_of_500_mb_does_not_fill_the_memory(target: Target, script: Script) -> None:
    """Reading stops at the limit; the job fails with a typed error, and the process has grown by little."""
    result, grown = target.measured(script)
    assert_failed(result, "malformed_answer")
    assert grown < MEMORY_BYTES


@cache
def packed(times: int) -> bytes:
    """Return 300 MB of zeros, packed so many times."""
    packer = zlib.compressobj(1, wbits=31)
    data = b"".join([*(packer.compress(bytes(MEGABYTE)) for _ in range(300)), packer.flush()])
    for _ in range(times - 1):
        packer = zlib.compressobj(wbits=31)
        data = packer.compress(data) + packer.flush()
    return data


@pytest.mark.parametrize("times", [1, 2])
def test_packed_answer_does_not_fill_the_memory(target: Target, times: int) -> None:
    """A megabyte, packed twice a few kilobytes, stands for 300: no more than the limit of an answer is unpacked."""
    encoding = b"Content-Encoding: " + b", ".join([b"gzip"] * times)
    result, grown = target.measured(ok(packed(times), encoding))
    assert_failed(result, "malformed_answer")
    assert grown < MEMORY_BYTES


def test_packed_answer_of_reasonable_size_is_read(target: Target) -> None:
    """A proxy on the way may pack what nobody asked it to."""
    packer = zlib.compressobj(wbits=31)
    body = packer.compress(completion()) + packer.flush()
    assert target.ask(ok(body, b"Content-Encoding: gzip")).content == "fine"


def test_answer_that_drips_ends_with_its_time(target: Target, stopwatch: Stopwatch) -> None:
    """A byte now and then keeps no worker longer than the call's own time."""
    over = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
        while not over.wait(0.5):
            connection.sendall(b" ")

    began = stopwatch.seconds
    result = target.ask(script)
    over.set()
    assert_failed(result, "timeout")
    assert result.cost_usd is None
    assert stopwatch.seconds - began < TIMEOUT_SECONDS + 10


def test_redirect_hands_nothing_to_others(target: Target) -> None:
    """Neither the prompt nor the key goes to an address that the provider names."""
    other = RawServer(ok(completion()))
    location = f"Location: {other.url}/v1/chat/completions\r\n".encode()
    for status in (301, 307, 308):
        head = b"HTTP/1.1 %d Go\r\nConnection: close\r\nContent-Length: 0\r\n" % status
        assert_failed(target.ask(answers(head, location, b"\r\n")), "malformed_answer")
    other.close()
    assert other.received == []


LIES = {
    "more than comes": (b"Content-Length: 5000", "connection"),
    "less than comes": (b"Content-Length: 20", "malformed_answer"),
    "less than nothing": (b"Content-Length: -1", "connection"),
    "no number": (b"Content-Length: NaN", "connection"),
    "a number of 10,000 digits": (b"Content-Length: " + b"9" * 10_000, "connection"),
    "two lengths": (b"Content-Length: 5\r\nContent-Length: 6", "connection"),
}


@pytest.mark.parametrize(("length", "kind"), LIES.values(), ids=LIES)
def test_length_that_is_a_lie_is_a_typed_error(target: Target, length: bytes, kind: str) -> None:
    """Half an answer is none, and what comes after an answer is no part of it."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + length + b"\r\n\r\n"
    assert_failed(target.ask(answers(head, completion())), kind)


def test_what_follows_an_answer_is_not_the_answer_to_the_next_job(target: Target) -> None:
    """A server that sends more than it says cannot put an answer into another job's mouth."""
    smuggled = completion("of the other job")
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"

    def script(connection: socket.socket) -> None:
        first = completion("first")
        connection.sendall(answer % (len(first), first) + answer % (len(smuggled), smuggled))
        connection.settimeout(PATIENCE_SECONDS)
        while connection.recv(65536):  # a second request, or the end
            pass

    assert target.ask(script).content == "first"
    second = target.ask(ok(completion("second")))
    assert second.content in {"second", None}


BODIES = {
    "no UTF-8": completion().replace(b"fine", b"\xff\xfe"),
    "half a character": completion().replace(b'"fine"', b"\xc3"),
    "endless nesting": b'{"choices":' + b"[" * 200_000,
    "a number of 10,000 digits": completion().replace(b"12", b"9" * 10_000),
    "NaN as a count": completion().replace(b"12", b"NaN"),
    "an HTML page": b"<html>Bad gateway</html>",
    "a list": b"[]",
    "nothing": b"",
    "a negative count": completion(usage={"prompt_tokens": -5, "completion_tokens": 7}),
    "a count beyond all bounds": completion(usage={"prompt_tokens": 10**30, "completion_tokens": 7}),
    "a count of 1e300": completion(usage={"prompt_tokens": 1e300, "completion_tokens": 7}),
    "a count in words": completion(usage={"prompt_tokens": "five", "completion_tokens": 7}),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_answer_that_is_none_is_malformed(target: Target, body: bytes) -> None:
    """Its cost is unknown, not zero, and the budget counts neither less than nothing nor a fortune."""
    result = target.ask(ok(body))
    assert_failed(result, "malformed_answer")
    assert result.cost_usd is None
    [status] = Budgets(target.client.settings).status()
    assert 0 <= status.spent_usd < 1
    assert status.reserved_usd == 0


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 10**6}},
        {"prompt_tokens": 5, "completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 9}},
        None,
        {},
    ],
    ids=["more from the cache than in all", "more thought than said", "none", "empty"],
)
def test_counts_that_contradict_each_other_leave_the_answer_and_no_cost(target: Target, usage: Any) -> None:
    """The answer is paid for and good; what it cost is unknown."""
    result = target.ask(ok(completion(usage=usage)))
    assert (result.content, result.usage, result.cost_usd) == ("fine", None, None)


WAITS = [b"-5", b"NaN", b"inf", b"1e400", b"9" * 10_000, b"Sat, 99 Foo 9999 99:99:99 GMT", b"\xff\xfe", b""]
LIMITS = b"".join(
    b"x-ratelimit-%b-%b: %b\r\n" % (field, kind, value)
    for kind in (b"requests", b"tokens")
    for field, value in [(b"limit", b"-1"), (b"remaining", b"9" * 400), (b"reset", b"NaN")]
)


@pytest.mark.parametrize("wait", WAITS, ids=repr)
def test_wait_that_makes_no_sense_counts_as_not_given(target: Target, wait: bytes) -> None:
    """Nobody waits for a century, nor less than no time; the job hears that it was refused."""
    refusal = json.dumps({"error": {"message": "slow down", "type": "rate_limit_error"}}).encode()
    head = b"HTTP/1.1 500 Oops\r\nConnection: close\r\nRetry-After: %b\r\n%bContent-Length: %d\r\n\r\n"
    result = target.ask(answers(head % (wait[:10_000], LIMITS, len(refusal)), refusal))
    assert_failed(result, "overloaded")
    assert result.error is not None
    assert result.error.retry_after is None


@pytest.mark.parametrize(
    "head", [b"X-Long: " + b"x" * 300_000, b"x: y\r\n" * 100_000, b"no colon at all"], ids=["long", "many", "no colon"]
)
def test_headers_without_end_are_a_broken_connection(target: Target, head: bytes) -> None:
    """They are not collected; where there are many, reading ends long before memory does."""
    result, grown = target.measured(answers(b"HTTP/1.1 200 OK\r\n", head, b"\r\n\r\n"))
    assert_failed(result, "connection")
    assert grown < MEMORY_BYTES


def refuses(status: int, message: str, *headers: bytes) -> Script:
    body = json.dumps({"error": {"message": message, "type": f"bad\x1b[31m{SECRET}", "code": SECRET}}).encode()
    lines = [b"HTTP/1.1 %d No" % status, b"Connection: close", b"Content-Length: %d" % len(body), *headers, b"", b""]
    return answers(b"\r\n".join(lines), body)


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_refusal_that_quotes_prompt_and_key_keeps_them_out_of_the_log(target: Target, status: int) -> None:
    """The job's own record may hold the provider's words, on one line; the log, which others read, does not."""
    result = target.ask(refuses(status, f"\x1b[2J\r\n you said {SECRET}", b"x-request-id: \x1b[31mreq"))
    assert result.error is not None
    assert result.status is JobStatus.FAILED
    assert result.error.message.isprintable()
    assert SECRET not in result.error.type
    assert [attempt.request_id for attempt in result.attempts] == [None]


CONTROLS = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\rforged\x08\x00 \u202etxt.exe"


def test_answer_with_control_characters_does_nothing_to_a_terminal(target: Target) -> None:
    """It is kept as it came, and shown without what a terminal would act upon."""
    changes = {"model": f"gpt{CONTROLS}", "system_fingerprint": CONTROLS}
    body = json.loads(completion(CONTROLS, **changes))
    body["choices"][0]["finish_reason"] = CONTROLS
    result = target.ask(ok(json.dumps(body).encode()))
    assert (result.content, result.model_id) == (CONTROLS, "gpt-6-luna")
    for options in ([], ["--content"], ["--json", "--content"]):
        shown = subprocess.run(
            [sys.executable, "-m", "attune_worker", "jobs", "show", result.job_id, *options],
            env=process_environ(target.environ),
            capture_output=True,
            timeout=SOON,
            check=True,
        ).stdout.decode()
        assert not {character for character in shown if not character.isprintable()} - {"\n"}


def test_counts_at_the_bound_are_billed_to_the_nano_dollar(target: Target) -> None:
    """The largest count that is believed breaks neither the cost nor the budget."""
    usage = {"prompt_tokens": 2**31, "completion_tokens": 0, "total_tokens": 2**31}
    before = Budgets(target.client.settings).status()[0].spent_usd
    result = target.ask(ok(completion(usage=usage)))
    assert result.cost_usd is not None
    assert result.cost_usd > Decimal(1)
    assert Budgets(target.client.settings).status()[0].spent_usd - before == result.cost_usd
