"""Which files may be named, and what text is in them or comes from standard input?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click


class FileName(click.Path):
    """The name of a file that may be there or not. An empty one is none: it would be taken for the current folder."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it, or say what is wrong with it."""
        if value == "":
            self.fail("it is empty; it should be the name of a file", param, ctx)
        return super().convert(value, param, ctx)


def text_of(file: Path | None) -> str:
    """Return the text that is in a file, or comes from standard input (None).

    Raises ``click.UsageError`` where there is none: standard input may be closed (``<&-``).
    """
    name = "standard input" if file is None else str(file)
    try:
        return (_standard_input() if file is None else file.read_bytes()).decode()
    except UnicodeDecodeError:
        raise click.UsageError(f"{name}: is not UTF-8 text") from None
    except OSError as error:
        raise click.UsageError(f"{name}: cannot be read: {error.strerror}") from None


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise click.UsageError("standard input: is closed, so nothing can be read from it")
    return sys.stdin.buffer.read()
