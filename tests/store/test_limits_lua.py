"""Does the fleet as one keep to a provider's limits? The fragment ``limits.lua``, at any time that a test likes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis import Redis

from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, connect
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

DRIVER = """
local answers, now = {}, now_in_ms() -- "line": as ADMIT does when it refuses
for index, step in ipairs(cjson.decode(ARGV[1])) do
  local at = step.at or now
  if step.settled then
    limits_settle(KEYS[1], KEYS[2], KEYS[3], at, step.settled)
    answers[index] = {}
  else
    local look = limits_look(KEYS[1], KEYS[2], KEYS[3], at, step.want)
    if look.allowed and step.call then
      limits_take(look, at, step.call, step.lease_ms or 60000)
    elseif not look.allowed and step.line then
      limits_line_up(look, at)
    end
    answers[index] = { at = at, allowed = look.allowed, retry_at = look.retry_at, reason = look.reason }
  end
end
return cjson.encode(answers)
"""

T = 1_795_392_000_000
"""A time, ms; each step of a test may be at any."""

HOUR_MS = 3_600_000


class Fleet:
    """Runs steps in one go: ``{at, want, call}`` (a look, and with a call a take) or ``{at, settled}``."""

    def __init__(self, redis: RedisClient, namespace: str) -> None:
        self.redis = redis
        keys = FleetKeys(namespace)
        self.provider, self.model, self.slots = keys.limits("acme"), keys.limits("acme", "m-1"), keys.slots("acme")
        self.text = "\n".join(part for part in (Script("limits", "values").text, DRIVER))
        self._calls = 0

    def run(self, *steps: dict[str, Any]) -> list[Any]:
        keys = (self.provider, self.model, self.slots)
        answers: list[Any] = json.loads(self.redis.eval(self.text, 3, *keys, json.dumps(steps)))
        return answers

    def admit(self, at: int | None = T, call: str | None = None, **want: Any) -> Any:
        self._calls += 1
        step: dict[str, Any] = {"want": {"burst_ms": 2000, **want}, "call": call or f"call-{self._calls}"}
        return self.run(step if at is None else {"at": at, **step})[0]

    def look(self, at: int = T, **want: Any) -> Any:
        return self.run({"at": at, "want": {"burst_ms": 2000, **want}})[0]

    def settle(self, at: int = T, **settled: Any) -> None:
        self.run({"at": at, "settled": {"call": "call-1", "burst_ms": 2000, "reserved_tokens": 0, **settled}})

    def learn(self, at: int = T, **allowances: Any) -> None:
        self.settle(at, observed=allowances)


@pytest.fixture
def fleet(settings: Settings) -> Iterator[Fleet]:
    redis = connect(settings)  # the client that workers use: it is meant for crowds of threads
    yield Fleet(redis, settings.namespace)
    nodes = [redis] if isinstance(redis, Redis) else [node.redis_connection for node in redis.get_nodes()]
    for node in nodes:
        if node is not None:
            node.connection_pool.disconnect()  # closing a client that was given its pool leaves it open
    redis.close()


def most_in_a_minute(admitted: list[tuple[int, float]]) -> float:
    """Return the largest sum over any sixty seconds that begin with an admission."""
    return max(
        (sum(amount for at, amount in admitted if start <= at < start + 60_000) for start, _ in admitted), default=0
    )


def test_without_limits_everything_goes(fleet: Fleet) -> None:
    """No configured limit and nothing learned: no hash is written, only the slot."""
    assert fleet.admit(tokens=10**9)["allowed"]
    assert not fleet.redis.exists(fleet.provider)
    assert not fleet.redis.exists(fleet.model)


def test_burst_goes_out_at_once_and_the_rest_is_spread(fleet: Fleet) -> None:
    """310 a minute with bursts of two seconds: ten at once, then one every 200 ms."""
    wants = {"requests_per_minute": 310}
    verdicts = [fleet.admit(**wants) for _ in range(11)]
    assert [verdict["allowed"] for verdict in verdicts] == [True] * 10 + [False]
    assert verdicts[10] == {"at": T, "allowed": False, "retry_at": T + 200, "reason": "requests_per_minute"}
    assert not fleet.admit(T + 199, **wants)["allowed"]
    assert fleet.admit(T + 200, **wants)["allowed"]
    assert not fleet.admit(T + 200, **wants)["allowed"]


def test_retry_at_is_the_first_time_that_works(fleet: Fleet) -> None:
    """A worker that comes back then is not sent away a second time."""
    wants = {"requests_per_minute": 77, "tokens_per_minute": 9000, "tokens": 250}
    refused = 0
    at = T
    for _ in range(40):
        verdict = fleet.admit(at, **wants)
        if not verdict["allowed"]:
            refused += 1
            assert not fleet.look(verdict["retry_at"] - 1, **wants)["allowed"]
            at = verdict["retry_at"]
            assert fleet.admit(at, **wants)["allowed"]
    assert refused > 10


def test_one_request_a_minute_is_possible(fleet: Fleet) -> None:
    """A bucket holds one request at least, or the lowest limits would let nothing through."""
    assert fleet.admit(requests_per_minute=1)["allowed"]
    assert fleet.look(T + 60_000, requests_per_minute=1)["retry_at"] == T + 65_000
    assert fleet.look(T + 65_000, requests_per_minute=1)["allowed"]


MANY = hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@MANY
@given(
    limit=st.integers(1, 400),
    burst_ms=st.integers(1, 60_000),
    gaps=st.lists(st.integers(0, 3) | st.integers(0, 4000), min_size=1, max_size=250),
)
def test_no_minute_sees_more_requests_than_the_limit(fleet: Fleet, limit: int, burst_ms: int, gaps: list[int]) -> None:
    """Whatever the burst and however the calls come."""
    fleet.redis.delete(fleet.provider)
    steps, at = [], T
    for number, gap in enumerate(gaps):
        at += gap
        wants = {"requests_per_minute": limit, "burst_ms": burst_ms}
        steps.append({"at": at, "call": str(number), "want": wants})
    admitted = [(verdict["at"], 1.0) for verdict in fleet.run(*steps) if verdict["allowed"]]
    assert admitted
    assert most_in_a_minute(admitted) <= limit


@MANY
@given(
    burst_ms=st.integers(500, 60_000),
    calls=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 2000)), min_size=1, max_size=150),
)
def test_no_minute_sees_more_tokens_than_the_limit(fleet: Fleet, burst_ms: int, calls: list[tuple[int, int]]) -> None:
    """Not even with calls that have more tokens than the burst."""
    limit = 10_000
    fleet.redis.delete(fleet.provider)
    steps, at = [], T
    for number, (gap, tokens) in enumerate(calls):
        at += gap
        wants = {"tokens_per_minute": limit, "burst_ms": burst_ms, "tokens": tokens}
        steps.append({"at": at, "call": str(number), "want": wants})
    verdicts = fleet.run(*steps)
    admitted = [
        (one["at"], step["want"]["tokens"]) for one, step in zip(verdicts, steps, strict=True) if one["allowed"]
    ]
    assert most_in_a_minute(admitted) <= limit


def test_call_larger_than_the_burst_waits_for_a_full_bucket_and_leaves_a_debt(fleet: Fleet) -> None:
    """It is not refused for ever, and is charged for all of it."""
    wants = {"tokens_per_minute": 62_000, "burst_ms": 2000}  # a token a millisecond, 2000 at once
    assert fleet.admit(tokens=500, **wants)["allowed"]
    assert fleet.look(tokens=10_000, **wants)["retry_at"] == T + 500
    assert fleet.admit(T + 500, tokens=10_000, **wants)["allowed"]
    assert fleet.look(T + 500, tokens=1, **wants)["retry_at"] == T + 500 + 8001
    assert fleet.look(T + 500, tokens=1, **wants)["reason"] == "tokens_per_minute"


def test_tokens_that_were_not_used_come_back(fleet: Fleet) -> None:
    """Reservations are made for the worst case; most calls need less."""
    wants = {"tokens_per_minute": 62_000}
    fleet.admit(tokens=2000, **wants)
    assert fleet.look(tokens=1500, **wants)["retry_at"] == T + 1500
    fleet.settle(tokens_per_minute=62_000, reserved_tokens=2000, used_tokens=500, admitted_ms=T)
    assert fleet.look(tokens=1500, **wants)["allowed"]
    assert not fleet.look(tokens=1501, **wants)["allowed"]


def test_tokens_beyond_the_reservation_are_charged(fleet: Fleet) -> None:
    """An estimate may be wrong."""
    fleet.admit(tokens=100, tokens_per_minute=62_000)
    fleet.settle(tokens_per_minute=62_000, reserved_tokens=100, used_tokens=2000)
    assert fleet.look(tokens=1, tokens_per_minute=62_000)["retry_at"] == T + 1


def test_reservation_stands_when_nobody_counted(fleet: Fleet) -> None:
    """A call whose connection broke may have used everything."""
    fleet.admit(tokens=2000, tokens_per_minute=62_000)
    fleet.settle(tokens_per_minute=62_000, reserved_tokens=2000)
    assert not fleet.look(tokens=1, tokens_per_minute=62_000)["allowed"]


def test_refund_never_overfills_the_bucket(fleet: Fleet) -> None:
    """Nothing can be saved up beyond the burst."""
    wants = {"tokens_per_minute": 62_000, "requests_per_minute": 62}
    fleet.admit(tokens=100, **wants)
    fleet.settle(reserved_tokens=100_000, used_tokens=0, **wants)
    fleet.settle(reserved_tokens=100_000, released=True, **wants)
    assert fleet.admit(tokens=2000, **wants)["allowed"]
    assert not fleet.look(tokens=1, **wants)["allowed"]


def test_what_time_has_paid_back_does_not_come_back_twice(fleet: Fleet) -> None:
    """A long call that ends during a later burst must not let that burst grow."""
    wants = {"tokens_per_minute": 62_000}
    fleet.admit(T, tokens=2000, **wants)
    fleet.admit(T + 10_000, tokens=2000, **wants)
    fleet.settle(T + 10_000, reserved_tokens=2000, used_tokens=0, admitted_ms=T, **wants)
    assert not fleet.look(T + 10_000, tokens=1, **wants)["allowed"]


def test_call_that_was_never_made_gives_everything_back(fleet: Fleet) -> None:
    """Its request, its tokens and its slot."""
    wants = {"requests_per_minute": 1, "tokens_per_minute": 62_000, "concurrency": 1, "tokens": 2000}
    fleet.admit(call="call-1", **wants)
    assert not fleet.look(**wants)["allowed"]
    fleet.settle(released=True, reserved_tokens=2000, admitted_ms=T, **wants)
    assert fleet.look(**wants)["allowed"]


def test_refunds_lead_no_minute_beyond_the_limit(fleet: Fleet) -> None:
    """Time refilled the bucket while long calls ran, and their refunds fill it again; the window knows better."""
    limits = {"tokens_per_minute": 6200}
    used, held = [], []
    for second in range(45):  # the bucket is never full, so it cannot tell what time has paid back
        at = T + second * 1000
        assert fleet.admit(at, call=f"long-{second}", tokens=100, **limits)["allowed"]
        held.append((f"long-{second}", at))
        used.append((at, 1.0))
    for index, (call, at) in enumerate(held):
        now = T + 45_000 + index * 10
        fleet.settle(now, call=call, reserved_tokens=100, used_tokens=1, admitted_ms=at, **limits)
        if fleet.admit(now, tokens=100, **limits)["allowed"]:
            used.append((now, 100.0))
    later = [
        {"at": at, "call": str(at), "want": {"burst_ms": 2000, "tokens": 100, **limits}}
        for at in range(T + 46_000, T + 130_000, 250)
    ]
    used += [(one["at"], 100.0) for one in fleet.run(*later) if one["allowed"]]
    assert 6000 < most_in_a_minute(used) <= 6200


CALL = st.tuples(st.integers(0, 2000), st.integers(1, 1200), st.integers(0, 1200), st.integers(0, 40_000))


@MANY
@given(st.lists(CALL, min_size=1, max_size=100), st.integers(500, 60_000))
def test_no_minute_sees_more_used_than_the_limit(
    fleet: Fleet, calls: list[tuple[int, int, int, int]], burst_ms: int
) -> None:
    """Whatever the calls reserve and use and however long they run: by admission, requests and tokens alike."""
    rules = {"tokens_per_minute": 10_000, "requests_per_minute": 40, "burst_ms": burst_ms}
    fleet.redis.delete(fleet.provider)
    events: list[tuple[int, int, dict[str, Any]]] = []
    used: list[int] = []
    at = T
    for number, (gap, reserved, spare, lasts) in enumerate(calls):
        at += gap
        used.append(max(reserved - spare, 0))
        ended = {"call": str(number), "reserved_tokens": reserved, "used_tokens": used[-1], "admitted_ms": at, **rules}
        events.append((at, number, {"at": at, "call": str(number), "want": {"tokens": reserved, **rules}}))
        events.append((at + lasts + 1, number, {"at": at + lasts + 1, "settled": ended}))
    refused: set[int] = set()
    admitted: list[tuple[int, int]] = []
    for when, number, step in sorted(events, key=lambda event: event[:2]):
        if "want" in step and not fleet.run(step)[0]["allowed"]:
            refused.add(number)
        elif "want" in step:
            admitted.append((when, number))
        elif number not in refused:
            fleet.run(step)
    assert most_in_a_minute([(when, used[number]) for when, number in admitted]) <= 10_000
    assert most_in_a_minute([(when, 1) for when, _ in admitted]) <= 40


def test_call_that_was_never_made_leaves_the_window(fleet: Fleet) -> None:
    """From the slot in which it was admitted, and never more than was in it."""
    wants = {"requests_per_minute": 3, "tokens_per_minute": 3000, "burst_ms": 60_000, "tokens": 400}
    fleet.admit(T, **wants)
    fleet.admit(T + 20_000, **wants)
    slot = T // 5000
    assert fleet.redis.hget(fleet.provider, "tokens_window") == f"{slot}:400 {slot + 4}:400".encode()
    fleet.settle(T + 30_000, released=True, **(wants | {"reserved_tokens": 400}), admitted_ms=T)
    assert fleet.redis.hget(fleet.provider, "tokens_window") == f"{slot + 4}:400".encode()
    assert fleet.redis.hget(fleet.provider, "requests_window") == f"{slot + 4}:1".encode()
    fleet.settle(T + 30_000, released=True, **(wants | {"reserved_tokens": 9000}), admitted_ms=T + 21_000)
    assert fleet.redis.hget(fleet.provider, "tokens_window") == b""


def test_call_that_ends_after_its_minute_changes_no_window(fleet: Fleet) -> None:
    """Its slot has left, and no other slot is its own."""
    wants = {"tokens_per_minute": 6200}
    fleet.admit(T, tokens=150, **wants)
    fleet.admit(T + 70_000, tokens=150, **wants)
    for used in (1, 500):
        fleet.settle(T + 70_000, reserved_tokens=150, used_tokens=used, admitted_ms=T, **wants)
        assert fleet.redis.hget(fleet.provider, "tokens_window") == f"{(T + 70_000) // 5000}:150".encode()


def test_tokens_beyond_the_reservation_are_in_the_window(fleet: Fleet) -> None:
    """In the slot of the admission; of a call that nobody admitted, in the present one."""
    wants = {"tokens_per_minute": 6200}
    fleet.admit(T, tokens=100, **wants)
    fleet.settle(T + 9000, reserved_tokens=100, used_tokens=150, admitted_ms=T, **wants)
    fleet.settle(T + 9000, reserved_tokens=0, used_tokens=30, **wants)
    assert fleet.redis.hget(fleet.provider, "tokens_window") == f"{T // 5000}:150 {T // 5000 + 1}:30".encode()


def test_call_larger_than_the_limit_waits_for_an_empty_window(fleet: Fleet) -> None:
    """It is not refused for ever; the others wait until it has left, or has used less."""
    wants = {"tokens_per_minute": 6200}
    fleet.admit(T, tokens=10, **wants)
    assert fleet.look(T + 30_000, tokens=7000, **wants)["retry_at"] == T + 65_000
    at = T + 65_000
    assert fleet.admit(at, tokens=7000, **wants)["allowed"]
    assert fleet.look(at + 10_000, tokens=10, **wants)["retry_at"] >= at + 65_000
    assert fleet.look(at + 70_000, tokens=10, **wants)["allowed"]
    fleet.settle(at + 100, reserved_tokens=7000, used_tokens=50, admitted_ms=at, **wants)
    assert fleet.look(at + 100, tokens=10, **wants)["allowed"]


def test_window_of_a_learned_limit(fleet: Fleet) -> None:
    """The same for what the provider's headers said: a model's hash has windows of its own."""
    fleet.learn(tokens={"limit": 1000})
    for at, tokens in ((T, 400), (T + 40_000, 400), (T + 60_000, 200)):
        assert fleet.admit(at, tokens=tokens, burst_ms=60_000)["allowed"]
    refused = {"at": T + 64_999, "allowed": False, "retry_at": T + 65_000, "reason": "provider_limit"}
    assert fleet.look(T + 64_999, tokens=1, burst_ms=60_000) == refused
    assert fleet.look(T + 64_999, tokens=1, learn=False)["allowed"]
    fleet.settle(T + 62_000, reserved_tokens=400, used_tokens=399, admitted_ms=T, burst_ms=60_000)
    assert fleet.look(T + 64_999, tokens=1, burst_ms=60_000)["allowed"]


@pytest.mark.parametrize(
    "text", ["x", "1:2:3", "{slot}:2000 {slot}", "{slot}:-5", "{slot}:9" + "9" * 20, "{slot}:2000 " * 99]
)
def test_garbled_window_counts_as_empty(fleet: Fleet, text: str) -> None:
    """All of it: half of a window is no guarantee, and none of it stops the fleet."""
    fleet.redis.hset(fleet.provider, "tokens_window", text.format(slot=T // 5000))
    assert fleet.admit(tokens=60, tokens_per_minute=2000)["allowed"]
    assert fleet.redis.hget(fleet.provider, "tokens_window") == f"{T // 5000}:60".encode()


def test_slots_of_a_clock_that_went_back_still_count(fleet: Fleet) -> None:
    """After a failover Redis' time may be a little behind; slots further away than a minute are not ours."""
    slot = T // 5000
    fleet.redis.hset(fleet.provider, "requests_window", f"{slot - 13}:7 {slot + 1}:31 {slot + 13}:7")
    assert fleet.look(requests_per_minute=31)["retry_at"] == T + 70_000


