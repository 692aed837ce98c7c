"""Is a quota kept, and a refused key left alone? The fragment ``credentials.lua``, at any time that a test likes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis import Redis

from attune_worker.settings import Settings
from attune_worker.store.connection import connect
from tests.store.credential_lab import D7, H5, HOUR_MS, RECHECK_MS, RESET, T, Token, told


@pytest.fixture
def token(settings: Settings) -> Iterator[Token]:
    redis = connect(settings)
    yield Token(redis, settings.namespace)
    nodes = [redis] if isinstance(redis, Redis) else [node.redis_connection for node in redis.get_nodes()]
    for node in nodes:
        if node is not None:
            node.connection_pool.disconnect()
    redis.close()


def test_plain_key_writes_nothing(token: Token) -> None:
    """Nearly all calls go by one: a look and a settlement of it leave no trace."""
    token.quota = None
    assert token.take()["allowed"]
    token.settle()
    assert not token.redis.exists(token.key)


def test_refused_key_is_left_alone_until_one_call_tries_it(token: Token) -> None:
    """Exactly one at each check; the others are told to come back at the next."""
    token.quota = None
    refused = {"error": "credential", "status": 401, "recheck_ms": RECHECK_MS}
    assert token.settle(succeeded=False, refused=refused) == "refused"
    expected = {"allowed": False, "retry_at": T + RECHECK_MS, "reason": "credential_refused"}
    assert token.look(T) == token.look(T + RECHECK_MS - 1) == expected
    assert token.take(T + RECHECK_MS)["allowed"]
    assert token.take(T + RECHECK_MS) == {**expected, "retry_at": T + 2 * RECHECK_MS}
    assert token.settle(T + RECHECK_MS + 5, succeeded=False, refused=refused) == ""  # it still is
    assert token.field("refused_ms") == str(T)
    assert (token.field("refused_error"), token.field("refused_status")) == ("credential", "401")


def test_success_clears_a_refusal_unless_it_began_before(token: Token) -> None:
    """A call that was under way when the key was taken out says nothing of what the provider thinks now."""
    token.quota = None
    token.settle(T, refused={"error": "credential", "status": 402, "recheck_ms": RECHECK_MS}, succeeded=False)
    assert token.settle(T + 10, admitted_ms=T - 10) == ""
    assert not token.look(T + 20)["allowed"]
    assert token.settle(T + RECHECK_MS + 9, admitted_ms=T + RECHECK_MS) == "accepted"
    assert token.look(T + RECHECK_MS + 10)["allowed"]
    assert not token.redis.exists(token.key)


def test_before_anything_is_told_one_call_at_a_time_goes(token: Token) -> None:
    """The first answer says what is left; until then nobody knows whether there is room for two."""
    assert token.take()["allowed"]
    assert token.take() == {"allowed": False, "retry_at": T + 1000, "reason": "quota_unknown"}
    token.settle(T, 100, told(0.5), covers="0")
    assert token.take()["allowed"]


def test_provider_that_tells_of_no_quota_has_none(token: Token) -> None:
    """An answer without windows ends the waiting; one that comes with them brings the quota back."""
    token.call(T, 100)
    assert all(token.take()["allowed"] for _ in range(5))
    token.settle(T, 100, told(0.99))
    assert token.field("windowless_ms") is None
    assert token.look()["reason"] == "quota_used_up"


def test_failure_without_windows_says_nothing_of_a_quota(token: Token) -> None:
    """A gateway's error page has none either."""
    token.take()
    token.settle(succeeded=False)
    token.take()
    assert token.look()["reason"] == "quota_unknown"


