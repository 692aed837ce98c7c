"""What becomes of a message that is none of ours? One line in the log, and the worker takes the next.

Celery's consumer ends the process when a message is not built as it expects; Kombu then puts that message back
into the queue, where it ends the next worker, and so the whole fleet. Whoever can write to the broker could do
that by accident: a client in another language that leaves out the task's id is enough.
"""

from __future__ import annotations

import bz2
import logging
import lzma
import zlib
from collections.abc import Callable
from queue import Empty
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import compression
from kombu.message import Message
from kombu.transport.virtual import Transport as VirtualTransport

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 33 * 2**20
"""Of a message, unpacked. A wake-up has a hundred bytes; a job can be no longer than what providers take, 32 MB."""

MAX_NAME_CHARACTERS = 256
"""Of a task's name, its id, and the id of a job."""


class UnwelcomeMessageError(InvalidTaskError):  # type: ignore[misc]  # celery has no type information
    """Raised for a message that is refused before Celery looks at it; says why, in our own words."""


class Intake(CeleryConsumer):  # type: ignore[misc]  # celery has no type information
    """Celery's consumer, for a queue into which others may write what they like."""

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        """Connect to the broker; what cannot even be unpacked is dropped where it is read."""
        connection = super().connection_for_read(heartbeat)
        if isinstance(connection.transport, VirtualTransport):
            self._drop_the_unreadable(connection.transport)
        return connection

    def _drop_the_unreadable(self, transport: Any) -> None:
        """Have a broker of Kombu's own making (Redis, not RabbitMQ) survive an entry that is no message."""
        read = transport.on_readable

        def on_readable(*args: Any) -> None:
            try:
                read(*args)
            except Empty:  # Kombu's word for: there was none
                raise
            except self._broken_connections:
                raise
            except Exception as error:  # noqa: BLE001  # the edge: anything may stand in the queue
                _say_refused(error)

        transport.on_readable = on_readable

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        """Return what is called with each message; it refuses what Celery would trip over."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Message) -> None:
            try:
                check(message)
                handle(message)
            except Exception as error:  # the edge: a message that is not as Celery expects it
                if isinstance(error, self._broken_connections) and not isinstance(error, KeyError):
                    raise
                _say_refused(error)
                if not message.acknowledged:
                    message.reject_log_error(logger, self.connection_errors)  # type: ignore[no-untyped-call]

        return on_task_received

    @property
    def _broken_connections(self) -> tuple[type[Exception], ...]:
        return (*self.connection_errors, *self.channel_errors)


def check(message: Message) -> None:
    """Raise ``UnwelcomeMessageError`` for a message that cannot be a task, whichever client has sent it."""
    if not isinstance(message.headers, dict):
        raise UnwelcomeMessageError("its headers are no object")
    if message.body is not None and len(message.body) > MAX_BODY_BYTES:
        raise UnwelcomeMessageError(f"its body is longer than {MAX_BODY_BYTES} bytes")
    if "task" in message.headers:  # without, it is of Celery's old protocol and has everything in its body
        for field in ("task", "id"):
            if not is_name(message.headers.get(field)):
                raise UnwelcomeMessageError(f"the {field} in its headers is not a name")


def is_name(value: object) -> bool:
    """Whether ``value`` can stand in keys, logs and a terminal: text that is short, printable and not empty."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARACTERS and value.isprintable()


def _say_refused(error: Exception) -> None:
    # The words of others' errors may hold a part of the message.
    why = str(error) if isinstance(error, UnwelcomeMessageError) else type(error).__name__
    logger.warning("a message in the queue is no task and was dropped: %s", why)


def unpack_zlib(data: bytes) -> bytes:
    """Unpack what zlib has packed; raises ``UnwelcomeMessageError`` beyond ``MAX_BODY_BYTES``."""
    unpacker = zlib.decompressobj()
    return _within_limit(unpacker.decompress(data, MAX_BODY_BYTES + 1))


def unpack_bz2(data: bytes) -> bytes:
    """Unpack bzip2 in the same way."""
    return _within_limit(bz2.BZ2Decompressor().decompress(data, MAX_BODY_BYTES + 1))


def unpack_lzma(data: bytes) -> bytes:
    """Unpack xz in the same way."""
    return _within_limit(lzma.LZMADecompressor().decompress(data, MAX_BODY_BYTES + 1))


def _within_limit(body: bytes) -> bytes:
    if len(body) > MAX_BODY_BYTES:
        raise UnwelcomeMessageError(f"it unpacks to more than {MAX_BODY_BYTES} bytes")
    return body


def _refuse(_data: bytes) -> bytes:
    raise UnwelcomeMessageError("it is packed in a way that cannot be unpacked within bounds")


def bound_unpacking() -> None:
    """Have Kombu unpack no more than ``MAX_BODY_BYTES`` of a message in this process; its own ways have no bound."""
    bounded = {"application/x-gzip": unpack_zlib, "application/x-bz2": unpack_bz2, "application/x-lzma": unpack_lzma}
    for kind in compression.encoders():  # type: ignore[no-untyped-call]
        pack, _ = compression.get_encoder(kind)  # type: ignore[no-untyped-call]
        compression.register(pack, bounded.get(kind, _refuse), kind)  # type: ignore[no-untyped-call]


bound_unpacking()
