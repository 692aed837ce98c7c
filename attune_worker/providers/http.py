"""How does a request reach a provider, and the answer come back? The only network I/O towards providers.

Each thread has its own httpx transport, all share one TLS context: httpcore looks at every pooled
connection on each request, so one pool for hundreds of threads would cost milliseconds a call. The
transport is used without httpx' client around it, because redirects, cookies and authentication
flows have no place here and cost about as much CPU as the call itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache, partial
from typing import Any

import httpcore
import httpx
from httpcore._backends.sync import SyncStream  # httpcore has no public name for what makes its stream of a socket

from attune_worker.errors import ProviderConnectionError, ProviderError, ProviderTimeoutError
from attune_worker.interruption import Interruption
from attune_worker.providers.base import HttpRequest, HttpResponse
from attune_worker.providers.connecting import connect
from attune_worker.providers.unpacking import Body
from attune_worker.sections import HttpSettings

LIMITS = httpx.Limits(max_connections=16, max_keepalive_connections=4, keepalive_expiry=60)
"""Per thread: it makes one call at a time, and keeps a connection to each of the few providers it uses."""

SLICE_BYTES = 65_536
"""How much of a request is sent at a time: a prompt of some pages goes out in one piece."""


class HttpSender:
    """Sends requests for one process, from any number of threads, or of tasks of one event loop."""

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._local = threading.local()

    def send(
        self, request: HttpRequest, timeout_seconds: float, interruption: Interruption | None = None
    ) -> HttpResponse:
        """Send ``request`` once and read the answer within ``timeout_seconds``.

        Raises ``ProviderTimeoutError``, ``ProviderConnectionError``, or ``MalformedAnswerError`` for
        an answer beyond ``max_response_bytes``. Redirects are not followed: they come back as they are.
        When ``interruption`` stops the job the connection is closed, or not made, and ``StoppedError`` raised, in
        a fraction of a second. Only while the system looks up the host's name can it take until that is done.
        """
        interruption = interruption or Interruption()
        own = self._own
        own.network.begin(time.monotonic() + timeout_seconds)
        interruption.cut_with(own.network.cut)
        try:
            return self._exchange(own, request, timeout_seconds)
        except ProviderError:
            if interruption.cut_off:
                raise interruption.error() from None
            raise
        finally:
            interruption.cut_with(None)

    def _exchange(self, own: _OwnTransport, request: HttpRequest, timeout_seconds: float) -> HttpResponse:
        with _failures_named():
            response = own.transport.handle_request(self._prepared(request, timeout_seconds))
            try:
                body = self._body(response)
                for chunk in response.iter_raw():
                    body.add(chunk)
            finally:
                response.close()
                own.close_overfull()
        return HttpResponse(response.status_code, _lowered(response), body.whole())

    async def asend(self, request: HttpRequest, timeout_seconds: float) -> HttpResponse:
        """Send as ``send`` does, without blocking the event loop, over a connection of its own."""
        with _failures_named():
            async with (
                asyncio.timeout(timeout_seconds),
                httpx.AsyncHTTPTransport(verify=self._tls, proxy=self._proxy) as transport,
            ):
                response = await transport.handle_async_request(self._prepared(request, timeout_seconds))
                body = self._body(response)
                async for chunk in response.aiter_raw():
                    body.add(chunk)
        return HttpResponse(response.status_code, _lowered(response), body.whole())

    def _prepared(self, request: HttpRequest, timeout_seconds: float) -> httpx.Request:
        timeout = {
            "connect": min(self._settings.connect_timeout_seconds, timeout_seconds),
            "read": timeout_seconds,
            "write": timeout_seconds,
            "pool": timeout_seconds,
        }
        return httpx.Request(
            request.method,
            _parsed(request.url),
            headers=request.headers,
            content=request.body,
            extensions={"timeout": timeout},
        )

    def _body(self, response: httpx.Response) -> Body:
        return Body(response.headers.get("content-encoding", ""), self._settings.max_response_bytes)

    @property
    def _own(self) -> _OwnTransport:
        own: _OwnTransport | None = getattr(self._local, "own", None)
        if own is None:
            transport = httpx.HTTPTransport(verify=self._tls, limits=LIMITS, proxy=self._proxy)
            own = self._local.own = _OwnTransport(transport)
        return own

    @property
    def _proxy(self) -> str | None:
        return self._settings.proxy.get_secret_value() if self._settings.proxy else None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()


class _OwnTransport:
    """One thread's transport; its connections are closed when the thread ends, or the sender goes."""

    def __init__(self, transport: httpx.HTTPTransport) -> None:
        self.transport = transport
        # httpx has no parameter for what httpcore calls the network backend.
        self.network = transport._pool._network_backend = _Network()  # noqa: SLF001
        weakref.finalize(self, transport.close)

    def close_overfull(self) -> None:
        """Close connections on which more has come than an answer: httpcore would take it for the next one's."""
        for connection in self.transport._pool.connections:  # noqa: SLF001  # httpcore shows it to nobody
            inner: Any = connection
            while (deeper := getattr(inner, "_connection", None)) is not None:
                inner = deeper
            if (state := getattr(inner, "_h11_state", None)) is not None and state.trailing_data[0]:
                connection.close()


