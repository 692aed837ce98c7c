"""Is a subscription's quota kept, whatever happens? Its script against a provider that counts for itself."""

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
        call.window = told(self.shown(self.used + (0 if self.before else tokens)), self.reset)
        call.took, self.used = tokens, self.used + tokens

    def shown(self, used: int) -> float:
        share = used / CAPACITY
        return min(math.floor(share * 100) / 100 if self.floor else round(share, 2), 1.0)


@dataclass
class Fleet:
    """Workers that call the provider as far as the script allows; ``limit`` is what they may use of a window."""

    token: Token
    provider: Provider
    limit: float
    now: int = T
    under_way: list[Call] = field(default_factory=list)
    orphans: list[Call] = field(default_factory=list)

    def step(self, what: str, tokens: int, place: int) -> None:
        """Do what is drawn; where there is nothing to do it to, nothing."""
        if what == "wait":
            self.now += place * 4
            self.provider.roll(self.now)
        elif what == "ask":
            self._ask(tokens)
        else:
            calls = {"count": self._ahead(), "release": self._ahead(), "late": self.orphans}.get(what, self._answered())
            if calls:
                getattr(self, f"_{what}")(calls[place % len(calls)], tokens)

    def _ahead(self) -> list[Call]:
        return [call for call in self.under_way if call.took is None]

    def _answered(self) -> list[Call]:
        return [call for call in self.under_way if call.took is not None]

    def _ask(self, tokens: int) -> None:
        finds_out = float(self.token.field("5h_reset_ms") or 0) <= self.now
        while not (verdict := self.token.take(self.now, tokens, lease_ms=LEASE_MS))["allowed"] and tokens > 1:
            tokens //= 2  # to the brim
        if not verdict["allowed"]:
            return
        assert not (finds_out and self.under_way), "one call at a time finds out"
        self.under_way.append(Call(tokens, verdict["covers"]))
        assert finds_out or self.provider.used + sum(call.most for call in self._ahead()) <= self.limit

    def _count(self, call: Call, tokens: int) -> None:
        self.provider.count(call, min(tokens, call.most), self.now)

    def _settle(self, call: Call, _: int, *, counted: bool = False) -> None:
        if not counted:
            self.under_way.remove(call)
        told = {"covers": call.covers, "used_tokens": call.took, "counted": counted}
        self.token.settle(self.now, call.most, *filter(None, [call.window]), **told)

    def _orphan(self, call: Call, _: int) -> None:
        self.under_way.remove(call)
        self.orphans.append(call)
        self.token.settle(self.now, call.most, used_tokens=None, succeeded=False)

    def _late(self, call: Call, tokens: int) -> None:
        self.orphans.remove(call)
        self._settle(call, tokens, counted=True)

    def _release(self, call: Call, _: int) -> None:
        self.under_way.remove(call)
        self.token.settle(self.now, call.most, released=True, succeeded=False)


@pytest.fixture
def token(settings: Settings) -> Iterator[Token]:
    redis = connect(settings)
    yield Token(redis, settings.namespace)
    close_idle(redis)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "count", "settle", "settle", "orphan", "late", "release", "wait"]),
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
    token.stands(provider.shown(provider.used), learned)
    fleet = Fleet(token, provider, CAPACITY * (1 - keep_free))
    for what, tokens, place in steps:
        fleet.step(what, tokens, place)
    assert all(used <= CAPACITY for used in provider.lived_through)
    assert float(token.field("5h_capacity") or 0) <= CAPACITY
