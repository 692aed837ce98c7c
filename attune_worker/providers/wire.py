"""How are providers' JSON bodies written and read, when what comes back may be anything?

Readers raise ``UnreadableError`` with a reason of our own; nothing of a body is ever repeated in it,
because a body may hold the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attune_worker.jobs import Usage

MAX_COUNT = 2**31
"""No call counts as many tokens; a larger number is a broken server, and would break the books."""

REQUEST_ID_HEADERS = ("request-id", "x-request-id")
"""Where Anthropic, and OpenAI and most servers like it, put the id that their support asks for."""

MAX_LABEL = 128


class UnreadableError(ValueError):
    """Raised when a body is not what its wire format promises; the message says what is wrong with it."""


def encode(fields: Mapping[str, Any]) -> bytes:
    """Return ``fields`` as compact JSON in UTF-8."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def decode(body: bytes) -> Any:
    """Return what ``body`` says; raises ``UnreadableError`` where it is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # ValueError is also bad UTF-8, and integers of thousands of digits
        raise UnreadableError("it is not JSON") from None


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``; raises ``UnreadableError`` for anything else."""
    document = decode(body)
    if not isinstance(document, dict):
        raise UnreadableError("it is not a JSON object")
    return document


def mapping(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the object under ``name``; an absent or null one is empty."""
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UnreadableError(f"{name!r} is not an object")
    return value


def optional_count(fields: Mapping[str, Any], name: str) -> int | None:
    """Return the number of tokens under ``name``; None where it is absent or null."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():  # some servers write 12.0
        value = int(value)
    if type(value) is not int or not 0 <= value <= MAX_COUNT:  # isinstance would let true and false through
        raise UnreadableError(f"{name!r} is not a count of tokens")
    return value


def count(fields: Mapping[str, Any], name: str) -> int:
    """Return the number of tokens under ``name``; zero where it is absent or null."""
    return optional_count(fields, name) or 0


def text(fields: Mapping[str, Any], name: str) -> str:
    """Return the string under ``name``, with half surrogate pairs replaced.

    An answer cut off inside an emoji holds half a pair, which no UTF-8 store would take.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise UnreadableError(f"{name!r} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def label(value: object) -> str | None:
    """Return ``value`` if it can serve as a name in logs and records: short, printable, not empty."""
    if isinstance(value, str) and 0 < len(value) <= MAX_LABEL and value.isprintable():
        return value
    return None


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the provider's id of the call, where it gave one."""
    for name in REQUEST_ID_HEADERS:
        if name in headers:
            return label(headers[name])
    return None


def consistent(usage: Usage) -> Usage | None:
    """Return ``usage`` if its parts fit into their wholes, and None, for unknown, if they do not.

    Counts that contradict each other cannot be billed, but the answer beside them is paid for and
    good: refusing it would buy the same contradiction again on every retry.
    """
    fits = (
        usage.cache_read_tokens + usage.cache_write_tokens <= usage.input_tokens
        and usage.cache_write_1h_tokens <= usage.cache_write_tokens
        and usage.reasoning_tokens <= usage.output_tokens
    )
    return usage if fits else None
