import json
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.telemetry.histogram import LAST, bound_ms, bucket_of, percentile_ms
from attune_worker.telemetry.store import Telemetry


def test_calls_are_counted_by_what_they_say(learning, telemetry):
    """Answers and failures make the success rate; a rate limit is a call, and says nothing about the model."""
    learning.call("a/m", latency_ms=100, cost_nano=1000)
    learning.call("a/m", latency_ms=300, cost_nano=None, score=None)
    learning.call("a/m", kind="failure", score=0, latency_ms=9000, cost_nano=None, output=0)
    learning.call("a/m", kind="other", score=None, latency_ms=5, cost_nano=0, input=0, output=0)
    found = telemetry.stats("w", "s", 1)["a/m"]
    assert (found.calls, found.succeeded, found.failed, found.unpriced) == (4, 2, 1, 2)
    assert found.success_rate == pytest.approx(2 / 3)
    assert found.avg_cost_usd == Decimal("0.0000005")
    assert found.avg_latency_ms == 200
    assert (found.input, found.output) == (30, 40)
    assert sum(found.latencies.values()) == 2
    assert telemetry.view("w", "s").stage.of("a/m").recent == "10"


def test_traffic_adds_up_over_stages_and_models_stay_apart(learning, telemetry):
    """Without a stage it is the whole workflow, and never another one; ids may hold any character."""
    learning.call("a/m|x", stage='one "quoted"')
    learning.call("a/m|x", stage="two:two")
    learning.call("a/n", stage="two:two")
    learning.call("a/n", workflow="v")
    assert telemetry.stages("w") == ['one "quoted"', "two:two"]
    assert {ref: one.calls for ref, one in telemetry.stats("w", None, 7).items()} == {"a/m|x": 2, "a/n": 1}
    assert {ref: one.calls for ref, one in telemetry.stats("w", "two:two", 7).items()} == {"a/m|x": 1, "a/n": 1}
    assert telemetry.stats("nobody", None, 7) == {}


def test_counters_that_overflow_or_hold_text_begin_again(learning, telemetry):
    """No value that somebody left in a counter keeps a call from being settled."""
    learning.call("a/m")
    (key,) = learning.redis.keys(f"{learning.keys.tag}:stats:*")
    learning.redis.hset(key, mapping={"a/m|calls": "many", "a/m|input": 2**63 - 1, "a/m|h99": 3, "junk": "x"})
    assert telemetry.stats("w", "s", 1)["a/m"].calls == 0
    learning.call("a/m", input=7)
    found = telemetry.stats("w", "s", 1)["a/m"]
    assert (found.calls, found.input, found.succeeded) == (1, 7, 2)


def test_stages_are_remembered_for_35_days_and_no_more_than_the_newest(learning, telemetry):
    """The index of places has a bound, whatever names callers make up."""
    now = time.time() * 1000
    learning.redis.zadd(learning.keys.stages, {json.dumps(["w", "old"]): now - 36 * 86_400_000, "junk": now})
    learning.redis.zadd(learning.keys.stages, {json.dumps(["w", f"s{i}"]): now - 20_000 + i for i in range(10_000)})
    learning.call("a/m", stage="newest")
    assert learning.redis.zcard(learning.keys.stages) == 10_000
    stages = telemetry.stages("w")
    assert "newest" in stages
    assert "old" not in stages


def test_without_redis_reading_says_so(settings):
    """What is known cannot be read, and the error is ours."""
    values = settings.model_dump() | {"redis_url": "redis://127.0.0.1:1/0"}
    telemetry = Telemetry(Settings(**values))
    with pytest.raises(ServiceUnavailableError):
        telemetry.view("w", "s")


@given(st.integers(0, 3_600_000))
def test_a_bucket_holds_its_latency(latency_ms):
    """A latency lies between the bounds of its bucket."""
    bucket = bucket_of(latency_ms)
    assert bucket == LAST or latency_ms <= bound_ms(bucket) + 1e-6
    assert bucket == 0 or latency_ms > bound_ms(bucket - 1)


def test_redis_counts_into_the_same_buckets(learning, telemetry):
    """At each bound, and a millisecond to either side, Lua and Python agree."""
    bounds = {round(bound_ms(bucket)) for bucket in range(LAST + 2)}
    latencies = sorted({max(0, bound + step) for bound in bounds for step in (-1, 0, 1)} | {0})
    expected: dict[int, int] = {}
    for latency_ms in latencies:
        learning.call("a/m", latency_ms=latency_ms)
        expected[bucket_of(latency_ms)] = expected.get(bucket_of(latency_ms), 0) + 1
    assert telemetry.stats("w", "s", 1)["a/m"].latencies == expected


@given(st.lists(st.integers(1, 700_000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_percentile_is_close_to_the_real_one(latencies, share):
    """It is in the bucket of the real one, so off by less than the square root of 2."""
    counts: dict[int, int] = {}
    for latency_ms in latencies:
        counts[bucket_of(latency_ms)] = counts.get(bucket_of(latency_ms), 0) + 1
    rank = next(n for n in range(1, len(latencies) + 1) if share * len(latencies) <= n)
    bucket = bucket_of(sorted(latencies)[rank - 1])
    below = bound_ms(bucket - 1) if bucket else 0
    assert round(below) <= percentile_ms(counts, share) <= round(bound_ms(bucket))


def test_a_percentile_of_nothing_is_not_known():
    """No calls, no number."""
    assert percentile_ms({}, 0.95) is None
    assert percentile_ms({3: 0}, 0.95) is None
