"""How long are the prompts and answers of a model in one place, when older calls count less than new ones?

``store/lua/telemetry.lua`` does the same arithmetic inside Redis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE = 300.0
"""After how many calls of the model in its place a call counts half."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Calls whose tokens are known: ``calls`` counts all, the others are discounted.

    ``weight`` is their discounted number; ``bytes`` (UTF-8) and ``input`` (tokens) are those of their prompts, and
    ``output`` the tokens of their answers.
    """

    calls: int = 0
    weight: float = 0.0
    bytes: float = 0.0
    input: float = 0.0
    output: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether anything can be learned from it."""
        return self.weight > 0 and self.bytes > 0 and self.input > 0

    @property
    def tokens_per_byte(self) -> float:
        """Tokens that a byte of a prompt comes to; only of what is usable."""
        return self.input / self.bytes

    @property
    def mean_input(self) -> float:
        """Tokens of a prompt; only of what is usable."""
        return self.input / self.weight

    @property
    def mean_output(self) -> float:
        """Tokens of an answer; only of what is usable."""
        return self.output / self.weight

    def observed(self, prompt_bytes: int, input_tokens: int, output_tokens: int) -> Sizes:
        """Return it after a call.

        This is the reference for the arithmetic in ``store/lua/telemetry.lua``, which does the counting.
        """
        fading = 0.5 ** (1 / HALF_LIFE)
        return Sizes(
            self.calls + 1,
            self.weight * fading + 1,
            self.bytes * fading + prompt_bytes,
            self.input * fading + input_tokens,
            self.output * fading + output_tokens,
        )

    @classmethod
    def total(cls, parts: Iterable[Sizes]) -> Sizes:
        """Return the sum of several."""
        several = list(parts)
        return cls(
            sum(one.calls for one in several),
            sum(one.weight for one in several),
            sum(one.bytes for one in several),
            sum(one.input for one in several),
            sum(one.output for one in several),
        )