def test_line_is_dropped_when_nobody_took_his_turn(fleet: Fleet) -> None:
    """Those in line were cancelled: the bucket is full, so a call goes, and the next refusal is told the true time."""
    wants = {"burst_ms": 2000, "requests_per_minute": 62}
    steps = [{"at": T, "call": str(number), "line": True, "want": wants} for number in range(30)]
    assert [one["retry_at"] for one in fleet.run(*steps)][2:5] == [T + 1000, T + 2000, T + 3000]
    assert fleet.admit(T + 5000, **wants)["allowed"]
    assert fleet.admit(T + 5000, **wants)["allowed"]
    assert fleet.look(T + 5000, **wants)["retry_at"] == T + 6000


@pytest.mark.parametrize(
    "wants", [{"requests_per_minute": 20}, {"requests_per_minute": 3100, "tokens_per_minute": 6200, "tokens": 310}]
)
def test_line_stands_while_its_turns_are_taken(fleet: Fleet, wants: dict[str, Any]) -> None:
    """Though each call finds a bucket full that holds no more than one, or another bucket that nobody needs."""
    asked = {"burst_ms": 2000, **wants}
    steps = [{"at": T, "call": f"first-{number}", "line": True, "want": asked} for number in range(10)]
    turns = sorted({one["retry_at"] for one in fleet.run(*steps) if not one["allowed"]})
    for at in turns[:-1]:
        assert fleet.admit(at, **asked)["allowed"]
        assert fleet.look(at, **asked)["retry_at"] > turns[-1]


