import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attune_worker.telemetry.sizes import Sizes
from attune_worker.telemetry.views import sizes

CALLS = st.lists(
    st.tuples(st.integers(1, 10**7), st.integers(1, 10**6), st.integers(0, 10**5)), min_size=1, max_size=30
)
GARBAGE = [b"", b"many", b"[1,2]", b'["1",1,1,1,1]', b"[1,-1,1,1,1]", b"[1,1,1,1e400,1]", b"{}", b"[" * 10_000, b"\xff"]


@given(CALLS)
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_redis_does_the_arithmetic_of_sizes(learning, telemetry, calls):
    """Whatever their lengths, Lua and Python come to the same numbers, in all three places."""
    places = [learning.keys.evidence("w", "s"), learning.keys.evidence("w"), learning.keys.evidence()]
    learning.redis.delete(*places)
    expected = Sizes()
    for prompt, tokens_in, tokens_out in calls:
        learning.call("a/m|x", bytes=prompt, input=tokens_in, output=tokens_out)
        expected = expected.observed(prompt, tokens_in, tokens_out)
    view = telemetry.view("w", "s")
    for place in (view.stage, view.workflow, view.fleet):
        found = place.sizes["a/m|x"]
        assert found.calls == len(calls)
        for name in ("weight", "bytes", "input", "output"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


def test_lengths_are_learned_of_calls_that_say_nothing_else(learning, telemetry):
    """A weaker model that answered is no evidence of its work; how long its answer was is known all the same."""
    learning.call("a/m", bytes=400, score=None)
    learning.call("a/m", bytes=None)
    learning.call("a/m", bytes=400, kind="failure", score=0)
    assert telemetry.view("w", "s").stage.sizes == {"a/m": Sizes(1, 1, 400, 10, 20)}
    assert learning.redis.ttl(learning.keys.evidence()) > 3_000_000


@pytest.mark.parametrize("garbage", GARBAGE, ids=repr)
def test_garbage_is_no_length_and_is_written_over(learning, telemetry, garbage):
    """Whoever left it there: it reads as nothing known, and the next call begins again."""
    key = learning.keys.evidence("w", "s")
    learning.redis.hset(key, mapping={"a/m|sizes": garbage, "|sizes": garbage, "a/n": "x"})
    assert sizes(garbage) == Sizes()
    assert telemetry.view("w", "s").stage.sizes == {}
    learning.call("a/m", bytes=80)
    assert telemetry.view("w", "s").stage.sizes == {"a/m": Sizes(1, 1, 80, 10, 20)}


def test_old_lengths_fade(learning, telemetry):
    """When a stage's answers become longer, so does what is expected of them."""
    for _ in range(300):
        learning.call("a/m", bytes=100, output=10)
    for _ in range(300):
        learning.call("a/m", bytes=100, output=90)
    assert telemetry.view("w", "s").stage.sizes["a/m"].mean_output == pytest.approx(10 / 3 + 90 * 2 / 3, rel=1e-3)
