import asyncio
import gzip
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from attune_worker.errors import (
    MalformedAnswerError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    StoppedError,
)
from attune_worker.interruption import Interruption
from attune_worker.providers.base import HttpRequest, HttpResponse
from attune_worker.providers.http import HttpSender
from attune_worker.sections import HttpSettings
from tests.conftest import PATIENCE_SECONDS, RawServer, Stopwatch, longer_and_longer

Send = Callable[..., HttpResponse]
KEY = "sk-http-3b1f-never-shown"
SETTINGS = HttpSettings(connect_timeout_seconds=PATIENCE_SECONDS, max_response_bytes=1000)


@pytest.fixture(params=["send", "asend"])
def send(request: pytest.FixtureRequest) -> Send:
    """Send in either way: both must do the same."""
    sender = HttpSender(SETTINGS)

    def send(url: str, timeout_seconds: float = PATIENCE_SECONDS) -> HttpResponse:
        message = HttpRequest(f"{url}/v1/messages", {"x-api-key": KEY}, b'{"a":1}')
        if request.param == "send":
            return sender.send(message, timeout_seconds)
        return asyncio.run(sender.asend(message, timeout_seconds))

    return send


def error_of(send: Send, *args: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        send(*args)
    assert KEY not in f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    return caught.value


def error_after_arrival(send: Send, server: RawServer, seconds: float) -> ProviderError:
    """Return what comes of a call of so many seconds, or of more if they were over before the request was there."""
    for so_long in longer_and_longer(seconds):
        error = error_of(send, server.url, so_long)
        if server.received:
            return error
    pytest.fail("no request arrived")


def answers(*parts: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(b"".join(parts))


def drips(first: bytes, drop: bytes) -> Callable[[socket.socket], None]:
    """Send drop after drop, each in time for a read, for as long as anybody listens."""

    def script(connection: socket.socket) -> None:
        connection.sendall(first)
        pause = threading.Event()
        for _ in range(round(PATIENCE_SECONDS / 0.05)):
            pause.wait(0.05)
            connection.sendall(drop)

    return script


def test_answer_arrives_as_it_is(send: Send, raw_server: Any) -> None:
    """Status, headers in lower case, and body; the request was sent once, as it was built."""
    server = raw_server(answers(b"HTTP/1.1 201 Made\r\nX-Request-ID: r1\r\nContent-Length: 5\r\n\r\n\x00\xffabc"))
    response = send(server.url)
    assert (response.status, response.headers["x-request-id"], response.body) == (201, "r1", b"\x00\xffabc")
    [request] = server.received
    assert request.startswith(b"POST /v1/messages HTTP/1.1\r\n")
    assert request.endswith(b'\r\n\r\n{"a":1}')


def test_answer_without_a_length_ends_with_the_connection(send: Send, raw_server: Any) -> None:
    """As HTTP/1.0 servers do."""
    assert send(raw_server(answers(b"HTTP/1.0 200 OK\r\n\r\n{}")).url).body == b"{}"


@pytest.mark.parametrize("length", [b"", b"Content-Length: 5000\r\n"])
def test_answer_that_is_too_long_is_refused(send: Send, raw_server: Any, length: bytes) -> None:
    """A broken server cannot fill the worker's memory."""
    server = raw_server(answers(b"HTTP/1.1 200 OK\r\n", length, b"\r\n", b"x" * 5000))
    error = error_of(send, server.url)
    assert isinstance(error, MalformedAnswerError)
    assert "1000 bytes" in str(error)
    assert error.may_have_cost


def test_answer_at_the_limit_is_taken(send: Send, raw_server: Any) -> None:
    """The limit is the last length that is allowed."""
    server = raw_server(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x" * 1000))
    assert len(send(server.url).body) == 1000


def test_compressed_answer_counts_by_its_real_size(send: Send, raw_server: Any) -> None:
    """A small answer may unpack to a large one."""
    body = gzip.compress(b"x" * 100_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert isinstance(error_of(send, raw_server(answers(head, body)).url), MalformedAnswerError)


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Drop: x\r\n"),
    ],
    ids=["body", "chunks", "headers"],
)
def test_answer_that_drips_is_cut_off_at_the_deadline(send: Send, raw_server: Any, first: bytes, drop: bytes) -> None:
    """Each byte comes in time, the whole does not: a read timeout alone would wait for hours."""
    error = error_after_arrival(send, raw_server(drips(first, drop)), 0.3)
    assert isinstance(error, ProviderTimeoutError)
    assert error.may_have_cost


def test_silence_is_a_timeout_that_may_have_cost(send: Send, raw_server: Any) -> None:
    """The request arrived, so the model may have run."""
    hold = threading.Event()
    server = raw_server(lambda _: hold.wait(PATIENCE_SECONDS))
    error = error_after_arrival(send, server, 0.2)
    hold.set()
    assert isinstance(error, ProviderTimeoutError)
    assert error.may_have_cost


@pytest.mark.parametrize("port", [1, "free"])
def test_refused_connection_costs_nothing(send: Send, port: int | str) -> None:
    """Nothing was sent, so nothing can be charged."""
    if port == "free":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
    error = error_of(send, f"http://127.0.0.1:{port}")
    assert isinstance(error, ProviderConnectionError)
    assert not error.may_have_cost


def test_unknown_host_costs_nothing(send: Send) -> None:
    """As a typo in the base URL."""
    error = error_of(send, "http://no-such-host.invalid")
    assert isinstance(error, ProviderConnectionError)
    assert not error.may_have_cost


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(send: Send, raw_server: Any, status: int) -> None:
    """Following one would hand the key to another host."""
    other = raw_server(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    location = f"Location: {other.url}/\r\n".encode()
    server = raw_server(answers(b"HTTP/1.1 %d Go\r\nContent-Length: 0\r\n" % status, location, b"\r\n"))
    assert send(server.url).status == status
    assert other.received == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot-a-number\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x00\xa5",
    ],
    ids=["nothing", "half a header", "half a body", "chunks cut", "bad chunk", "bad gzip", "ssh", "tls"],
)
def test_broken_answer_is_a_broken_connection_that_may_have_cost(send: Send, raw_server: Any, answer: bytes) -> None:
    """Whatever came, it was not the whole answer, and the model may have run."""
    error = error_of(send, raw_server(answers(answer)).url)
    assert isinstance(error, ProviderConnectionError)
    assert error.may_have_cost


def test_request_is_never_sent_twice_by_itself(send: Send, raw_server: Any) -> None:
    """Repeating is the policy's decision: a silent retry would be paid for twice."""
    server = raw_server(answers(b""))
    error_of(send, server.url)
    assert len(server.received) == 1


def test_connection_is_used_again_within_a_thread(raw_server: Any) -> None:
    """Handshakes cost more than requests."""
    connections: list[int] = []

    def script(connection: socket.socket) -> None:
        connections.append(connection.fileno())
        for _ in range(2):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            connection.recv(65536)

    sender = HttpSender(SETTINGS)
    server = raw_server(script)
    for _ in range(2):
        assert sender.send(HttpRequest(server.url, {}, b"{}"), PATIENCE_SECONDS).status == 200
    assert len(connections) == 1


def open_sockets() -> int:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed since
            links.append(str(entry.readlink()))
    return sum(link.startswith("socket:") for link in links)


def test_connections_of_ended_threads_are_closed(raw_server: Any, until: Any) -> None:
    """A pool that replaces its threads must not run out of files."""
    sender = HttpSender(SETTINGS)

    def script(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        connection.recv(1)

    server = raw_server(script)
    before = open_sockets()
    for _ in range(5):
        thread = threading.Thread(target=lambda: sender.send(HttpRequest(server.url, {}, b"{}"), PATIENCE_SECONDS))
        thread.start()
        thread.join()
    until(lambda: open_sockets() <= before)
    assert len(server.received) == 5


def test_wrong_header_value_is_an_error_without_the_key() -> None:
    """A key with a line break in the middle is refused before it is sent."""
    message = HttpRequest("http://127.0.0.1:1/", {"x-api-key": f"{KEY}\nHost: evil"}, b"{}")
    with pytest.raises(ProviderError) as caught:
        HttpSender(SETTINGS).send(message, 1)
    assert KEY not in str(caught.value)


WITHIN_SECONDS = 1.0
"""How soon after the stop the connection is closed."""

StoppedWhile = Callable[..., float]


@pytest.fixture
def stopped_while(stopwatch: Stopwatch) -> StoppedWhile:
    """Return a function that stops a call once ``reached``, and returns how long the call still took."""

    def stopped_while(sender: HttpSender, url: str, reached: threading.Event, body: bytes = b"{}") -> float:
        interruption = Interruption()
        ended: list[float] = []

        def call() -> None:
            with pytest.raises(StoppedError, match="cancelled"):
                sender.send(HttpRequest(url, {}, body), 2 * PATIENCE_SECONDS, interruption)
            ended.append(stopwatch.seconds)

        thread = threading.Thread(target=call)
        thread.start()
        assert reached.wait(PATIENCE_SECONDS)
        stopped = stopwatch.seconds
        interruption.stop("cancelled")
        thread.join(PATIENCE_SECONDS)
        return ended[0] - stopped

    return stopped_while


@pytest.fixture
def deaf_url(until: Any) -> Iterator[str]:
    """The URL of a listener that answers no connection any more: its queue is full."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)

        def full() -> bool:
            filler = sockets.enter_context(socket.socket())
            filler.settimeout(0.2)
            with suppress(TimeoutError):
                filler.connect(listener.getsockname())
                return False
            return True

        until(full)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_call_that_is_stopped_while_it_connects_ends_at_once(
    deaf_url: str, until: Any, stopped_while: StoppedWhile, scheme: str
) -> None:
    """Long before the connect timeout, and without leaving the socket behind."""
    sender = HttpSender(HttpSettings(connect_timeout_seconds=PATIENCE_SECONDS))
    before = open_sockets()
    reached = threading.Event()

    def watch() -> None:
        until(lambda: open_sockets() > before)
        reached.set()

    watching = threading.Thread(target=watch)
    watching.start()
    assert stopped_while(sender, deaf_url.replace("http", scheme), reached) < WITHIN_SECONDS
    watching.join()
    assert open_sockets() <= before


@pytest.mark.parametrize(("connect_timeout_seconds", "timeout_seconds"), [(0.3, 20), (20, 0.3)])
def test_connection_that_nobody_answers_times_out_and_costs_nothing(
    deaf_url: str, stopwatch: Stopwatch, connect_timeout_seconds: float, timeout_seconds: float
) -> None:
    """Whichever limit is the shorter one."""
    sender = HttpSender(HttpSettings(connect_timeout_seconds=connect_timeout_seconds))
    begun, before = time.monotonic(), stopwatch.seconds
    with pytest.raises(ProviderTimeoutError, match="connect timeout") as caught:
        sender.send(HttpRequest(deaf_url, {}, b"{}"), timeout_seconds)
    assert not caught.value.may_have_cost
    assert time.monotonic() - begun >= 0.3
    assert stopwatch.seconds - before < 5


def test_next_address_of_a_host_is_tried(raw_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with an IPv6 address that leads nowhere is reached by its IPv4 address."""
    server = raw_server(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
    real = socket.getaddrinfo

    def two_addresses(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        assert host == "two.test"
        return [*real("127.0.0.1", 1, *args, **kwargs), *real("127.0.0.1", port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    assert (
        HttpSender(SETTINGS).send(HttpRequest(f"http://two.test:{server.port}", {}, b"{}"), PATIENCE_SECONDS).body
        == b"{}"
    )


def hung_up(connection: socket.socket) -> bool:
    """Whether the client closes its side."""
    connection.settimeout(PATIENCE_SECONDS)
    with suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return True


ANSWERS_BEGUN = {
    "nothing": b"",
    "headers": b"HTTP/1.1 200 OK\r\nX-Half: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    "until the end": b"HTTP/1.1 200 OK\r\n\r\n{}",
}


@pytest.mark.parametrize("begun", ANSWERS_BEGUN.values(), ids=ANSWERS_BEGUN.keys())
def test_call_that_is_stopped_ends_at_once(raw_server: Any, stopped_while: StoppedWhile, begun: bytes) -> None:
    """Whatever has arrived: also where the end of the connection would be the end of the answer."""
    reached, gone = threading.Event(), threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(begun)
        threading.Event().wait(0.05)  # until the thread waits for more
        reached.set()
        if hung_up(connection):
            gone.set()

    assert stopped_while(HttpSender(SETTINGS), raw_server(script).url, reached) < WITHIN_SECONDS
    assert gone.wait(PATIENCE_SECONDS)  # the end of the call is what is timed


def test_call_that_is_stopped_while_the_answer_drips_ends_at_once(raw_server: Any, stopped_while: StoppedWhile) -> None:
    """Each drop wakes the reader, and none of them keeps the connection."""
    reached = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
        for drop in range(round(PATIENCE_SECONDS / 0.02)):
            connection.sendall(b"x")
            if drop == 3:
                reached.set()
            threading.Event().wait(0.02)

    assert stopped_while(HttpSender(SETTINGS), raw_server(script).url, reached) < WITHIN_SECONDS


def test_call_that_was_stopped_before_is_not_sent(raw_server: Any) -> None:
    """It would cost money for nothing."""
    server = raw_server(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
    interruption = Interruption()
    interruption.stop("cancelled")
    with pytest.raises(StoppedError):
        HttpSender(SETTINGS).send(HttpRequest(server.url, {}, b"{}"), PATIENCE_SECONDS, interruption)
    assert server.received == []


def test_call_goes_on_when_the_job_only_winds_down(raw_server: Any) -> None:
    """Its answer is paid for; an error stays the error that it is."""
    interruption = Interruption()
    interruption.wind_down("the worker ends")
    sender = HttpSender(SETTINGS)
    server = raw_server(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
    assert sender.send(HttpRequest(server.url, {}, b"{}"), PATIENCE_SECONDS, interruption).body == b"{}"
    with pytest.raises(ProviderConnectionError):
        sender.send(HttpRequest(raw_server(answers(b"")).url, {}, b"{}"), PATIENCE_SECONDS, interruption)


def test_stop_never_hits_the_next_call_of_the_thread(raw_server: Any) -> None:
    """Hundreds of calls, each stopped at about the moment it ends, and after each one that nobody stopped.

    How long a call takes here is seen from the one before.
    """

    def script(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            if not connection.recv(65536):
                return

    server = raw_server(script)
    sender = HttpSender(SETTINGS)
    request = HttpRequest(server.url, {}, b"{}")
    ends: set[str] = set()
    took_seconds = 0.001
    for turn in range(300):
        interruption = Interruption()
        stopping = threading.Timer(turn % 20 * took_seconds / 10, interruption.stop, ["cancelled"])
        stopping.start()
        try:
            assert sender.send(request, PATIENCE_SECONDS, interruption).body == b"{}"
            ends.add("answered")
        except StoppedError:
            ends.add("stopped")
        begun = time.monotonic()
        assert sender.send(request, PATIENCE_SECONDS).body == b"{}"
        took_seconds = min(time.monotonic() - begun, 0.1)
        stopping.join()
    assert ends == {"answered", "stopped"}


@pytest.fixture
def tls_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Return a function that serves one connection over TLS, with a certificate that is trusted here."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    what = ["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", "-days", "2", *what, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    threads: list[threading.Thread] = []
    listeners: list[socket.socket] = []

    def start(script: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with context.wrap_socket(connection, server_side=True) as secured:
                    script(secured)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"https://localhost:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)


@pytest.mark.parametrize("begun", ANSWERS_BEGUN.values(), ids=ANSWERS_BEGUN.keys())
def test_call_over_tls_that_is_stopped_ends_at_once(
    tls_server: Callable[..., str], stopped_while: StoppedWhile, begun: bytes
) -> None:
    """The thread that reads may be anywhere in the TLS library."""
    reached, gone = threading.Event(), threading.Event()

    def script(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(begun)
        threading.Event().wait(0.05)
        reached.set()
        with suppress(OSError):
            hung_up(connection)
        gone.set()

    assert stopped_while(HttpSender(SETTINGS), tls_server(script), reached) < WITHIN_SECONDS
    assert gone.wait(PATIENCE_SECONDS)  # the end of the call is what is timed


def test_tls_handshake_that_is_stopped_ends_at_once(stopped_while: StoppedWhile) -> None:
    """A server that accepts and then says nothing is silent before the request as well."""
    settings = HttpSettings(connect_timeout_seconds=PATIENCE_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reached = threading.Event()
        gone: list[bool] = []

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1)  # the client's hello has arrived: it waits for ours
                reached.set()
                gone.append(hung_up(connection))

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"https://localhost:{listener.getsockname()[1]}"
        assert stopped_while(HttpSender(settings), url, reached) < WITHIN_SECONDS
        thread.join(PATIENCE_SECONDS)
    assert gone == [True]


LONG = bytes(32 * 2**20)
"""More than the buffers between two sockets hold."""


@pytest.fixture(params=["http", "https"])
def slow_reader(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Return a function that serves one connection over either protocol."""
    if request.param == "https":
        yield request.getfixturevalue("tls_server")
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads: list[threading.Thread] = []

        def start(script: Callable[[socket.socket], None]) -> str:
            def serve() -> None:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    script(connection)

            threads.append(threading.Thread(target=serve))
            threads[-1].start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start
        for thread in threads:
            thread.join(PATIENCE_SECONDS)


def test_request_that_is_taken_in_sips_is_cut_off_at_the_deadline(
    slow_reader: Callable[..., str], stopwatch: Stopwatch
) -> None:
    """Each piece goes out in time, the whole does not: a write timeout alone would wait until it is all taken."""
    over, begun = threading.Event(), threading.Event()

    def sip(connection: socket.socket) -> None:
        while connection.recv(65_536) and not over.wait(0.01):
            begun.set()

    for seconds in longer_and_longer(0.5):
        url = slow_reader(sip)
        before = stopwatch.seconds
        with pytest.raises(ProviderTimeoutError) as caught:
            HttpSender(SETTINGS).send(HttpRequest(url, {}, LONG), seconds)
        took_seconds = stopwatch.seconds - before
        if begun.is_set():
            break
    over.set()
    assert caught.value.may_have_cost
    assert took_seconds < seconds + WITHIN_SECONDS


def test_call_that_is_stopped_while_nobody_takes_its_request_ends_at_once(
    slow_reader: Callable[..., str], stopped_while: StoppedWhile
) -> None:
    """The thread that writes waits for room in a buffer that stays full."""
    reached, ended = threading.Event(), threading.Event()

    def hold(connection: socket.socket) -> None:
        connection.recv(1)
        threading.Event().wait(0.05)  # until the buffers are full
        reached.set()
        ended.wait(PATIENCE_SECONDS)

    took_seconds = stopped_while(HttpSender(SETTINGS), slow_reader(hold), reached, LONG)
    ended.set()
    assert took_seconds < WITHIN_SECONDS
