"""Which parsers read what others have written, and what may come out of each?

A target takes bytes. It returns when the parser read them, or refused them with the error that it promises, and what
came out held to its bounds; anything else that it raises is a crash.
"""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from attune_worker.cli.bulk import job_of, read_lines
from attune_worker.cli.printable import printable
from attune_worker.errors import ConfigurationError, InvalidJobError, MalformedAnswerError, ProviderError
from attune_worker.invoices import InvoiceError, read_invoice
from attune_worker.jobs import AuthMode, Job
from attune_worker.ledger_record import LedgerRecord
from attune_worker.models.auth import AuthStrategy
from attune_worker.providers.anthropic import Anthropic
from attune_worker.providers.base import Answer, HttpRequest, HttpResponse
from attune_worker.providers.failures import MAX_WAIT_SECONDS, failure
from attune_worker.providers.http import HttpSender
from attune_worker.providers.openai import OpenAI
from attune_worker.providers.rate_headers import MAX_LIMIT, observed
from attune_worker.providers.unpacking import Body
from attune_worker.providers.wire import MAX_COUNT
from attune_worker.sections import HttpSettings

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
MAX_BYTES = 10_000
MAX_MESSAGE_CHARACTERS = 600
MAX_RESET_MS = 366 * 86_400_000
UNREADABLE = set(map(chr, [*range(32), 127, *range(128, 160)]))
"""What no terminal should be sent: the control characters of ASCII and Latin-1."""


