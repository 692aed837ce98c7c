import math

import pytest

from attune_worker.errors import InvalidJobError, JobNotFoundError
from attune_worker.telemetry.evidence import HALF_LIFE, Evidence


def test_a_bad_answer_that_counted_as_success_counts_as_failure_after_all(learning, telemetry):
    """The evidence is what it would be had the score been known from the start, however much came since."""
    learning.call("a/m", call_id="c")
    for score in (1, 0, 1):
        learning.call("a/m", score=score)
    assert telemetry.feedback("c", 0.2) is True
    view = telemetry.view("w", "s")
    for place, half_life in ((view.stage, "stage"), (view.workflow, "workflow"), (view.fleet, "fleet")):
        expected = Evidence()
        for seen, score in enumerate((0.2, 1, 0, 1), 1):
            expected = expected.observed(seen, HALF_LIFE[half_life], score)
        found = place.of("a/m")
        assert found.successes == pytest.approx(expected.successes)
        assert found.failures == pytest.approx(expected.failures)
        assert (found.calls, place.seen) == (4, 4)
    assert view.stage.of("a/m").recent == "1101"  # too late to say which of them it was


def test_feedback_on_the_newest_call_corrects_the_newest_outcome(learning, telemetry):
    """While the call is the model's latest, its place among the newest outcomes is known."""
    learning.call("a/m")
    learning.call("a/m", call_id="c")
    learning.call("a/other")
    telemetry.feedback("c", 0)
    view = telemetry.view("w", "s")
    assert [place.of("a/m").recent for place in (view.stage, view.workflow, view.fleet)] == ["10"] * 3


def test_an_answer_that_nobody_had_judged_becomes_evidence(learning, telemetry):
    """A success that said nothing counts from its feedback on."""
    learning.call("a/m", score=None, call_id="c")
    assert telemetry.view("w", "s").empty
    telemetry.feedback("c", 0.75)
    view = telemetry.view("w", "s")
    assert view.judged
    assert not view.empty
    for place in (view.stage, view.workflow, view.fleet):
        assert (place.of("a/m").successes, place.of("a/m").failures, place.of("a/m").recent) == (0.75, 0.25, "1")


def test_feedback_counts_once(learning, telemetry):
    """The first score stands: the second says so and changes nothing."""
    learning.call("a/m", call_id="c")
    assert telemetry.feedback("c", 0) is True
    before = telemetry.view("w", "s")
    assert telemetry.feedback("c", 1) is False
    after = telemetry.view("w", "s")
    assert (before.stage, before.workflow, before.fleet) == (after.stage, after.workflow, after.fleet)
    assert (after.stage.judged, after.workflow.judged, after.fleet.judged) == (1, 1, 0)


def test_scores_show_in_the_stats(learning, telemetry):
    """The mean is over the calls that got feedback, whether they had counted or not."""
    learning.call("a/m", call_id="one")
    learning.call("a/m", call_id="two", score=None)
    learning.call("a/m")
    telemetry.feedback("one", 1)
    telemetry.feedback("two", 0.5)
    found = telemetry.stats("w", "s", 1)["a/m"]
    assert (found.scored, found.avg_score) == (2, 0.75)


def test_feedback_never_takes_more_than_there_is(learning, telemetry):
    """Where the evidence was lost in between, there are no negative weights and no new outcomes."""
    learning.call("a/m", call_id="c")
    learning.redis.delete(learning.keys.evidence("w", "s"), learning.keys.evidence())
    learning.redis.hset(learning.keys.evidence("w"), mapping={"n": 1, "a/m": '[0.25,0.5,1,1,0,0,"1"]'})
    assert telemetry.feedback("c", 0) is True
    view = telemetry.view("w", "s")
    assert view.stage.models == view.fleet.models == {}
    assert (view.workflow.of("a/m").successes, view.workflow.of("a/m").failures) == (0, 0.75)


@pytest.mark.parametrize("score", [-0.01, 1.01, math.nan, math.inf, True, "1", None])
def test_a_score_is_a_number_from_0_to_1(learning, telemetry, score):
    """Anything else is refused with the field's name, and the call can still get its feedback."""
    learning.call("a/m", call_id="c")
    with pytest.raises(InvalidJobError) as refused:
        telemetry.feedback("c", score)
    assert refused.value.field == "score"
    assert telemetry.feedback("c", 1) is True


def test_only_calls_that_have_ended_get_feedback(learning, telemetry):
    """A call that nobody made, one under way, and a key that is not ours: not found, and nothing is written."""
    learning.redis.hset(learning.keys.call("running"), mapping={"state": "running", "ref": "a/m"})
    learning.redis.hset(
        learning.keys.call("intent"),
        mapping={"state": "running", "ref": "a/m", "workflow": "w", "stage": "s", "day": "20260101"},
    )
    learning.redis.set(learning.keys.call("foreign"), "x")
    for call_id in ("never", "running", "intent", "foreign"):
        with pytest.raises(JobNotFoundError):
            telemetry.feedback(call_id, 1)
    assert telemetry.view("w", "s").empty
