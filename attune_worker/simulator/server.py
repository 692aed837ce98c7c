"""How does the simulated provider reach the network? Routes, timers and the ways a connection can end.

It works on tornado's connection level, below its web framework: that is a quarter faster, and a
hanging or broken answer needs the connection anyway.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from functools import lru_cache
from http.client import responses
from time import time
from typing import Any
from urllib.parse import parse_qs

from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
    format_timestamp,
)

from attune_worker.errors import ConfigurationError
from attune_worker.simulator.anthropic import AnthropicWire
from attune_worker.simulator.openai import OpenAIWire
from attune_worker.simulator.profile import KEYS, Profile
from attune_worker.simulator.service import JSON, REMEMBERED_REQUESTS, Reply, Service
from attune_worker.simulator.wire import MAX_BODY_BYTES, Wire, to_json

ANTHROPIC, OPENAI = AnthropicWire(), OpenAIWire()
CALL_PATHS: dict[str, Wire] = {"/v1/messages": ANTHROPIC, "/v1/chat/completions": OPENAI}
BACKLOG = 4096
"""Thousands of workers may connect in the same moment; tornado's default of 128 would turn some away."""


class SimulatorServer(HTTPServerConnectionDelegate):
    """Serves a ``Service`` over HTTP on the running event loop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        # Tornado closes the connection on a body over its limit; twice ours leaves room to answer 413.
        self._http = HTTPServer(self, max_body_size=2 * MAX_BODY_BYTES)
        self._admin = AdminPages(service)
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, host: str, port: int) -> int:
        """Listen, and return the port (a free one for port 0); raises ``ConfigurationError`` if it cannot."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ConfigurationError(f"the simulator cannot listen on {host}:{port}: {error.strerror}") from None
        listening.setblocking(False)
        self._http.add_sockets([listening])
        return int(listening.getsockname()[1])

    async def close(self) -> None:
        """Stop listening and close every connection, answered or not."""
        self._http.stop()
        await self._http.close_all_connections()

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate:
        """Return the object that takes in the next request of a connection."""
        return _Exchange(self, request_conn)

    def handle(self, exchange: _Exchange) -> None:
        """Answer a request that has arrived in full."""
        path, _, query = exchange.target.partition("?")
        wire = CALL_PATHS.get(path)
        if wire is not None and exchange.method == "POST":
            reply = self.service.call(wire, path, exchange.headers, exchange.body)
            exchange.answer(reply)
        elif path == "/v1/models" and exchange.method == "GET":
            wire = ANTHROPIC if "anthropic-version" in exchange.headers else OPENAI
            exchange.answer(self.service.list_models(wire, exchange.headers))
        elif page := self._admin.find(exchange.method, path):
            task = asyncio.get_running_loop().create_task(_show(exchange, page, query))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            exchange.answer(_not_found(exchange.method, path, wire or OPENAI))