@pytest.mark.parametrize(
    ("keep_free", "used", "allowed"), [(0, 0.889, True), (0, 0.891, False), (0.2, 0.7, False), (0.85, 0.03, True)]
)
def test_calls_of_unknown_weight_go_alone_and_stay_away_from_the_end(
    token: Token, keep_free: float, used: float, allowed: bool
) -> None:
    """As long as nobody knows what a token is of the window, up to 90 % less what is kept free."""
    token.quota = {"keep_free": keep_free, "burst": 1.0}
    token.stands(used, capacity=None)
    verdict = token.take()
    assert verdict["allowed"] is allowed
    if allowed:
        assert token.take() == {"allowed": False, "retry_at": T + 1000, "reason": "quota_unknown"}
    else:
        assert (verdict["reason"], verdict["retry_at"]) == ("quota_used_up", RESET)


@pytest.mark.parametrize(
    ("utilization", "keep_free", "tokens", "allowed"),
    [(0.9, 0, 9_000, True), (0.9, 0, 9_001, False), (0.5, 0.25, 24_000, True), (0.5, 0.25, 24_001, False)],
)
def test_no_call_goes_that_could_pass_the_quota(
    token: Token, utilization: float, keep_free: float, tokens: int, allowed: bool
) -> None:
    """To the token: what was told, a hundredth, as it may be rounded, and the most that the call can use."""
    token.quota = {"keep_free": keep_free, "burst": 1.0}
    token.stands(utilization)
    verdict = token.look(tokens=tokens)
    assert verdict["allowed"] is allowed
    assert allowed or (verdict["reason"], verdict["retry_at"]) == ("quota_used_up", RESET)


def test_what_calls_under_way_hold_may_come_back(token: Token) -> None:
    """So the next one asks again soon, and goes when they needed less."""
    token.stands(0.9)
    assert token.take(tokens=8500)["allowed"]
    assert token.take(tokens=1000) == {"allowed": False, "retry_at": T + 1000, "reason": "quota_reserved"}
    token.settle(T, 8500, used_tokens=100)
    assert token.take(tokens=8500)["allowed"]


@pytest.mark.parametrize("settled", [{"used_tokens": None}, {"used_tokens": 8500}, {"succeeded": False}])
def test_what_is_not_known_to_be_unused_counts_as_used(token: Token, settled: dict[str, Any]) -> None:
    """A call that broke off, or an orphan's: what was reserved stands until the provider tells more."""
    token.stands(0.9)
    token.take(tokens=8500)
    token.settle(T, 8500, **settled)
    verdict = token.look(tokens=1000)
    assert (verdict["reason"], verdict["retry_at"]) == ("quota_used_up", RESET)
    assert token.look(tokens=500)["allowed"]


def test_release_gives_everything_back(token: Token) -> None:
    """The call was never made; one that took nothing gives nothing back."""
    token.stands(0.9)
    token.take(tokens=8500)
    token.settle(T, 8500, released=True, succeeded=False)
    token.take(tokens=8500)
    token.settle(T, 8500, released=True, succeeded=False, admitted=False)
    assert token.look(tokens=1000)["reason"] == "quota_reserved"


def test_orphan_s_own_settlement_does_not_count_twice(token: Token) -> None:
    """What was reserved was counted when it was found; more than that is added, nothing is taken back."""
    token.stands(0.5)
    token.take(tokens=1000)
    token.take(tokens=1000)
    token.settle(T, 1000, used_tokens=None, succeeded=False)
    for used, total in ((400, 1000), (1500, 1500)):
        token.settle(T, 1000, used_tokens=used, counted=True)
        assert (token.field("settled"), token.field("calls"), token.field("reserved")) == (str(total), "1", "1000")


def test_answer_covers_what_had_been_settled_when_its_call_began(token: Token) -> None:
    """What ended while it was under way may be in its utilization or not, and is counted until the next answer."""
    token.stands(0.5)
    first, second = token.take(tokens=1000), token.take(tokens=2000)
    token.settle(T, 1000, told(0.51), covers=first["covers"])
    token.settle(T, 2000, told(0.53), covers=second["covers"])
    assert (token.field("settled"), token.field("5h_covered")) == ("3000", "0")
    token.call(T, 100, told(0.53))
    assert token.field("5h_covered") == "3000"