def test_line_is_two_minutes_at_most(fleet: Fleet) -> None:
    """Whoever comes when it is longer is told to come back at its end."""
    steps = [{"at": T, "line": True, "call": str(n), "want": {"requests_per_minute": 20}} for n in range(99)]
    assert max(one["retry_at"] for one in fleet.run(*steps)) == T + 120_000


def test_slots_come_free_when_calls_end(fleet: Fleet) -> None:
    """The fleet has no more calls in flight than allowed, and one that asks again soon finds a slot."""
    assert fleet.admit(call="call-1", concurrency=2)["allowed"]
    assert fleet.admit(call="call-2", concurrency=2)["allowed"]
    assert fleet.admit(concurrency=2) == {"at": T, "allowed": False, "retry_at": T + 500, "reason": "concurrency"}
    fleet.settle(call="call-2")
    assert fleet.admit(call="call-4", concurrency=2)["allowed"]
    assert fleet.redis.zrange(fleet.slots, 0, -1) == [b"call-1", b"call-4"]


def test_slot_of_a_dead_worker_comes_free_with_its_lease(fleet: Fleet) -> None:
    """By itself, and its entry goes."""
    step = {"call": "dead", "want": {"concurrency": 1}, "lease_ms": 300}
    assert fleet.run({"at": T, **step})[0]["allowed"]
    assert fleet.look(concurrency=1)["retry_at"] == T + 300
    assert not fleet.look(T + 299, concurrency=1)["allowed"]
    assert fleet.admit(T + 300, call="next", concurrency=1)["allowed"]
    assert fleet.redis.zrange(fleet.slots, 0, -1) == [b"next"]


