"""How large may an answer grow that arrives compressed? Never larger than one that does not.

Nobody is asked to compress, but a proxy on the way may. A few kilobytes can stand for gigabytes, and for far more
where they are compressed twice, so unpacking stops at the limit and not after it.
"""

from __future__ import annotations

import zlib

from attune_worker.errors import MalformedAnswerError, ProviderConnectionError

GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
"""Has zlib see for itself which of the two it is."""

ENCODINGS = frozenset({"gzip", "x-gzip", "deflate"})


class Body:
    """The bytes of one answer, unpacked as they arrive: never more than ``max_bytes``, packed or unpacked."""

    def __init__(self, content_encoding: str, max_bytes: int) -> None:
        """Raises ``MalformedAnswerError`` for a ``content-encoding`` that cannot be unpacked within bounds."""
        encoding = content_encoding.strip().lower()
        if encoding not in ENCODINGS | {"", "identity"}:
            raise MalformedAnswerError("the answer is packed in a way that was not asked for")
        self._max_bytes = max_bytes
        self._unpacker = zlib.decompressobj(GZIP_OR_ZLIB) if encoding in ENCODINGS else None
        self._arrived = 0
        self._body = bytearray()

    def add(self, data: bytes) -> None:
        """Take what has arrived.

        Raises ``MalformedAnswerError`` beyond the limit, ``ProviderConnectionError`` where it cannot be unpacked.
        """
        self._arrived += len(data)
        if self._unpacker is None:
            self._body += data
        else:
            self._body += self._unpacked(self._unpacker, data)
        if max(self._arrived, len(self._body)) > self._max_bytes:
            raise MalformedAnswerError(f"the answer is longer than {self._max_bytes} bytes")

    def _unpacked(self, unpacker: zlib._Decompress, data: bytes) -> bytes:
        try:
            return unpacker.decompress(data, self._max_bytes - len(self._body) + 1)
        except zlib.error:
            raise ProviderConnectionError("the answer is not packed as it says") from None

    def whole(self) -> bytes:
        """Return the answer when all of it has arrived; raises ``ProviderConnectionError`` where its end is missing."""
        if self._unpacker is not None and self._arrived and not self._unpacker.eof:
            raise ProviderConnectionError("the answer broke off before its end")
        return bytes(self._body)
