from __future__ import annotations

import pytest

from attune_worker.jobs import Job
from attune_worker.models.sizing import ENOUGH, GUESS, OUTPUT_TOKENS, basis
from attune_worker.telemetry.sizes import Sizes
from attune_worker.telemetry.views import Place, StageView

JOB = Job.parse({"task_type": "summarize", "prompt": "?" * 1000})


def place(**calls: int) -> Place:
    """Return a place where models ``m`` and ``n`` have had so many calls, of 100 bytes, 50 and 7 tokens each."""
    return Place(sizes={name: Sizes(n, n, 100 * n, 50 * n, 7 * n) for name, n in calls.items()})


@pytest.mark.parametrize(
    ("stage", "workflow", "fleet", "where", "own", "calls"),
    [
        ({}, {}, {}, None, True, 0),
        ({"m": ENOUGH}, {"m": 100}, {"m": 900}, "stage", True, ENOUGH),
        ({"m": ENOUGH - 1}, {"m": 100}, {"m": 900}, "workflow", True, 100),
        ({"m": 1, "n": ENOUGH}, {"m": 100}, {"m": 900}, "stage", False, ENOUGH + 1),
        ({"n": ENOUGH}, {"m": 100}, {"m": 900}, "stage", False, ENOUGH),
        ({}, {"n": 9}, {"m": 900}, "workflow", False, 9),
        ({}, {}, {"m": 900, "n": 5}, "fleet", True, 900),
        ({}, {}, {"n": 5}, "fleet", False, 5),
        ({"m": 1}, {"m": 2}, {"m": 3}, "stage", True, 1),
        ({"n": 1}, {}, {}, "stage", False, 1),
    ],
)
def test_the_narrowest_place_with_enough_calls_decides(
    stage: dict[str, int],
    workflow: dict[str, int],
    fleet: dict[str, int],
    where: str | None,
    own: bool,
    calls: int,
) -> None:
    """Its own calls before those of other models there; and where none has enough, the narrowest with any."""
    found = basis(StageView(place(**stage), place(**workflow), place(**fleet)), "m")
    assert (found.where, found.own, found.calls) == (where, own, calls)
    assert ("a guess" in str(found)) == (where is None)
    if where is not None:
        assert found.tokens(JOB, 4096) == (500, 7)


def test_without_any_call_it_is_a_guess() -> None:
    """Four bytes a token, and an answer of 500."""
    assert basis(StageView(), "m") is GUESS
    assert GUESS.tokens(JOB, 4096) == (250, OUTPUT_TOKENS)


def test_nothing_is_expected_beyond_what_can_be() -> None:
    """No more answer than ``max_tokens``, no more prompt than bytes; and one token at least, whatever was learned."""
    view = StageView(Place(sizes={"m": Sizes(9, 9, 9, 9e9, 9e9), "n": Sizes(9, 9, 9e12, 1, 0)}))
    assert basis(view, "m").tokens(JOB, 64) == (1032, 64)
    assert basis(view, "n").tokens(JOB, 64) == (1, 1)