def test_cooldown_holds_for_one_model_and_is_never_shortened(fleet: Fleet, settings: Settings) -> None:
    """A later Retry-After of a second does not undo one of a minute; the provider's other models go on."""
    fleet.settle(cooldown_ms=60_000, reason="rate_limited")
    fleet.settle(T + 10, cooldown_ms=1000, reason="other")
    assert fleet.look(T + 2000) == {"at": T + 2000, "allowed": False, "retry_at": T + 60_000, "reason": "cooldown"}
    assert fleet.redis.hget(fleet.model, "cooldown_reason") == b"rate_limited"
    fleet.settle(T + 20, cooldown_ms=90_000, reason="longer")
    assert fleet.look(T + 2000)["retry_at"] == T + 90_020
    assert fleet.look(T + 90_020)["allowed"]
    fleet.model = FleetKeys(settings.namespace).limits("acme", "m-2")
    assert fleet.look(T + 2000)["allowed"]


def test_key_lives_longer_than_its_cooldown(fleet: Fleet) -> None:
    """A day's cooldown must not be forgotten after an hour, whatever is settled meanwhile."""
    fleet.settle(cooldown_ms=86_400_000)
    fleet.learn(requests={"limit": 100})
    assert fleet.redis.pttl(fleet.model) > 86_400_000


