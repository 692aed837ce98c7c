"""How many tokens will a call take, going by those before it?

Pure, and cheap enough to be asked before every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attune_worker.jobs import Job
from attune_worker.models.routing import BYTES_PER_TOKEN, most_tokens
from attune_worker.telemetry.sizes import Sizes
from attune_worker.telemetry.views import Place, StageView

ENOUGH = 5
"""From how many calls on their mean is worth more than what is known of a wider place."""

OUTPUT_TOKENS = 500
"""Length of an answer while nothing is known at all."""

Where = Literal["stage", "workflow", "fleet"]


@dataclass(frozen=True, slots=True)
class Basis:
    """What lengths are estimated by: means over ``calls`` calls of a place, None: nothing was called yet.

    ``own``: they are those of the model itself, and not of all models there.
    """

    tokens_per_byte: float = 1 / BYTES_PER_TOKEN
    output_tokens: float = OUTPUT_TOKENS
    calls: int = 0
    where: Where | None = None
    own: bool = True

    def __str__(self) -> str:
        if self.where is None:
            return "a guess: nothing was called yet"
        whose = "this model" if self.own else "all models"
        place = {"stage": "in this stage", "workflow": "in this workflow", "fleet": "of the whole fleet"}[self.where]
        return f"learned from {self.calls} call{'' if self.calls == 1 else 's'} of {whose} {place}"

    def tokens(self, job: Job, output_limit: int) -> tuple[int, int]:
        """Return how many tokens a job's prompt and its answer should be."""
        prompt = round(job.text_bytes * self.tokens_per_byte)
        return max(1, min(prompt, most_tokens(job))), max(1, min(round(self.output_tokens), output_limit))


GUESS = Basis()


def basis(view: StageView, ref: str) -> Basis:
    """Return what to estimate a model's next call in a stage by; kept with the view.

    The stage, then its workflow, then the fleet; in each place the model's own calls, then those of all models, as
    what is asked for says more of an answer's length than who answers. Taken is the first with ``ENOUGH`` calls,
    and where none has so many the first with any.
    """
    key = "basis", ref
    found: Basis | None = view.derived.get(key)
    if found is None:
        found = view.derived[key] = _basis(view, ref)
    return found


def _basis(view: StageView, ref: str) -> Basis:
    places: tuple[tuple[Where, Place], ...] = (
        ("stage", view.stage),
        ("workflow", view.workflow),
        ("fleet", view.fleet),
    )
    known = [
        Basis(sizes.tokens_per_byte, sizes.mean_output, sizes.calls, where, own)
        for where, place in places
        for own, sizes in ((True, place.sizes.get(ref, Sizes())), (False, Sizes.total(place.sizes.values())))
        if sizes.usable
    ]
    return next((one for one in known if one.calls >= ENOUGH), known[0] if known else GUESS)
