"""A job gets the cheapest model that keeps its stage at the floor; others are tried only if they could change that."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.models.choice import SLACK, Arm, choose
from attune_worker.telemetry.evidence import HALF_LIFE, RING, Evidence

NOTHING = Evidence()
FLOOR = 0.8
EXPLORATION = 0.05


def seen(rate, calls, recent=None):
    """Return evidence of that many outcomes, spread evenly unless ``recent`` says how the newest were."""
    even = "".join(str(int((i + 1) * rate) - int(i * rate)) for i in range(min(calls, RING)))
    return Evidence(rate * calls, (1 - rate) * calls, calls, calls, recent=even if recent is None else recent)


def cheap(stage=NOTHING, **fields):
    return Arm(**{"ref": "cheap", "cost": 1.0, "tier_rank": 0, "is_static": False, "stage": stage} | fields)


def capable(stage=NOTHING, **fields):
    return Arm(**{"ref": "capable", "cost": 5.0, "tier_rank": 1, "is_static": False, "stage": stage} | fields)


def premium(stage=NOTHING, **fields):
    return Arm(**{"ref": "premium", "cost": 25.0, "tier_rank": 2, "is_static": False, "stage": stage} | fields)


def chances(*arms, floor=FLOOR, exploration=EXPLORATION):
    """Return each arm's probability by its name."""
    return {one.arm.ref: one.probability for one in choose(arms, floor, exploration).scored}


def verdicts(*arms, floor=FLOOR):
    return {one.arm.ref: one.verdict for one in choose(arms, floor, EXPLORATION).scored}


def test_nothing_known_means_the_static_choice():
    """Without any outcome the static model serves, and no more than the exploration goes elsewhere."""
    found = chances(cheap(), capable(is_static=True), premium())
    assert found["capable"] >= 1 - EXPLORATION
    assert chances(cheap(), capable(is_static=True), premium(), exploration=0.0)["capable"] == 1.0


def test_what_may_not_be_explored_and_was_never_seen_gets_nothing():
    """A model that nobody judges is not tried, however cheap; what it did elsewhere does not count either."""
    elsewhere = seen(0.99, 500)
    found = chances(cheap(may_explore=False, workflow=elsewhere), capable(seen(0.9, 100), is_static=True))
    assert found == {"cheap": 0.0, "capable": 1.0}


def test_the_only_model_serves():
    """A single model gets every job, even one that may not be explored and is not static."""
    assert chances(cheap(may_explore=False)) == {"cheap": 1.0}


def test_no_models_is_an_error():
    """There is nothing to choose from."""
    with pytest.raises(ValueError, match="no model"):
        choose([], FLOOR, EXPLORATION)


def test_the_cheapest_that_meets_the_floor_is_chosen():
    """A dearer model that does even better gets nothing: it could change nothing."""
    arms = cheap(seen(0.9, 200)), premium(seen(0.97, 200), is_static=True)
    assert chances(*arms) == {"cheap": 1.0, "premium": 0.0}
    assert verdicts(*arms) == {"cheap": "chosen", "premium": "dearer than cheap"}


def test_a_cheaper_price_wins_at_once():
    """Evidence stays when a price falls, and the next job goes to what is cheapest now."""
    arms = capable(seen(0.9, 200)), premium(seen(0.95, 200), is_static=True, cost=0.5)
    assert chances(*arms)["premium"] == 1.0


def test_a_bad_model_is_neither_chosen_nor_explored():
    """A model that is known to be far below the floor gets no jobs."""
    arms = cheap(seen(0.5, 200)), premium(seen(0.9, 200), is_static=True)
    assert chances(*arms) == {"cheap": 0.0, "premium": 1.0}
    assert verdicts(*arms)["cheap"].startswith("below the floor: 0.5")


def test_surplus_is_spent_on_a_model_just_below_the_floor():
    """A stage above its floor shares its jobs, so that their average comes to the floor; the best still meets it."""
    arms = cheap(seen(0.75, 40)), premium(seen(0.95, 40), is_static=True)
    choice = choose(arms, FLOOR, EXPLORATION)
    assert (choice.best, choice.meets_floor) == (1, True)
    assert 0.3 < choice.scored[0].probability <= 1.0
    assert choice.scored[0].verdict.startswith("shares")


def test_surplus_is_not_spent_far_below_the_floor():
    """However far above its floor a stage is, no model further below than the slack gets a share."""
    arms = cheap(seen(FLOOR - SLACK - 0.05, 400)), premium(seen(0.99, 4000), is_static=True)
    assert chances(*arms)["cheap"] <= EXPLORATION


def test_a_deficit_is_made_up():
    """A stage below its floor takes a stronger model until it is back, though a cheaper one would do by itself."""
    arms = capable(seen(0.82, 100)), premium(seen(0.95, 100)), cheap(seen(0.4, 300), is_static=True)
    assert chances(*arms)["premium"] > 0.5
    assert verdicts(*arms)["premium"].startswith("shares")