class _Exchange(HTTPMessageDelegate):
    """One request and its reply."""

    __slots__ = ("_chunks", "_connection", "_server", "_timer", "headers", "method", "target")

    def __init__(self, server: SimulatorServer, connection: HTTP1Connection) -> None:
        self._server = server
        self._connection = connection
        self._chunks: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def body(self) -> bytes:
        """The request's body."""
        return b"".join(self._chunks)

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        """Take in the request line and headers."""
        line: RequestStartLine = start_line
        self.method, self.target, self.headers = line.method, line.path, headers

    def data_received(self, chunk: bytes) -> None:
        """Take in a part of the body."""
        self._chunks.append(chunk)

    def finish(self) -> None:
        """Answer, now that the request is complete."""
        self._server.handle(self)

    def on_connection_close(self) -> None:
        """Drop a request that broke off before it was complete."""

    def answer(self, reply: Reply) -> None:
        """Send the reply when it is due."""
        if reply.delay_seconds <= 0 and reply.ending != "hang":
            self._send(reply)
            return
        self._connection.set_close_callback(lambda: self._gone(reply))
        if reply.ending != "hang":
            self._timer = asyncio.get_running_loop().call_later(reply.delay_seconds, self._send, reply)

    def _gone(self, reply: Reply) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._server.service.settle(reply, abandoned=True)

    def _send(self, reply: Reply) -> None:
        reply = self._server.service.settle(reply, abandoned=False)
        if reply.ending == "disconnect":
            self._break_off(reply)
        else:
            self._connection.set_close_callback(None)
            headers = HTTPHeaders(_headers_of(reply))
            line = ResponseStartLine("HTTP/1.1", reply.status, _reason(reply.status))
            self._connection.write_headers(line, headers, reply.body)
            self._connection.finish()

    def _break_off(self, reply: Reply) -> None:
        """Promise the whole body, send half of it, and hang up."""
        lines = [f"HTTP/1.1 {reply.status} {_reason(reply.status)}"]
        lines += [f"{name}: {value}" for name, value in _headers_of(reply).items()]
        stream = self._connection.detach()
        if stream.closed():  # the caller has hung up first
            return
        stream.write("\r\n".join([*lines, "", ""]).encode() + reply.body[: len(reply.body) // 2])
        stream.close()


Page = Callable[[dict[str, str], bytes], Awaitable[Reply]]


class AdminPages:
    """The simulator's own pages under ``/_sim``: no provider has them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pages: dict[tuple[str, str], Page] = {
            ("GET", "/_sim/health"): self._health,
            ("GET", "/_sim/invoice"): self._invoice,
            ("GET", "/_sim/requests"): self._requests,
            ("GET", "/_sim/subscriptions"): self._subscriptions,
            ("GET", "/_sim/profile"): self._profile,
            ("PUT", "/_sim/profile"): self._set_profile,
            ("POST", "/_sim/reset"): self._reset,
        }

    def find(self, method: str, path: str) -> Page | None:
        """Return the page at ``path``, if there is one."""
        return self._pages.get((method, path))

    async def _health(self, query: dict[str, str], body: bytes) -> Reply:
        return _page({"status": "ok", "in_flight": self._service.in_flight})

    async def _invoice(self, query: dict[str, str], body: bytes) -> Reply:
        summary = query.get("summary", "0") not in ("", "0", "false")
        # Pricing thousands of calls takes seconds; in a thread it does not hold up the answers.
        return _page(await asyncio.to_thread(self._service.invoice.report, summary=summary))

    async def _requests(self, query: dict[str, str], body: bytes) -> Reply:
        last = query.get("last", str(REMEMBERED_REQUESTS))
        if not last.isdecimal():
            return _page({"error": "'last' is the number of requests to show"}, status=400)
        return _page(self._service.requests(int(last)))

    async def _subscriptions(self, query: dict[str, str], body: bytes) -> Reply:
        return _page(self._service.subscriptions())

    async def _profile(self, query: dict[str, str], body: bytes) -> Reply:
        # Only what was given: a model's field that was never set must stay unset when this is sent back.
        shown = self._service.profile.model_dump(mode="json", exclude_unset=True, exclude=set(KEYS))
        return _page(shown)

    async def _set_profile(self, query: dict[str, str], body: bytes) -> Reply:
        try:
            fields = _object(body)
            # Keys are never shown, so a profile that was read, changed and sent back does not hold them.
            kept = {name: getattr(self._service.profile, name) for name in KEYS}
            self._service.profile = Profile.parse({**kept, **fields})
        except ConfigurationError as error:
            return _page({"error": str(error)}, status=400)
        return await self._profile(query, body)

    async def _reset(self, query: dict[str, str], body: bytes) -> Reply:
        self._service.reset()
        return _page({"status": "ok"})


async def _show(exchange: _Exchange, page: Page, query: str) -> None:
    values = {name: given[-1] for name, given in parse_qs(query, keep_blank_values=True).items()}
    exchange.answer(await page(values, exchange.body))


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ConfigurationError(f"profile: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigurationError("profile: it is a JSON object")
    return fields


def _page(content: Any, *, status: int = 200) -> Reply:
    return Reply(status, to_json(content), {"content-type": JSON})


def _not_found(method: str, path: str, wire: Wire) -> Reply:
    refusal = wire.invalid(f"Invalid URL ({method} {path})")
    refusal.status = 405 if path in CALL_PATHS else 404
    return Reply(refusal.status, to_json(wire.error(refusal, "")), {"content-type": JSON})


def _headers_of(reply: Reply) -> dict[str, str]:
    return {**reply.headers, "date": _date(int(time())), "content-length": str(len(reply.body))}


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return format_timestamp(second)


def _reason(status: int) -> str:
    # 529 is Anthropic's own, and has no phrase in the standard
    return responses.get(status, "Overloaded")
