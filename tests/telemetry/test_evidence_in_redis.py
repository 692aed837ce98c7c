import json

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attune_worker.telemetry.evidence import HALF_LIFE, Evidence

REFS = ("a/small", "b/meta/llama|3")
OUTCOMES = st.lists(
    st.tuples(
        st.sampled_from(REFS),
        st.one_of(st.none(), st.sampled_from([0, 1, 0.5]), st.floats(0, 1, width=32)),
        st.one_of(st.none(), st.integers(0, 10**15)),
        st.sampled_from([0.5, 3.0, 1000.0]),
    ),
    min_size=1,
    max_size=40,
)


def read(learning, key, ref):
    """Return the numbers of a model as they stand in Redis."""
    *numbers, recent = json.loads(learning.redis.hget(key, ref))
    return numbers, recent


@given(OUTCOMES)
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_redis_does_the_arithmetic_of_evidence(learning, outcomes):
    """Whatever happens in whatever order, Lua and Python come to the same numbers."""
    learning.redis.delete(key := learning.keys.evidence("w", "s"))
    expected, seen = {}, 0
    for ref, score, cost_nano, half_life in outcomes:
        numbers = learning.call(ref, score=score, cost_nano=cost_nano, half_life={**HALF_LIFE, "stage": half_life})
        if score is None:
            assert numbers == [None, None, None]
            continue
        seen += 1
        assert numbers[0] == seen
        expected[ref] = expected.get(ref, Evidence()).observed(seen, half_life, score, cost_nano)
    assert learning.redis.hlen(key) == len(expected) + bool(expected)
    for ref, one in expected.items():
        numbers, recent = read(learning, key, ref)
        wanted = [one.successes, one.failures, one.seen, one.calls, one.cost_nano, one.priced]
        assert numbers == pytest.approx(wanted, rel=1e-12)
        assert recent == one.recent


def test_a_stage_its_workflow_and_the_fleet_learn_from_a_call(learning, telemetry):
    """The places count on their own: another stage's call is one of the workflow's, another workflow's of the fleet."""
    assert learning.call("a/m") == [1, 1, 1]
    assert learning.call("a/m", stage="other") == [1, 2, 2]
    assert learning.call("a/m", workflow="other", score=0, kind="failure") == [1, 1, 3]
    view = telemetry.view("w", "s")
    assert (view.stage.seen, view.workflow.seen, view.fleet.seen) == (1, 2, 3)
    assert view.stage.of("a/m").recent == "1"
    assert view.workflow.of("a/m").recent == "11"
    assert view.fleet.of("a/m").recent == "110"


def test_evidence_is_discounted_when_it_is_read(learning, telemetry):
    """A model that was not used for a while is known less well than one that was."""
    learning.call("a/old")
    for _ in range(100):
        learning.call("a/new")
    stage = telemetry.view("w", "s").stage
    assert stage.of("a/old").weight == pytest.approx(0.5 ** (100 / HALF_LIFE["stage"]))
    assert stage.of("a/old").calls == 1


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "nonsense",
        "{}",
        "[1,2,3]",
        "[" * 5000,
        '[1,1,1,1,1,1,"12"]',
        '[1,1,1,1,1,1,"111111111111111111111"]',
        '[-1,0,1,1,1,1,""]',
        '[NaN,0,1,1,1,1,""]',
        '[1e999,0,1,1,1,1,""]',
        '["1",0,1,1,1,1,""]',
        '[1,0,99,1,1,1,"1"]',
        "[1,0,1,1,1,1,null]",
        b"\xff\xfe",
    ],
)
def test_garbage_counts_as_nothing(learning, telemetry, garbage):
    """Evidence that nobody here wrote is neither believed nor an error, for Lua as for Python."""
    key = learning.keys.evidence("w", "s")
    learning.redis.hset(key, mapping={"n": 5, "a/m": garbage, "judged": "many"})
    assert telemetry.view("w", "s").stage.models == {}
    assert not telemetry.view("w", "s").judged
    learning.call("a/m")
    assert read(learning, key, "a/m") == ([1, 0, 6, 1, 1000, 1], "1")


def test_foreign_types_under_our_keys_are_replaced(learning, telemetry):
    """A string where a hash should be costs what was known there, and nothing else."""
    learning.call("a/m")
    keys = [key.decode() for key in learning.redis.keys(f"{learning.keys.tag}:*")]
    assert len(keys) == 5
    for key in keys:
        learning.redis.set(key, "foreign")
    assert telemetry.view("w", "s").empty
    assert telemetry.stages("w") == []
    assert learning.call("a/m") == [1, 1, 1]
    assert telemetry.stats("w", None, 1)["a/m"].calls == 1


def test_everything_that_is_learned_is_forgotten_in_the_end(learning):
    """Each key has its 35 days."""
    learning.call("a/m", call_id="c")
    learning.redis.delete(learning.keys.call("c"))
    for key in learning.redis.keys(f"{learning.keys.tag}:*"):
        assert 34 * 86_400 < learning.redis.ttl(key) <= 35 * 86_400, key
