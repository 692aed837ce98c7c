"""Is a subscription's quota kept whatever happens? The credential's script against a provider that counts for itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attune_worker.settings import Settings
from attune_worker.store.connection import close_idle, connect
from tests.store.credential_lab import H5, RESET, T, Token, told

CAPACITY = 100_000
LEASE_MS = 86_400_000


@dataclass
class Call:
    """A call under way: what it holds at most, and, once the provider has counted it, what it took and told."""

    most: int
    covers: str
    began: int
    took: int | None = None
    window: dict[str, Any] | None = None


@dataclass
class Provider:
    """Counts a call when it is over, and tells of it with two decimals, rounded down or to the nearest.

    ``before``: what it tells with an answer does not hold the answer's own tokens yet.
    """

    used: int
    floor: bool
    before: bool
    reset: int = RESET
    lived_through: list[int] = field(default_factory=list)

    def roll(self, now: int) -> None:
        while now >= self.reset:
            self.lived_through.append(self.used)
            self.used, self.reset = 0, self.reset + H5

    def count(self, call: Call, tokens: int, now: int) -> None:
        self.roll(now)
        share = (self.used + (0 if self.before else tokens)) / CAPACITY
        call.took, self.used = tokens, self.used + tokens
        call.window = told(min(math.floor(share * 100) / 100 if self.floor else round(share, 2), 1.0), self.reset)


@pytest.fixture
def token(settings: Settings) -> Iterator[Token]:
    redis = connect(settings)
    yield Token(redis, settings.namespace)
    close_idle(redis)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "count", "settle", "settle", "orphan", "release", "wait"]),
        st.integers(1, 6000),
        st.integers(0, 10**6),
    ),
    min_size=20,
    max_size=80,
)


@hypothesis_settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=STEPS,
    start=st.integers(800, 960),
    floor=st.booleans(),
    before=st.booleans(),
    learned=st.sampled_from([CAPACITY // 2, CAPACITY, CAPACITY]),
    keep_free=st.sampled_from([0.0, 0.0, 0.02]),
)
def test_what_is_allowed_never_passes_what_there_is(
    token: Token,
    steps: list[tuple[str, int, int]],
    start: int,
    floor: bool,
    before: bool,
    learned: int,
    keep_free: float,
) -> None:
    """Answers come late and in any order, workers die and speak up after all, windows end in the middle of it.

    The capacity that was learned is at most the true one. But for the call that finds out about a new window, what
    calls under way may still take fits into what the provider has left.
    """
    token.redis.delete(token.key)
    token.quota = {"keep_free": keep_free, "burst": 1.0}
    provider = Provider(CAPACITY * start // 1000, floor, before)
    share = provider.used / CAPACITY
    token.stands(math.floor(share * 100) / 100 if floor else round(share, 2), learned)
    now, under_way, orphans = T, list[Call](), list[Call]()
    limit = CAPACITY * (1 - keep_free)
    for what, most, place in steps:
        tokens = most
        uncounted = [call for call in under_way if call.took is None]
        counted = [call for call in under_way if call.took is not None]
        if what == "wait":
            now += place * 4
            provider.roll(now)
        elif what == "ask":
            finds_out = float(token.field("5h_reset_ms") or 0) <= now
            while not (verdict := token.take(now, tokens, lease_ms=LEASE_MS))["allowed"] and tokens > 1:
                tokens //= 2  # to the brim
            if verdict["allowed"]:
                assert not (finds_out and under_way), "one call at a time finds out"
                under_way.append(Call(tokens, verdict["covers"], now))
                ahead = sum(call.most for call in under_way if call.took is None)
                assert finds_out or provider.used + ahead <= limit
        elif what == "count" and uncounted:
            call = uncounted[place % len(uncounted)]
            provider.count(call, min(tokens, call.most), now)
        elif what == "settle" and counted:
            call = counted[place % len(counted)]
            under_way.remove(call)
            token.settle(now, call.most, call.window, covers=call.covers, used_tokens=call.took)
        elif what == "orphan" and counted:
            call = counted[place % len(counted)]
            under_way.remove(call)
            orphans.append(call)
            token.settle(now, call.most, used_tokens=None, succeeded=False)
        elif what == "orphan" and orphans:
            call = orphans.pop(place % len(orphans))
            token.settle(now, call.most, call.window, covers=call.covers, used_tokens=call.took, counted=True)
        elif what == "release" and uncounted:
            call = uncounted[place % len(uncounted)]
            under_way.remove(call)
            token.settle(now, call.most, released=True, succeeded=False)
    assert all(used <= CAPACITY for used in provider.lived_through)
    assert float(token.field("5h_capacity") or 0) <= CAPACITY