def test_utilization_of_a_window_never_goes_down(token: Token) -> None:
    """Answers arrive in any order; a reset that differs by a second is the same one."""
    token.call(T, 100, told(0.6))
    token.call(T, 100, told(0.5, RESET + 1000))
    assert float(token.field("5h_utilization") or 0) == 0.6
    assert token.field("5h_reset_ms") == str(RESET)


def test_late_answer_does_not_bring_an_old_window_back(token: Token) -> None:
    """One from before the present window was told of is passed over, and so is one of a window that has ended."""
    token.settle(RESET + 10, 100, told(0.1, RESET + H5))
    token.settle(RESET + 20, 100, told(0.9, RESET))
    token.settle(RESET + 20, 100, told(0.9, RESET + H5 - HOUR_MS), at=RESET)
    assert float(token.field("5h_utilization") or 0) == 0.1
    assert token.field("5h_reset_ms") == str(RESET + H5)


@pytest.mark.parametrize("absurd", [told(1.5), told(-0.1), told(0.5, T - 1), told(0.5, T + H5 + 2 * HOUR_MS)])
def test_absurd_window_is_none(token: Token, absurd: dict[str, Any]) -> None:
    """A share beyond 1, or a reset in the past or further away than the window is long."""
    token.take()
    token.settle(T, 100, absurd)
    assert token.field("5h_utilization") is None
    assert token.field("windowless_ms") is None


def test_window_begins_anew_at_its_reset(token: Token) -> None:
    """With nothing used; one call finds out when it ends, and then the others go."""
    token.stands(0.99)
    token.set(settled=5000)
    assert token.look(RESET - 1)["reason"] == "quota_used_up"
    assert token.take(RESET, 1000)["allowed"]
    assert (token.field("5h_reset_ms"), token.field("5h_covered")) == ("0", "5000")
    assert token.take(RESET, 1000) == {"allowed": False, "retry_at": RESET + 1000, "reason": "quota_unknown"}
    token.settle(RESET + 5, 1000, told(0.01, RESET + H5), covers="5000")
    assert token.field("5h_reset_ms") == str(RESET + H5)
    assert token.take(RESET + 6, 1000)["allowed"]
    assert token.take(RESET + 6, 1000)["allowed"]


def test_provider_whose_clock_is_behind_is_asked_by_one_call_at_a_time(token: Token) -> None:
    """For it the window has not ended: it goes on telling of a reset that is over, and of a quota that is not back."""
    token.stands(0.98)
    for late_ms in (0, 500, 900):
        assert token.take(RESET + late_ms, 1000)["allowed"]
        assert token.take(RESET + late_ms, 1000)["reason"] == "quota_unknown"
        token.settle(RESET + late_ms, 1000, told(0.99))
    token.call(RESET + 2000, 1000, told(0.01, RESET + H5))
    assert token.take(RESET + 2001, 1000)["allowed"]


def test_provider_that_stops_telling_of_its_windows_is_believed_when_they_have_ended(token: Token) -> None:
    """Until then what it told holds."""
    token.stands(0.999)
    token.settle(T, 0)
    assert token.look()["reason"] == "quota_used_up"
    token.call(RESET, 100)
    assert all(token.take(RESET + 1)["allowed"] for _ in range(3))


def test_call_whose_leave_is_not_known_gives_back_nothing_of_others(token: Token) -> None:
    """What it used counts; those that are under way still are."""
    token.stands(0.5)
    token.take(tokens=1000)
    token.settle(T, 700, admitted=False)
    assert (token.field("calls"), token.field("reserved"), token.field("settled")) == ("1", "1000", "700")


def test_call_larger_than_a_window_goes_when_it_is_new(token: Token) -> None:
    """It would wait for ever; the provider says what it thinks of it."""
    token.stands(0.1)
    assert token.look(tokens=200_000)["reason"] == "quota_used_up"
    assert token.take(RESET, 200_000)["allowed"]


