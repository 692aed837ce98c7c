"""What is known of one model in one place, when old outcomes count less than new ones?

A place is a stage, a workflow, or the whole fleet. Age is counted in outcomes of that place and not in
hours: a busy stage forgets within the hour, a quiet one keeps what little it has. ``store/lua/telemetry.lua``
does the same arithmetic inside Redis.
"""

from __future__ import annotations

from dataclasses import dataclass

RING = 20
"""How many of the newest outcomes are kept one by one."""

HALF_LIFE = {"stage": 1000.0, "workflow": 5000.0, "fleet": 20000.0}
"""After how many outcomes of a place an outcome there counts half."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Discounted outcomes of a model in one place.

    ``successes`` and ``failures`` are weights, discounted up to ``seen``, the place's number of outcomes
    when this model had its latest. ``recent`` holds its newest outcomes, ``1`` and ``0``, the newest last.
    ``cost_nano`` and ``priced`` are the discounted sum and number of the known costs; ``calls`` counts all.
    """

    successes: float = 0.0
    failures: float = 0.0
    seen: float = 0.0
    calls: int = 0
    cost_nano: float = 0.0
    priced: float = 0.0
    recent: str = ""

    @property
    def weight(self) -> float:
        """How many outcomes this amounts to."""
        return self.successes + self.failures

    @property
    def mean_cost_nano(self) -> float | None:
        """Mean cost of a call in nano-USD; None: nothing is known."""
        return self.cost_nano / self.priced if self.priced > 0 else None

    def at(self, seen: float, half_life: float) -> Evidence:
        """Return it discounted to the moment when the place has ``seen`` outcomes; ``half_life`` is in outcomes."""
        fading = 0.5 ** (max(0.0, seen - self.seen) / half_life)
        return Evidence(
            self.successes * fading,
            self.failures * fading,
            max(seen, self.seen),
            self.calls,
            self.cost_nano * fading,
            self.priced * fading,
            self.recent,
        )

    def observed(self, seen: float, half_life: float, score: float, cost_nano: float | None = None) -> Evidence:
        """Return it after an outcome, the place's number ``seen``; ``score`` runs from 0 (failed) to 1.

        This is the reference for the arithmetic in ``store/lua/telemetry.lua``, which does the counting.
        """
        before = self.at(seen, half_life)
        return Evidence(
            before.successes + score,
            before.failures + 1 - score,
            before.seen,
            self.calls + 1,
            before.cost_nano + (cost_nano or 0),
            before.priced + (cost_nano is not None),
            (self.recent + ("1" if score >= 0.5 else "0"))[-RING:],
        )
