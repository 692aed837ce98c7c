"""Which inputs are worth trying? Those that are almost right."""

from __future__ import annotations

from random import Random

from fuzz_targets import Target
from hypothesis import strategies as st

MAX_EDITS = 4
MAX_BYTES = 20_000
LENGTHS = (0, 0, 1, 2, 5, 20, 500)


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Return a strategy: now and then any bytes, mostly one of the target's seeds with a few edits.

    Hypothesis draws one number, and the edits follow from it: drawing each edit would take most of the time.
    """
    return st.one_of(
        st.binary(max_size=200), *[st.integers(0, 2**64).map(lambda number: _almost(target, Random(number)))] * 9
    )


def _almost(target: Target, chance: Random) -> bytes:
    data = chance.choice(target.seeds)
    for _ in range(chance.randint(1, MAX_EDITS)):
        start = chance.randint(0, len(data))
        end = start + chance.choice((*LENGTHS, len(data)))
        data = data[:start] + _replacement(data, target, chance) + data[end:]
    return data[:MAX_BYTES]


def _replacement(data: bytes, target: Target, chance: Random) -> bytes:
    """Return a word of the format, any bytes, nothing, or another part of ``data``."""
    kind = chance.randrange(5)
    if kind < 2 and target.words:
        return chance.choice(target.words)
    if kind == 2:
        return chance.randbytes(chance.randint(1, 8))
    if kind == 3:
        start = chance.randint(0, len(data))
        return data[start : start + chance.choice(LENGTHS)]
    return b""
