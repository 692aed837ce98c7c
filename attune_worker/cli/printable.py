"""What of a text from outside may reach a terminal? Nothing that a terminal would obey instead of show."""

from __future__ import annotations

import unicodedata

_OBEYED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control characters, invisible format characters (those that reverse the direction of text among them), halves of
characters, and separators of lines and paragraphs: the general categories of Unicode (UAX 44, table 12)."""

_JOINERS = "\u200c\u200d"
"""They only shape letters and emoji."""


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return ``text`` with what a terminal would obey written out, such as ``\x1b``, so that it is one line.

    For names, errors, prompts and answers: whoever wrote them could otherwise recolour, rewrite or retitle the
    terminal of whoever looks at them. With ``lines``, line breaks and tabs stay.
    """
    whole = str(text)
    if whole.isascii() and whole.isprintable():
        return whole
    kept = f"{_JOINERS}\n\t" if lines else _JOINERS
    return "".join(one if one in kept or unicodedata.category(one) not in _OBEYED else _written(one) for one in whole)


def _written(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