def test_rejection_holds_until_the_reset(token: Token) -> None:
    """Whatever the utilization: the provider has said no. A newer answer of the same window lifts it."""
    token.settle(T, 0, told(0.7, status="rejected"), succeeded=False)
    assert token.look()["retry_at"] == RESET
    token.settle(T + 5, 0, told(0.7), succeeded=True)
    assert token.look(T + 6)["allowed"]


@pytest.mark.parametrize("burst", [0.0001, 0.25, 0.5])
def test_pace_spreads_the_quota_to_the_reset(token: Token, burst: float) -> None:
    """At the time that is told the call goes, and a second before it does not; in the end all of it may be used."""
    token.quota = {"keep_free": 0.0, "burst": burst}
    for used in (0.3, 0.6, 0.9):
        token.stands(used, reset=T + H5)
        at = T
        verdict = token.look(at)
        if used + 0.011 <= burst:
            assert verdict["allowed"]
            continue
        assert verdict["reason"] == "quota_paced"
        share = (used + 0.011 - burst) / (1 - burst)
        assert verdict["retry_at"] == pytest.approx(T + share * H5, abs=2)
        assert not token.look(verdict["retry_at"] - 1000)["allowed"]
        assert token.look(verdict["retry_at"])["allowed"]


def test_pace_counts_what_is_under_way(token: Token) -> None:
    """But that may come back, so it is asked for again soon."""
    token.quota = {"keep_free": 0.0, "burst": 0.25}
    token.stands(0.2, reset=T + H5)
    assert token.take(tokens=4000)["allowed"]
    assert token.look(tokens=1000)["reason"] == "quota_reserved"