@pytest.mark.parametrize(
    ("limits", "tokens"), [({"requests": {"limit": 31}}, 0), ({"tokens": {"limit": 31_000}}, 1000)]
)
def test_learned_limit_holds_for_ten_minutes(fleet: Fleet, limits: dict[str, Any], tokens: int) -> None:
    """What the headers say is kept to for the model, until it is too old to be believed."""
    fleet.learn(**limits)
    assert fleet.admit(tokens=tokens)["allowed"]
    assert fleet.look(tokens=tokens) == {"at": T, "allowed": False, "retry_at": T + 2000, "reason": "provider_limit"}
    assert fleet.look(tokens=tokens, learn=False)["allowed"]
    fleet.admit(T + 599_999, tokens=tokens)
    assert not fleet.look(T + 599_999, tokens=tokens)["allowed"]
    assert fleet.look(T + 600_000, tokens=tokens)["allowed"]


def test_learned_and_configured_limits_hold_both(fleet: Fleet) -> None:
    """The one that holds out longer gives the time and the reason."""
    fleet.learn(requests={"limit": 62})
    wants = {"requests_per_minute": 31}
    fleet.admit(**wants)
    assert fleet.look(**wants) == {"at": T, "allowed": False, "retry_at": T + 2000, "reason": "requests_per_minute"}
    fleet.admit(T + 2000, requests_per_minute=6200)
    fleet.admit(T + 2000, requests_per_minute=6200)
    assert fleet.look(T + 2000, requests_per_minute=6200)["reason"] == "provider_limit"


