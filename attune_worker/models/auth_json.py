"""What stands in a strategy's JSON, on which line, and what is wrong with it?

For a text that people edit by hand: whatever is wrong is told with its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple

from attune_worker.errors import ConfigurationError

MAX_KEY_CHARACTERS = 80


class Entry(NamedTuple):
    """A value, and the line (from 1) that its key is on."""

    value: Any
    line: int


class Complaint(NamedTuple):
    """A key, and what is wrong with its value."""

    key: str
    message: str


def entries(text: bytes | str, place: str) -> dict[str, Entry]:
    """Return the entries of the one JSON object that a text is.

    Raises ``ConfigurationError`` naming ``place`` and line for anything else, and for a key that is given twice.
    """
    text = _decoded(text, place) if isinstance(text, bytes) else text
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(place, error.lineno, f"it is not valid JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, or brackets without end
        raise _wrong(place, 1, "it is not valid JSON that a strategy could be read from") from None
    if not isinstance(whole, dict):
        raise _wrong(place, 1, "it should be a JSON object: {…}")
    found: dict[str, Entry] = {}
    for key, entry in _scanned(text):
        if key in found:
            raise _wrong(place, entry.line, f"{key[:MAX_KEY_CHARACTERS]} is given twice; take one of them out")
        found[key] = entry
    return found


def explain(kind: str, key: str, message: str, known: Iterable[str]) -> str:
    """Return pydantic's complaint of some kind about a key in our words."""
    if kind != "extra_forbidden":
        return message.replace("Input should", "it should")
    names = list(known)
    close = get_close_matches(key, names, n=1)
    return f"unknown key; did you mean {close[0]!r}?" if close else f"unknown key; allowed: {', '.join(names)}"


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(place, raw.count(b"\n", 0, error.start) + 1, "it is not valid UTF-8") from None


def _scanned(text: str) -> Iterator[tuple[str, Entry]]:
    """Yield the entries of a valid JSON object in their order."""
    decoder = json.JSONDecoder()
    at = _next(text, text.index("{") + 1)
    while text[at] != "}":
        line = text.count("\n", 0, at) + 1
        key, at = decoder.raw_decode(text, at)
        value, at = decoder.raw_decode(text, _next(text, _next(text, at) + 1))  # past the colon
        yield key, Entry(value, line)
        at = _next(text, at)
        if text[at] == ",":
            at = _next(text, at + 1)


def _next(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _wrong(place: str, line: int, problem: str) -> ConfigurationError:
    return ConfigurationError(f"{place}, line {line}: {problem}")
