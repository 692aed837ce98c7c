"""How does a request reach a provider, and the answer come back? The only network I/O towards providers.

Each thread has its own httpx transport, all share one TLS context: httpcore looks at every pooled
connection on each request, so one pool for hundreds of threads would cost milliseconds a call. The
transport is used without httpx' client around it, because redirects, cookies and authentication
flows have no place here and cost about as much CPU as the call itself.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import httpx

from attune_worker.errors import MalformedAnswerError, ProviderConnectionError, ProviderTimeoutError
from attune_worker.providers.base import HttpRequest, HttpResponse
from attune_worker.settings import HttpSettings

LIMITS = httpx.Limits(max_connections=16, max_keepalive_connections=4, keepalive_expiry=60)
"""Per thread: it makes one call at a time, and keeps a connection to each of the few providers it uses."""


class HttpSender:
    """Sends requests for one process, from any number of threads, or of tasks of one event loop."""

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._local = threading.local()

    def send(self, request: HttpRequest, timeout_seconds: float) -> HttpResponse:
        """Send ``request`` once and read the answer within ``timeout_seconds``.

        Raises ``ProviderTimeoutError``, ``ProviderConnectionError``, or ``MalformedAnswerError`` for
        an answer beyond ``max_response_bytes``. Redirects are not followed: they come back as they are.
        """
        deadline = time.monotonic() + timeout_seconds
        with _failures_named():
            response = self._transport.handle_request(self._prepared(request, timeout_seconds))
            try:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    self._check(len(body), deadline)
            finally:
                response.close()
        return HttpResponse(response.status_code, _lowered(response), bytes(body))

    async def asend(self, request: HttpRequest, timeout_seconds: float) -> HttpResponse:
        """Send as ``send`` does, without blocking the event loop, over a connection of its own."""
        deadline = time.monotonic() + timeout_seconds
        with _failures_named():
            async with (
                asyncio.timeout(timeout_seconds),
                httpx.AsyncHTTPTransport(verify=self._tls, proxy=self._settings.proxy) as transport,
            ):
                response = await transport.handle_async_request(self._prepared(request, timeout_seconds))
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    self._check(len(body), deadline)
        return HttpResponse(response.status_code, _lowered(response), bytes(body))

    def _prepared(self, request: HttpRequest, timeout_seconds: float) -> httpx.Request:
        timeout = {
            "connect": min(self._settings.connect_timeout_seconds, timeout_seconds),
            "read": timeout_seconds,
            "write": timeout_seconds,
            "pool": timeout_seconds,
        }
        return httpx.Request(
            "POST", request.url, headers=request.headers, content=request.body, extensions={"timeout": timeout}
        )

    def _check(self, size: int, deadline: float) -> None:
        if size > self._settings.max_response_bytes:
            raise MalformedAnswerError(f"the answer is longer than {self._settings.max_response_bytes} bytes")
        if time.monotonic() > deadline:
            raise ProviderTimeoutError("the answer was still arriving when its time was up")

    @property
    def _transport(self) -> httpx.HTTPTransport:
        own: _OwnTransport | None = getattr(self._local, "own", None)
        if own is None:
            own = _OwnTransport(httpx.HTTPTransport(verify=self._tls, limits=LIMITS, proxy=self._settings.proxy))
            self._local.own = own
        return own.transport

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()


class _OwnTransport:
    """One thread's transport; its connections are closed when the thread ends, or the sender goes."""

    def __init__(self, transport: httpx.HTTPTransport) -> None:
        self.transport = transport
        weakref.finalize(self, transport.close)


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