@pytest.mark.parametrize("limit", [0, -1, None, "many"])
def test_learned_limit_that_is_none_is_not_learned(fleet: Fleet, limit: object) -> None:
    """Azure's -1 would otherwise stop the fleet."""
    fleet.learn(requests={"limit": limit, "remaining": 3, "reset_ms": 5000})
    assert [fleet.admit()["allowed"] for _ in range(3)] == [True] * 3


def test_used_up_limit_pauses_the_model_until_its_reset(fleet: Fleet) -> None:
    """Two minutes at most, and never shortened by an answer that was on its way."""
    fleet.learn(tokens={"limit": 10**6, "remaining": 0, "reset_ms": 30_000})
    fleet.learn(T + 5, requests={"limit": 10**6, "remaining": 0, "reset_ms": 1000})
    assert fleet.look() == {"at": T, "allowed": False, "retry_at": T + 30_000, "reason": "provider_limit"}
    fleet.learn(requests={"remaining": 0, "reset_ms": 10**9})
    assert fleet.look()["retry_at"] == T + 120_000


def test_calls_from_before_a_limit_was_learned_give_nothing_back_to_it(fleet: Fleet) -> None:
    """They took nothing from it."""
    fleet.admit(T - 1000, tokens=5000)
    fleet.learn(tokens={"limit": 62_000})
    fleet.admit(tokens=2000)
    fleet.settle(reserved_tokens=5000, used_tokens=0, admitted_ms=T - 1000)
    assert not fleet.look(tokens=1)["allowed"]