@dataclass(frozen=True, slots=True)
class Target:
    """One parser, with inputs that it reads as the start of a search; ``words`` are what its format is made of."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _job(data: bytes) -> None:
    with suppress(InvalidJobError):
        job = Job.from_json(data)
        _require(Job.from_json(job.to_json()) == job, "a job is read as it was written")


def _submission(data: bytes) -> None:
    with suppress(InvalidJobError, ValueError, RecursionError):
        fields = json.loads(data)
        try:
            Job.parse(fields).to_json()
        except InvalidJobError as error:
            _require(len(str(error)) < 10 * MAX_MESSAGE_CHARACTERS, "an error is short")
        except (ValueError, RecursionError) as error:
            raise AssertionError(f"a job is refused with InvalidJobError, not {error!r}") from error


def _answer(parse: Callable[[HttpResponse], Answer], data: bytes) -> None:
    try:
        answer = parse(HttpResponse(200, {}, data))
    except MalformedAnswerError as error:
        _require(str(error).isprintable(), "an error is one line")
        return
    answer.content.encode()
    _require(answer.finish_reason.isprintable(), "a reason is a name")
    if answer.usage is not None:
        counts = answer.usage.model_dump().values()
        _require(all(0 <= count <= 3 * MAX_COUNT for count in counts), "counts are within bounds")


def _headers(data: bytes) -> tuple[bytes, dict[str, str]]:
    """Take what stands before an empty line as headers; return the rest and them."""
    head, _, rest = data.partition(b"\n\n")
    pairs = (line.partition(":") for line in head.decode("latin-1").splitlines())
    return rest, {name.strip().lower(): value.strip() for name, _, value in pairs}


def _failure(data: bytes) -> None:
    body, headers = _headers(data)
    for status in (302, 400, 403, 429, 503):
        error = failure(HttpResponse(status, headers, body))
        _require(str(error).isprintable() and len(str(error)) < MAX_MESSAGE_CHARACTERS, "an error is one short line")
        _require(error.retry_after is None or 0 <= error.retry_after <= MAX_WAIT_SECONDS, "a wait is within bounds")


def _rate_headers(data: bytes) -> None:
    seen = observed(_headers(data)[1], NOW)
    for allowance in (seen.requests, seen.tokens) if seen else ():
        if allowance is not None:
            counts = (allowance.limit, allowance.remaining)
            _require(all(count is None or 0 <= count <= MAX_LIMIT for count in counts), "a limit is within bounds")
            _require((allowance.reset_ms or 0) >= 0, "a reset is not in the past")


def _quota_headers(data: bytes) -> None:
    seen = observed(_headers(data)[1], NOW)
    for window in seen.windows if seen else ():
        _require(0 <= window.utilization <= 1, "a share is one of a whole")
        _require(0 <= window.reset_ms < 10**14, "a reset is a time")
        _require(window.status is None or window.status.isprintable(), "a status is a word")


def _strategy(data: bytes) -> None:
    with suppress(ConfigurationError):
        strategy = AuthStrategy.from_json(data, "a file")
        for lines in (0, strategy.small_module_threshold, strategy.medium_module_threshold):
            _require(strategy.get_recommended_mode(lines) is not AuthMode.AUTO, "a recommendation is a mode")


def _unpacking(data: bytes) -> None:
    with suppress(ProviderError):
        body = Body("gzip", MAX_BYTES)
        for start in range(0, len(data), 100):
            body.add(data[start : start + 100])
        _require(len(body.whole()) <= MAX_BYTES, "an answer is within bounds")


def _invoice(suffix: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        file = Path(folder) / f"invoice{suffix}"
        file.write_bytes(data)
        with suppress(InvoiceError):
            read_invoice(file)


def _lines(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        file = Path(folder) / "jobs.jsonl"
        file.write_bytes(data)
        for line in read_lines(file):
            with suppress(InvalidJobError):
                Job.parse(job_of(line, "run"))


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # a search writes many thousand files


def _ledger(data: bytes) -> None:
    with suppress(ValueError):  # what it says it raises
        record = LedgerRecord.from_json(data, NOW)
        _require(record.cost_usd is None or record.cost_usd >= 0, "no call gives money back")


def _terminal(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    _require(not UNREADABLE & set(printable(text)), "a terminal is sent no control characters")
    printable(text).encode()


def _gzipped(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


JOB = (
    b'{"v":1,"task_type":"fix bug","prompt":"x","max_cost":"0.10","stop":["a"],"priority":3,"temperature":0.5,'
    b'"metadata":{"a":[1,{"b":null}]},"deadline_seconds":1.5,"tier_hint":"cheap","tenant":"t","idempotency_key":"k"}'
)
CHAT = b'{"v":1,"task_type":"x","messages":[{"role":"system","content":"s"},{"role":"user","content":"u"}]}'
MESSAGE = (
    b'{"id":"m","type":"message","role":"assistant","model":"claude","content":[{"type":"text","text":"hi"},'
    b'{"type":"tool_use","input":{}}],"stop_reason":"end_turn","usage":{"input_tokens":1,"output_tokens":2,'
    b'"cache_read_input_tokens":3,"cache_creation_input_tokens":4,"cache_creation":{"ephemeral_1h_input_tokens":1}}}'
)
COMPLETION = (
    b'{"model":"gpt","choices":[{"finish_reason":"stop","message":{"role":"assistant","content":"hi","refusal":null}}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11,"prompt_tokens_details":{"cached_tokens":1},'
    b'"completion_tokens_details":{"reasoning_tokens":1}}}'
)
PARTS = b'{"choices":[{"message":{"content":[{"type":"text","text":"a"},{"type":"refusal","refusal":"b"}]}}]}'
REFUSAL = (
    b'retry-after: 12.5\nretry-after-ms: 7\ndate: Mon, 23 Nov 2026 12:00:00 GMT\nx-request-id: r\n\n{"type":"error",'
    b'"error":{"type":"rate_limit_error","code":"x","message":"slow","details":{"error_code":"e"},"metadata":{}}}'
)
GOOGLE = (
    b'retry-after: Mon, 23 Nov 2026 12:00:09 GMT\n\n[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED",'
    b'"details":[{"retryDelay":"6m0.5s"},{"reason":"API_KEY_INVALID"}]}}]'
)
LIMITS = (
    b"date: Mon, 23 Nov 2026 12:00:00 GMT\nanthropic-ratelimit-requests-limit: 50\nanthropic-ratelimit-requests-"
    b"remaining: 49\nanthropic-ratelimit-requests-reset: 2026-11-23T12:01:00Z\nx-ratelimit-limit-tokens: 150000\n"
    b"x-ratelimit-remaining-tokens: 149984\nx-ratelimit-reset-tokens: 6m0s"
)
QUOTA = (
    b"anthropic-ratelimit-unified-5h-utilization: 0.42\nanthropic-ratelimit-unified-5h-reset: 1795435200\n"
    b"anthropic-ratelimit-unified-5h-status: allowed_warning\nanthropic-ratelimit-unified-7d-utilization: 1.01\n"
    b"anthropic-ratelimit-unified-7d-reset: 1795953600\nanthropic-ratelimit-unified-7d-status: rejected"
)
STRATEGY = (
    b'{"subscription_tier":"max","default_mode":"auto","small_module_threshold":500,"medium_module_threshold":2000,'
    b'"prefer_subscription":true,"tokens_per_line":12.5,"window_tokens":88000}'
)
CALL = (
    b'{"client_request_id":"c","request_id":"r","day":"2026-11-23T10:00:00+01:00","model":"m","cost_usd":"0.0125",'
    b'"input_tokens":1,"output_tokens":2,"calls":1,"time":1763899200.5,"usage":{"input_tokens":1}}'
)
TABLE = b'client_request_id,request_id,day,model,cost_usd,input_tokens,calls\nc,"r",2026-11-23,m,0.0125,1,1\n'
RECORD = (
    b'{"call":"c","job":"j","tenant":"t","workflow":"w","stage":"s","provider":"p","model":"m","tier":"cheap",'
    b'"mode":"api","outcome":"succeeded","cost_nano":1,"estimate_nano":2,"input":1,"output":2,"latency_ms":3,'
    b'"admitted_ms":1763899200000,"request_id":"r"}'
)
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n"
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n" + _gzipped(b"{}")

NUMBERS = (b"-1", b"0", b"1e400", b"NaN", b"Infinity", b"9223372036854775808", b"1e-400", b"9" * 5000, b"true", b"null")
ODD_TEXT = (b'"\\ud800"', b'"\\u0000"', b"\xff", b"\xf0\x9f\x92", b"\x1b[31m", b'""', b"{}", b"[]", b"[" * 2000)
TIMES = (b"0001-01-01T00:00:00+23:59", b"9999-12-31T23:59:59-23:59", b"Sat, 99 Foo 9999 99:99:99", b"1h1h", b"-5", b"")
FRAMES = (b"Content-Length: 5\r\n", b"\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"ffffffff\r\n", b"HTTP/2 ", b"1e9")

JSON = NUMBERS + ODD_TEXT

TARGETS = (
    Target("job record", _job, (JOB, CHAT), JSON),
    Target("job as submitted", _submission, (JOB, CHAT), JSON),
    Target("jobs in a file", _lines, (JOB + b"\n" + CHAT, b'{"id":1}\n{"id":"1"}\n'), JSON),
    Target("Anthropic answer", lambda data: _answer(Anthropic().parse, data), (MESSAGE,), JSON),
    Target("OpenAI answer", lambda data: _answer(OpenAI().parse, data), (COMPLETION, PARTS), JSON),
    Target("refusal", _failure, (REFUSAL, GOOGLE), JSON + TIMES),
    Target("rate limit headers", _rate_headers, (LIMITS,), NUMBERS + TIMES),
    Target("quota headers", _quota_headers, (QUOTA,), NUMBERS + TIMES),
    Target("auth strategy", _strategy, (STRATEGY,), JSON),
    Target("packed answer", _unpacking, (_gzipped(b"hello" * 50), _gzipped(bytes(10**6)))),
    Target("ledger record", _ledger, (RECORD,), JSON),
    Target("invoice, CSV", lambda data: _invoice(".csv", data), (TABLE,), NUMBERS + TIMES + (b'"', b",", b"\x00")),
    Target("invoice, JSON lines", lambda data: _invoice(".jsonl", data), (CALL,), JSON + TIMES),
    Target("invoice, JSON", lambda data: _invoice(".json", data), (b'{"calls":[' + CALL + b"]}",), JSON + TIMES),
    Target("text for a terminal", _terminal, ("a\x1b[2Jé\u202e\u200d😀".encode(),), ODD_TEXT),
)


@contextmanager
def http_target() -> Iterator[Target]:
    """Yield the target that reads a whole HTTP answer, over a connection to a server that sends any bytes."""
    served: list[bytes] = []
    sender = HttpSender(HttpSettings(max_response_bytes=MAX_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(served[-1])

        def run(data: bytes) -> None:
            served[:] = [data]
            with suppress(ProviderError):
                _check(sender.send(HttpRequest(url, {}, b"{}"), 5.0))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Target("HTTP answer", run, (RESPONSE, CHUNKS, PACKED), FRAMES + NUMBERS)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _check(response: HttpResponse) -> None:
    _require(len(response.body) <= MAX_BYTES, "an answer is within bounds")
    headers: Mapping[str, str] = response.headers
    _require(all(name == name.lower() for name in headers), "names of headers are in lower case")
