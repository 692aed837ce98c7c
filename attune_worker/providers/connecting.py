"""How is a TCP connection made so that the attempt can be broken off from another thread?

httpcore's own way, ``socket.create_connection``, hears of nothing until its timeout is over.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import httpcore

SLICE_SECONDS = 0.1
"""For how long an attempt waits before it asks again whether it is still wanted."""


def connect(
    address: tuple[str, int],
    timeout_seconds: float | None,
    check: Callable[[], object],
    local_address: str | None = None,
    options: Iterable[httpcore.SOCKET_OPTION] = (),
) -> socket.socket:
    """Return a connection to ``address`` (host, port), made as ``socket.create_connection`` makes one.

    The host's addresses are tried in turn, each for ``timeout_seconds`` (None: as long as the system does).
    ``check`` is called before each and every ``SLICE_SECONDS``; what it raises ends the attempt. Looking up the
    host is the system's, and cannot be broken off.

    Raises ``TimeoutError`` or another ``OSError``: what the last address ended with.
    """
    options = [*options, (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]  # as httpcore sets it

    def attempt(family: int, kind: int, protocol: int, _name: str, target: Any) -> socket.socket:
        check()
        connection = socket.socket(family, kind, protocol)
        try:
            for option in options:
                connection.setsockopt(*option)
            if local_address is not None:
                connection.bind((local_address, 0))
            connection.setblocking(False)
            _wait(connection, connection.connect_ex(target), timeout_seconds, check)
        except BaseException:
            connection.close()
            raise
        return connection

    *firsts, last = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    for found in firsts:
        with suppress(OSError):  # another address may answer
            return attempt(*found)
    return attempt(*last)


def _wait(connection: socket.socket, begun: int, timeout_seconds: float | None, check: Callable[[], object]) -> None:
    """Wait until ``connection`` stands; ``begun`` is what its ``connect_ex`` returned."""
    until = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    ready = select.poll()
    ready.register(connection, select.POLLOUT)
    failed = begun
    while failed in (errno.EINPROGRESS, errno.EINTR):
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if ready.poll(1000 * min(SLICE_SECONDS, left)):
            failed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            check()
    if failed:
        raise OSError(failed, os.strerror(failed))