def test_every_key_goes_by_itself(fleet: Fleet) -> None:
    """Redis is clean again a day after the last call."""
    fleet.learn(at=fleet.look(None or T)["at"], requests={"limit": 100}, tokens={"limit": 10**6})
    fleet.admit(requests_per_minute=10, tokens_per_minute=1000, tokens=5)
    assert HOUR_MS - 60_000 < fleet.redis.pttl(fleet.provider) <= HOUR_MS
    assert HOUR_MS - 60_000 < fleet.redis.pttl(fleet.model) <= HOUR_MS
    assert 23 * HOUR_MS < fleet.redis.pttl(fleet.slots) <= 24 * HOUR_MS
    assert set(fleet.redis.hgetall(fleet.provider)) == {
        b"requests_tat",
        b"tokens_tat",
        b"requests_full",
        b"tokens_full",
        b"requests_window",
        b"tokens_window",
    }


def test_look_changes_nothing(fleet: Fleet) -> None:
    """Phase one of ADMIT asks about candidates that it may not take."""
    fleet.admit(requests_per_minute=10, concurrency=3)
    before = fleet.redis.hgetall(fleet.provider), fleet.redis.zrange(fleet.slots, 0, -1, withscores=True)
    fleet.look(T + 100_000, requests_per_minute=10, concurrency=3)
    assert before == (fleet.redis.hgetall(fleet.provider), fleet.redis.zrange(fleet.slots, 0, -1, withscores=True))


