"""How many lines of code does a source file have? Those that are neither blank nor nothing but a comment.

Pygments knows what a comment is in each language; it comes with rich.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

from attune_worker.errors import AttuneError

MAX_SOURCE_BYTES = 8 * 2**20
"""A larger file is data, and would take many seconds to read as source."""

_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
"""What no text has in it, and most binary files have at their beginning."""

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

_STRING = re.compile(r"\w*[\"']")
"""How a documentation string begins, where documentation is no comment."""


class SourceFileError(AttuneError):
    """Raised when a file's lines cannot be counted: it is not there, cannot be read, or is no text."""

    exit_code = 2
    type = "source_file"

    def __init__(self, message: str, *, path: Path | str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)


def count_lines_of_code(path: Path | str) -> int:
    """Return how many lines of a source file hold code.

    A line with code and a comment counts. Lines of a string count, docstrings among them, except blank ones; so do
    preprocessor directives. Which language it is follows from the file's name, or the program in its ``#!`` line; where
    it is not known every line that is not blank counts. Raises ``SourceFileError``.
    """
    text = _text(_bytes(Path(path)), path)
    lines: set[int] = set()
    number = 0
    for kind, value in _lexer(Path(path).name, text).get_tokens(text):
        first, *others = value.split("\n")
        code = _is_code(kind, value)
        for place, part in enumerate((first, *others)):
            if code and part.strip("\ufeff \t\r\f\v"):
                lines.add(number + place)
        number += len(others)
    return len(lines)


def _bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise SourceFileError("it is a folder; name a file in it", path=path)
        if not stat.S_ISREG(status.st_mode):
            raise SourceFileError("it is not a regular file", path=path)
        if status.st_size > MAX_SOURCE_BYTES:
            told = f"{status.st_size:,} bytes are too many for a source file; at most {MAX_SOURCE_BYTES:,}"
            raise SourceFileError(told, path=path)
        with path.open("rb") as stream:
            return stream.read(MAX_SOURCE_BYTES)
    except FileNotFoundError:
        raise SourceFileError("there is no such file", path=path) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null in it
        raise SourceFileError(f"it cannot be read: {getattr(error, 'strerror', None) or error}", path=path) from None


def _text(raw: bytes, path: Path | str) -> str:
    """Return the file's text: UTF-8, else UTF-16 with its mark, else something of one byte a character."""
    try:
        if raw.startswith(_UTF_16):
            return raw.decode("utf-16")
        if not _CONTROLS.search(raw):
            return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        if not raw.startswith(_UTF_16):
            return raw.decode("latin-1")  # which characters those are does not matter to what a line is
    raise SourceFileError("it is a binary file, not source code", path=path)


def _lexer(name: str, text: str) -> Any:
    from pygments.lexers import get_lexer_for_filename, guess_lexer
    from pygments.lexers.special import TextLexer
    from pygments.util import ClassNotFound

    try:
        return get_lexer_for_filename(name, text, stripnl=False)
    except ClassNotFound:
        return guess_lexer(text, stripnl=False) if text.startswith("#!") else TextLexer(stripnl=False)


def _is_code(kind: Any, value: str) -> bool:
    from pygments.token import Comment, String

    if kind in Comment.Preproc or kind in Comment.PreprocFile:
        return True
    if kind in String.Doc:  # Python's docstrings are strings, Rust's /// are comments
        return _STRING.match(value) is not None
    return kind not in Comment