class _Network(httpcore.SyncBackend):
    """Connections that end at a deadline, or when another thread says so; one answer at a time.

    httpcore bounds every single read and write, so a server that sends, or takes, a byte now and then would
    never be late.
    """

    def __init__(self) -> None:
        self.deadline = float("inf")
        self._lock = threading.Lock()
        self._cut = False
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._handshake: socket.socket | None = None

    def begin(self, deadline: float) -> None:
        """Expect an answer until ``deadline`` (seconds, monotonic)."""
        self.deadline = deadline
        self._cut = False

    def cut(self) -> None:
        """Close this thread's connections from another thread: whoever reads from them hears of it at once."""
        with self._lock:
            self._cut = True
            for stream in self._streams:
                _shut_down(stream.get_extra_info("socket"))
            _shut_down(self._handshake)

    def left(self, timeout: float | None, *, connecting: bool = False) -> float:
        """Return for how many seconds to go on, at most ``timeout``; raise unless the answer is still waited for.

        While ``connecting`` nothing has been sent: it is the connection that failed then.
        """
        if self._cut:
            raise (httpcore.ConnectError if connecting else httpcore.ReadError)("the job was stopped")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise (httpcore.ConnectTimeout if connecting else httpcore.ReadTimeout)("the time for the answer was up")
        return left if timeout is None else min(timeout, left)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect as httpcore does, within the deadline as well, and so that it can be cut."""
        check = partial(self.left, None, connecting=True)
        try:
            connection = connect((host, port), timeout, check, local_address, socket_options or ())
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(error) from error
        except OSError as error:
            raise httpcore.ConnectError(error) from error
        return self.watched(SyncStream(connection))

    def watched(self, stream: httpcore.NetworkStream) -> httpcore.NetworkStream:
        """Return a connection that ends with this thread's deadline and can be cut."""
        watched = _Stream(stream, self)
        with self._lock:
            self._streams.add(watched)
        return watched

    @contextmanager
    def shaking_hands(self, plain: socket.socket) -> Iterator[None]:
        """Have the handshake over ``plain`` cut as well: it takes the socket away, but not a duplicate of it."""
        with socket.socket(fileno=os.dup(plain.fileno())) as duplicate:
            with self._lock:
                self._handshake = duplicate
            try:
                yield
            finally:
                with self._lock:
                    self._handshake = None


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, network: _Network) -> None:
        self._stream = stream
        self._network = network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, self._network.left(timeout))
        if not data:
            self._network.left(timeout)  # an end that we made ourselves is not the answer's
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        while rest:
            rest = rest[self._send(rest[:SLICE_BYTES], self._network.left(timeout)) :]

    def _send(self, part: memoryview, timeout: float) -> int:
        """Send ``part`` or the beginning of it, and return how many bytes of it that were."""
        if not isinstance(self._stream, SyncStream):  # TLS within a proxy's TLS: the socket is the proxy's
            self._stream.write(bytes(part), timeout)
            return len(part)
        # httpcore would go on until all of the part is sent, with the whole timeout again after each beginning of it.
        connection: socket.socket = self._stream.get_extra_info("socket")
        try:
            connection.settimeout(timeout)
            return connection.send(part)
        except TimeoutError as error:
            raise httpcore.WriteTimeout(error) from error
        except OSError as error:
            raise httpcore.WriteError(error) from error

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            with self._network.shaking_hands(self._stream.get_extra_info("socket")):
                left = self._network.left(timeout, connecting=True)
                return self._network.watched(self._stream.start_tls(ssl_context, server_hostname, left))
        except BaseException:
            self.close()  # nobody else would
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _shut_down(connection: Any) -> None:
    if isinstance(connection, socket.socket):
        with suppress(OSError):  # it may be closed already
            # Below TLS: a TLS socket would also forget its state, which the thread that reads may need just now.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)


@lru_cache(maxsize=256)  # a process calls a few; httpx takes as long for each as for the headers
def _parsed(url: str) -> httpx.URL:
    return httpx.URL(url)


@contextmanager
def _failures_named() -> Iterator[None]:
    """Turn httpx' exceptions into ours. Where no connection was made, nothing was sent or charged."""
    try:
        yield
    except httpx.ConnectTimeout:
        raise _uncharged(ProviderTimeoutError("no connection within the connect timeout")) from None
    except (httpx.TimeoutException, TimeoutError) as error:
        raise ProviderTimeoutError(f"no complete answer in time ({type(error).__name__})") from None
    except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.ProxyError) as error:
        raise _uncharged(ProviderConnectionError(f"no connection ({error})")) from None
    except (httpx.DecodingError, httpx.RemoteProtocolError) as error:
        raise ProviderConnectionError(f"the connection broke or spoke no HTTP ({type(error).__name__})") from None
    except httpx.TransportError as error:
        raise ProviderConnectionError(f"the connection broke ({type(error).__name__})") from None


def _uncharged(error: Any) -> Any:
    error.may_have_cost = False
    return error


def _lowered(response: httpx.Response) -> dict[str, str]:
    return dict(response.headers.items())