FIELDS = ["requests_tat", "requests_full", "tokens_tat", "tokens_full", "cooldown_ms", "paused_ms", "requests_limit"]
LEARNED = ["requests_learned", "tokens_limit", "tokens_learned", "requests_window", "tokens_window", "line_ms"]


@pytest.mark.parametrize("value", ["", "abc", "nan", "inf", "-inf", "-5", "1e300", "0x", "9" * 30, "1:2 x"])
def test_garbled_values_count_as_missing(fleet: Fleet, value: str) -> None:
    """No value in our keys makes a script fail, or stops the fleet."""
    for key in (fleet.provider, fleet.model):
        fleet.redis.hset(key, mapping=dict.fromkeys([*FIELDS, *LEARNED], value))
    wants = {"requests_per_minute": 31, "tokens_per_minute": 31_000, "tokens": 10}
    assert fleet.admit(**wants)["allowed"]
    fleet.settle(cooldown_ms=0, reserved_tokens=10, used_tokens=5, observed={"requests": {"limit": 31}}, **wants)
    assert fleet.look(T + 2000, **wants)["allowed"]


def test_keys_of_another_type_are_replaced(fleet: Fleet) -> None:
    """Somebody else's string under our name is no reason to stop."""
    for key in (fleet.provider, fleet.model, fleet.slots):
        fleet.redis.set(key, "foreign")
    assert fleet.admit(requests_per_minute=31, concurrency=1)["allowed"]
    assert not fleet.look(requests_per_minute=31)["allowed"]
    fleet.redis.set(fleet.slots, "foreign")
    fleet.settle(requests_per_minute=31, cooldown_ms=5)
    assert fleet.redis.type(fleet.model) == b"hash"


def test_fifty_threads_keep_to_a_limit_together(fleet: Fleet, in_threads: Callable[..., list[Any]]) -> None:
    """Never more than the full bucket and what has flowed in since, by Redis' own clock."""
    wants = {"requests_per_minute": 3100}  # fifty a second, a hundred at once

    def spend(_: int) -> list[int]:
        verdicts = [fleet.admit(None, call=f"{threading.get_ident()}-{number}", **wants) for number in range(10)]
        return [verdict["at"] for verdict in verdicts if verdict["allowed"]]

    times = sorted(at for one in in_threads(spend) for at in one)
    assert 100 <= len(times) <= 100 + (times[-1] - times[0]) * 50 / 1000


def test_fifty_threads_share_the_slots(fleet: Fleet, in_threads: Callable[..., list[Any]]) -> None:
    """Seven slots are seven, for the whole fleet."""
    verdicts = in_threads(lambda number: fleet.admit(None, call=f"call-{number}", concurrency=7)["allowed"])
    assert sum(verdicts) == 7
    assert fleet.redis.zcard(fleet.slots) == 7


@pytest.fixture
def in_threads() -> Callable[..., list[Any]]:
    """Return a function that calls another in fifty threads at once, with the thread's number."""

    def run(call: Callable[[int], Any]) -> list[Any]:
        start = threading.Barrier(50)

        def one(number: int) -> Any:
            start.wait(60)
            return call(number)

        with ThreadPoolExecutor(50) as pool:
            return list(pool.map(one, range(50)))

    return run
