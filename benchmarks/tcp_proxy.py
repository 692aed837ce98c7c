"""How are the connections of a fleet cut without touching the fleet or its server? By a proxy in between."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

LOOPBACK = "127.0.0.1"
CHUNK_BYTES = 65_536
START_SECONDS = 10.0


class TcpProxy:
    """Passes every connection on to a port of this machine, from a thread, while the context is entered.

    A connection that the other port refuses is closed at once, as if the proxy were not there.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._carriers: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tcp-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise TimeoutError("the proxy did not begin to listen")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def cut(self) -> int:
        """Reset all connections there are, and return how many; new ones are passed on as before."""

        async def cut() -> int:
            return self._reset()

        return asyncio.run_coroutine_threadsafe(cut(), self._loop).result()

    def _serve(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._pass_on, LOOPBACK, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ended.wait()
        server.close()
        self._reset()
        await asyncio.gather(*self._carriers, return_exceptions=True)

    def _reset(self) -> int:
        for writer in self._open:
            _hang_up(writer)
        return len(self._open) // 2

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self.target_port)
        except OSError:
            _hang_up(writer)
            return
        ends, carrier = {writer, far_writer}, asyncio.current_task()
        assert carrier is not None
        self._open |= ends
        self._carriers.add(carrier)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, far_writer))
                both.create_task(_pump(far_reader, writer))
        finally:
            self._open -= ends
            self._carriers.discard(carrier)
            for end in ends:
                end.close()


def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Reset a connection: whoever is at the other end does not take it for an end in good order."""
    with suppress(OSError):  # it has gone by itself
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry what one side says to the other until it stops, and tell the other so."""
    with suppress(OSError):  # either side may hang up at any time
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()