def test_nothing_meets_the_floor():
    """The best there is serves, and the choice says that it is not enough."""
    arms = cheap(seen(0.3, 200)), premium(seen(0.6, 200), is_static=True)
    choice = choose(arms, FLOOR, EXPLORATION)
    assert (choice.best, choice.meets_floor) == (1, False)
    assert choice.scored[1].probability == 1.0
    assert choice.scored[1].verdict.startswith("the best there is")


def test_a_sudden_drop_shows_at_once():
    """A dozen failures among the newest twenty outweigh five hundred good outcomes; a few calls see it recover."""
    good, broken = seen(0.9, 500), seen(0.9, 500, recent="0" * 12 + "1" * 8)
    dear = premium(seen(0.95, 50), is_static=True)
    assert chances(cheap(good), dear)["cheap"] == 1.0
    assert chances(cheap(broken), dear)["cheap"] == pytest.approx(EXPLORATION)  # it may recover


def test_a_weak_static_model_is_left_for_a_dearer_tier():
    """Where the static model misses the floor, a dearer tier serves without waiting until it was explored."""
    assert chances(cheap(seen(0.4, 60), is_static=True), premium())["premium"] >= 1 - EXPLORATION


def test_a_hard_stage_is_hard_for_cheaper_tiers_too():
    """What a cheap model did elsewhere does not put it above a dearer one that struggles here."""
    arms = cheap(workflow=seen(0.9, 300)), premium(seen(0.65, 100), workflow=seen(0.9, 300), is_static=True)
    assert chances(*arms)["cheap"] <= EXPLORATION


def test_success_elsewhere_opens_a_new_stage():
    """A model that does well in the whole workflow serves a stage where it never was."""
    arms = cheap(workflow=seen(0.95, 300)), premium(is_static=True, workflow=seen(0.97, 300))
    assert chances(*arms)["cheap"] > 0.9


@st.composite
def some_arms(draw):
    count = draw(st.integers(1, 6))
    evidence = st.builds(
        lambda wins, losses, recent: Evidence(wins, losses, 0, int(wins + losses), recent=recent),
        st.floats(0, 5000),
        st.floats(0, 5000),
        st.text("01", max_size=RING),
    )
    return [
        Arm(
            ref=str(number),
            cost=draw(st.floats(0, 100)),
            tier_rank=draw(st.integers(0, 2)),
            is_static=draw(st.booleans()),
            stage=draw(st.just(NOTHING) | evidence),
            workflow=draw(st.just(NOTHING) | evidence),
            fleet=draw(st.just(NOTHING) | evidence),
            may_explore=draw(st.booleans()),
        )
        for number in range(count)
    ]


@given(arms=some_arms(), floor=st.floats(0, 1), exploration=st.floats(0, 0.5))
def test_a_choice_is_a_distribution(arms, floor, exploration):
    """Whatever is known, probabilities add up to one, intervals hold their means, and asking again gives the same."""
    choice = choose(arms, floor, exploration)
    assert choice == choose(arms, floor, exploration)
    assert sum(one.probability for one in choice.scored) == pytest.approx(1.0)
    for one in choice.scored:
        assert 0.0 <= one.probability <= 1.0 + 1e-12
        assert 0.0 <= one.lower <= one.mean <= one.upper <= 1.0
    assert [one.arm for one in choice.scored] == arms


def run(rates, requests, floor=FLOOR):
    """Return the share of jobs of each model and their success, when the choice is made afresh for every job."""
    random, history = Random(5), [NOTHING] * len(rates)
    counts, successes = [0] * len(rates), 0
    half_life = HALF_LIFE["stage"]
    for number in range(requests):
        now = [one.at(number, half_life) for one in history]
        arms = cheap(now[0], workflow=now[0]), premium(now[1], workflow=now[1], is_static=True)
        probabilities = [one.probability for one in choose(arms, floor, EXPLORATION).scored]
        [place] = random.choices(range(len(rates)), probabilities)
        succeeded = random.random() < rates[place]
        history[place] = history[place].observed(number + 1, half_life, float(succeeded))
        counts[place] += 1
        successes += succeeded
    return [count / requests for count in counts], successes / requests


def test_the_average_of_a_stage_comes_to_its_floor():
    """Over many jobs a stage between two models is held near the floor, for less than the dear one costs."""
    (share, _), success = run((0.78, 0.95), 3000)
    assert 0.5 < share < 0.95
    assert FLOOR - 0.02 < success < FLOOR + 0.03


def test_exploration_ends_where_it_cannot_pay():
    """A hopeless model costs no more than its share of the exploration, and less as it is known better."""
    (share, _), _ = run((0.2, 0.92), 2000)
    assert share < EXPLORATION / 2


def test_an_unseen_model_of_a_dearer_tier_saves_no_money_before_it_was_tried() -> None:
    """Its tier lets one presume that it is good, which is enough to help a stage in trouble, and for nothing else."""
    well = Evidence(successes=20.0, seen=20.0, calls=20, recent="1" * 20)
    choice = choose([Arm("p/usual", 3.0, 1, True, stage=well), Arm("p/unseen", 2.0, 2, False)], 0.8, 0.05)
    assert choice.best == 0
    assert choice.scored[1].probability <= 0.05
