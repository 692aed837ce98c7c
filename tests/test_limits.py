"""What are the scripts told of a provider's limits, and what do people see of them?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from attune_worker.limits import Left, Limits, ModelLimits, Settled, want
from attune_worker.providers.rate_headers import Allowance, Observed
from attune_worker.sections import LimitSettings, ProviderSettings
from attune_worker.settings import Settings
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script

STEPS = """
local step, now = cjson.decode(ARGV[1]), now_in_ms()
if step.settled then
  limits_settle(KEYS[1], KEYS[2], KEYS[3], now, step.settled)
else
  limits_take(limits_look(KEYS[1], KEYS[2], KEYS[3], now, step.want), now, step.call, 60000)
end
return redis.call('TIME')
"""

LIMITS = LimitSettings(burst_seconds=60)


def provider(**limits: int) -> ProviderSettings:
    return ProviderSettings(kind="openai", base_url="http://127.0.0.1", **limits)


@pytest.fixture
def limited(settings: Settings) -> Settings:
    acme = provider(requests_per_minute=20, tokens_per_minute=2000, concurrency=3)
    return settings.model_copy(update={"providers": {"acme": acme, "free": provider()}, "limits": LIMITS})


@pytest.fixture
def run(redis: Redis, limited: Settings) -> Callable[..., None]:
    """Return a function that takes a call, or settles one, as ADMIT and SETTLE do."""
    keys = FleetKeys(limited.namespace)
    text = f"{Script('limits', 'values').text}\n{STEPS}"

    def step(**fields: Any) -> None:
        names = (keys.limits("acme"), keys.limits("acme", "m-1"), keys.slots("acme"))
        redis.eval(text, len(names), *names, json.dumps(fields))

    return step


def test_want_holds_the_limits_there_are() -> None:
    """Absent means no such limit."""
    assert want(provider(), LimitSettings(), 7) == {"tokens": 7, "burst_ms": 2000, "learn": True}
    assert want(provider(requests_per_minute=3, tokens_per_minute=4, concurrency=5), LIMITS, 7) == {
        "tokens": 7,
        "burst_ms": 60_000,
        "learn": True,
        "requests_per_minute": 3,
        "tokens_per_minute": 4,
        "concurrency": 5,
    }


def test_settled_holds_what_is_known() -> None:
    """Unknown usage and absent headers stay out; what the headers said is told part by part."""
    short = Settled(call_id="c", reserved_tokens=9).told(provider(), LimitSettings())
    assert short == {"call": "c", "reserved_tokens": 9, "released": False, "burst_ms": 2000}
    seen = Observed(requests=Allowance(50, 0, 1200), tokens=Allowance(remaining=5))
    full = Settled(call_id="c", reserved_tokens=9, used_tokens=0, cooldown_seconds=0.0101, reason="r", observed=seen)
    told = full.told(provider(), LimitSettings())
    assert (told["used_tokens"], told["cooldown_ms"], told["reason"]) == (0, 11, "r")
    assert told["observed"] == {"requests": {"limit": 50, "remaining": 0, "reset_ms": 1200}, "tokens": {"remaining": 5}}
    assert "observed" not in full.told(provider(), LimitSettings(learn=False))


def test_status_of_a_fleet_that_has_done_nothing(limited: Settings, redis: Redis) -> None:
    """Everything is left, and nothing is known of the models."""
    status = Limits(limited, redis).status([("acme", "m-1")])
    assert (status["acme"].requests, status["acme"].tokens) == (Left(20, 10), Left(2000, 1000))
    assert status["acme"].models == {"m-1": ModelLimits()}
    assert (status["free"].in_flight, status["free"].requests, status["free"].models) == (0, None, {})


def test_status_shows_what_is_left_and_in_flight(limited: Settings, redis: Redis, run: Callable[..., None]) -> None:
    """The same numbers that ADMIT goes by; looking changes none of them."""
    asked = want(limited.providers["acme"], LIMITS, 300)
    for call in ("call-1", "call-2"):
        run(want=asked, call=call)
    status = Limits(limited, redis).status()["acme"]
    assert (status.in_flight, status.concurrency) == (2, 3)
    assert status.requests is not None
    assert status.tokens is not None
    assert 8 <= status.requests.left < 10
    assert 400 <= status.tokens.left < 1000
    run(settled=Settled(call_id="call-2", reserved_tokens=300).told(limited.providers["acme"], LIMITS))
    assert Limits(limited, redis).status()["acme"].in_flight == 1


def test_nothing_is_left_when_the_last_minute_has_seen_the_limit(limited: Settings, redis: Redis) -> None:
    """Though the bucket is full: ADMIT goes by its window, too."""
    seconds, _ = redis.time()
    slot = int(seconds) // 5
    window = f"{slot - 14}:900 {slot - 6}:1000 {slot}:960"
    redis.hset(FleetKeys(limited.namespace).limits("acme"), mapping={"tokens_window": window})
    status = Limits(limited, redis).status()["acme"]
    assert (status.requests, status.tokens) == (Left(20, 10), Left(2000, 40))


def test_status_shows_what_the_provider_said_of_a_model(
    limited: Settings, redis: Redis, run: Callable[..., None]
) -> None:
    """Its cooldown with the reason, its pause, and the limits that were learned."""
    seen = Observed(requests=Allowance(60, 0, 30_000), tokens=Allowance(40_000, 100, 100))
    ended = Settled(call_id="c", reserved_tokens=0, cooldown_seconds=3600, reason="rate_limited", observed=seen)
    run(settled=ended.told(limited.providers["acme"], LIMITS))
    model = Limits(limited, redis).status([("acme", "m-1")])["acme"].models["m-1"]
    assert (model.requests, model.tokens) == (Left(60, 30), Left(40_000, 20_000))
    assert model.cooldown_until is not None
    assert model.paused_until is not None
    assert 3500 < (model.cooldown_until - model.paused_until).total_seconds() < 3600
    assert model.cooldown_reason == "rate_limited"


@pytest.mark.parametrize("value", ["1:2 x", "1:" + "9" * 30, "abc", "nan", "inf", "-5", "1e300", "9" * 30, ""])
def test_garbled_values_count_as_missing(limited: Settings, redis: Redis, value: str) -> None:
    """Looking never fails for what is in the keys."""
    keys = FleetKeys(limited.namespace)
    fields = ["requests_tat", "tokens_tat", "cooldown_ms", "paused_ms", "requests_limit", "requests_learned"]
    fields += ["requests_window", "tokens_window"]
    for key in (keys.limits("acme"), keys.limits("acme", "m-1")):
        redis.hset(key, mapping=dict.fromkeys(fields, value))
    status = Limits(limited, redis).status([("acme", "m-1")])["acme"]
    assert (status.requests, status.tokens) == (Left(20, 10), Left(2000, 1000))
    assert status.models["m-1"] == ModelLimits()


def test_keys_of_another_type_count_as_missing(limited: Settings, redis: Redis) -> None:
    """They are left as they are."""
    keys = FleetKeys(limited.namespace)
    for key in (keys.limits("acme"), keys.limits("acme", "m-1"), keys.slots("acme")):
        redis.set(key, "foreign")
    status = Limits(limited, redis).status([("acme", "m-1")])["acme"]
    assert (status.in_flight, status.models["m-1"]) == (0, ModelLimits())
    assert redis.get(keys.slots("acme")) == b"foreign"