def test_both_windows_hold(token: Token) -> None:
    """The one that holds out longest is named."""
    token.stands(0.1)
    token.stands(0.999, reset=T + D7 // 2, window="7d")
    assert token.look() == {"allowed": False, "retry_at": T + D7 // 2, "reason": "quota_used_up"}
    token.stands(0.999)
    token.stands(0.1, reset=T + D7 // 2, window="7d")
    assert token.look() == {"allowed": False, "retry_at": RESET, "reason": "quota_used_up"}


def test_week_of_unknown_capacity_holds_what_five_hours_hold(token: Token) -> None:
    """Else calls would go one by one until two hundredths of a week are used."""
    token.stands(0.1)
    token.stands(0.1, capacity=None, reset=T + D7 // 2, window="7d")
    assert token.take()["allowed"]
    assert token.take()["allowed"]
    assert token.look(tokens=90_000)["reason"] == "quota_used_up"


@pytest.mark.parametrize("capacity", [20_000, 1_000_000])
def test_capacity_is_learned_from_below(token: Token, capacity: int) -> None:
    """From answers with two decimals, rounded: never more than there is, and within a fifth of it after a while."""
    used, learned = 0, 0.0
    for _ in range(60):
        tokens = capacity // 100
        taken = token.take(T, tokens)
        assert taken["allowed"], taken
        used += tokens
        token.settle(T, tokens, told(round(used / capacity, 2)), covers=taken["covers"])
        learned = float(token.field("5h_capacity") or 0)
        assert learned <= capacity
    assert learned >= 0.8 * capacity


def test_capacity_is_corrected_when_calls_weigh_more(token: Token) -> None:
    """Tokens of another model count for more: what a rise of a tenth cannot have been is given up."""
    token.stands(0.0, capacity=1_000_000)
    for step in range(14):
        token.call(T, 1000, told(step / 100))  # 1,000 tokens a hundredth: it holds 100,000
    assert float(token.field("5h_capacity") or 0) < 200_000


@pytest.mark.parametrize("lost", [1, 3])
def test_calls_that_nobody_counted_teach_no_capacity(token: Token, lost: int) -> None:
    """A worker that died before it sent anything had reserved tokens that no rise of the utilization holds."""
    token.call(T, 100, told(0.1))
    for _ in range(lost):
        assert token.take(T, 50_000)["allowed"]
        token.settle(T, 50_000, used_tokens=None, succeeded=False)
    for step in range(1, 20):
        token.call(T, 1000, told((10 + step) / 100))  # 1,000 tokens a hundredth: it holds 100,000
        assert float(token.field("5h_capacity") or 0) <= 100_000
    assert float(token.field("5h_capacity") or 0) >= 70_000


WEIGHTS = st.lists(st.integers(1, 4000), min_size=20, max_size=60)


@hypothesis_settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WEIGHTS, st.randoms(use_true_random=False), st.integers(0, 999))
def test_concurrent_calls_never_pass_the_window(token: Token, weights: list[int], random: Any, start: int) -> None:
    """Whatever is admitted, in whatever order it ends: what was really used stays within the capacity once known."""
    token.redis.delete(token.key)
    capacity = 100_000
    used = capacity * start // 1000
    token.stands(round(used / capacity, 2))
    under_way: list[tuple[int, str]] = []
    for tokens in weights:
        verdict = token.take(T, tokens)
        if verdict["allowed"]:
            under_way.append((tokens, verdict["covers"]))
            assert used + sum(most for most, _ in under_way) <= capacity
        while under_way and (random.random() < 0.4 or not verdict["allowed"]):
            most, covers = under_way.pop(random.randrange(len(under_way)))
            real = random.randint(0, most)
            used += real
            token.settle(T, most, told(min(round(used / capacity, 2), 1.0)), covers=covers, used_tokens=real)
            verdict = {"allowed": True}


def test_crowd_never_takes_more_than_is_left(token: Token) -> None:
    """Twenty threads at once: ten calls fit into what is left, and ten get leave."""
    token.stands(0.89)
    gate = threading.Barrier(20)

    def ask(_: int) -> bool:
        gate.wait()
        allowed: bool = token.take(T, 1000)["allowed"]
        return allowed

    with ThreadPoolExecutor(20) as threads:
        assert sum(threads.map(ask, range(20))) == 10


def test_lost_reservation_comes_back_when_nothing_can_be_under_way(token: Token) -> None:
    """Ten minutes after the last lease: the record of the call has gone, so nobody will settle it."""
    token.stands(0.9, reset=T + H5)
    token.take(tokens=9000, lease_ms=60_000)
    assert token.look(T + 60_000 + 599_999, 9000)["reason"] == "quota_reserved"
    assert token.look(T + 60_000 + 600_000, 9000)["allowed"]


@pytest.mark.parametrize("garbage", ["", "x", "nan", "inf", "-1", "1e308", b"\xff{"])
def test_garbled_fields_open_no_door(token: Token, garbage: str | bytes) -> None:
    """One call at a time goes, as before anything was told, and its answer puts everything right."""
    token.call(T, 100, told(0.5), told(0.1, T + HOUR_MS, "7d"))
    for name in token.redis.hkeys(token.key):
        token.redis.hset(token.key, name, garbage)
    taken = token.take()
    assert taken["allowed"]
    token.settle(T, 100, told(0.6), told(0.2, T + HOUR_MS, "7d"), covers=taken["covers"])
    assert float(token.field("5h_utilization") or 0) == 0.6
    token.stands(0.999)
    assert token.look()["reason"] == "quota_used_up"


@pytest.mark.parametrize("kind", ["string", "list"])
def test_foreign_value_under_its_key_counts_as_missing(token: Token, kind: str) -> None:
    """Whoever wrote there."""
    token.redis.set(token.key, "x") if kind == "string" else token.redis.rpush(token.key, "x")
    assert token.take()["allowed"]
    token.settle(T, 100, told(0.5))
    assert float(token.field("5h_utilization") or 0) == 0.5


def test_it_is_kept_for_longer_than_any_window(token: Token) -> None:
    """A day longer than a week."""
    token.take()
    assert 7 * 86_400 < token.redis.ttl(token.key) <= 8 * 86_400
