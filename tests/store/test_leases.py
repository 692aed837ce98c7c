"""Who is taken for dead, and who is not? Leases in Redis, by Redis' clock."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.store.keys import FleetKeys
from attune_worker.store.leases import Judgement, Leases

LONG = 60.0
SHORT = 0.4
Until = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def leases(settings: Settings) -> Iterator[Leases]:
    found = Leases(settings)
    yield found
    found.close()


def watch(leases: Leases, until: Until, seconds: float = SHORT) -> Judgement:
    """Look again and again, as the sweeper does, until leases are judged."""

    def look() -> Judgement | None:
        seen = leases.judge(seconds)
        return seen if seen.steady else None

    judgement: Judgement = until(look)
    return judgement


def now_ms(redis: Redis) -> int:
    seconds, micros = redis.time()
    return int(seconds * 1000 + micros // 1000)


def shift(redis: Redis, settings: Settings, field: str, by_ms: int) -> None:
    """Have been sweeping at another time: the only clock is Redis', and that cannot be turned."""
    redis.hincrby(FleetKeys(settings.namespace).sweep, field, by_ms)


def test_worker_that_says_so_lives(leases: Leases, until: Until) -> None:
    """Its lease is seen by everybody, with the time that is left of it."""
    assert leases.beat("a", LONG, again=False)
    assert leases.beat("a", LONG, again=True)
    left = leases.live()["a"]
    assert LONG / 2 < left <= LONG
    judgement = watch(leases, until)
    assert (judgement.live, judgement.died) == (frozenset({"a"}), ())
    assert abs((datetime.now(UTC) - judgement.at).total_seconds()) < 60


def test_lease_that_ran_out_is_taken_away_once_and_never_comes_back(leases: Leases, until: Until) -> None:
    """Two that judge never both announce a death, and a worker that wakes up later is told."""
    leases.beat("dead", 0.001, again=False)
    leases.beat("alive", LONG, again=False)
    judgement = watch(leases, until)
    assert judgement.died == ("dead",)
    assert judgement.live == frozenset({"alive"})
    assert leases.judge(SHORT).died == ()
    assert not leases.beat("dead", LONG, again=True)
    assert set(leases.live()) == {"alive"}


def test_late_worker_that_nobody_judged_keeps_its_lease(leases: Leases) -> None:
    """Who lives is decided by the judge alone, so a lease that ran out unseen goes on."""
    leases.beat("late", 0.001, again=False)
    assert leases.live()["late"] < 1
    assert leases.beat("late", LONG, again=True)
    assert leases.live()["late"] > 1


def test_worker_that_ends_gives_its_lease_up(leases: Leases, until: Until) -> None:
    """Nobody has to find it dead; giving it up twice does no harm."""
    leases.beat("a", LONG, again=False)
    leases.drop("a")
    leases.drop("a")
    assert leases.live() == {}
    judgement = watch(leases, until)
    assert (judgement.live, judgement.died) == (frozenset(), ())
    assert not leases.beat("a", LONG, again=True)


def test_nobody_is_judged_before_leases_were_watched_for_a_while(leases: Leases) -> None:
    """A fleet that has just been started, or Redis that has just come back, says nothing of who lives."""
    leases.beat("a", 0.001, again=False)
    first = leases.judge(LONG)
    assert (first.steady, first.died, first.live) == (False, (), frozenset({"a"}))
    assert not leases.judge(LONG).steady


@pytest.mark.parametrize("gap_ms", [5_500, 3_600_000, -3_600_000])
def test_gap_in_watching_starts_the_time_anew(leases: Leases, settings: Settings, redis: Redis, gap_ms: int) -> None:
    """While Redis was away or all stood still, workers could not renew; and its clock may jump, also back."""
    leases.beat("a", 0.001, again=False)
    leases.judge(LONG)
    shift(redis, settings, "steady_ms", -round(LONG * 1000))
    shift(redis, settings, "last_ms", -gap_ms)
    judgement = leases.judge(LONG)
    assert (judgement.steady, judgement.died) == (False, ())


def test_a_sweep_that_was_slow_is_no_gap_while_workers_say_that_they_live(
    leases: Leases, settings: Settings, redis: Redis
) -> None:
    """One that lives is as good a sign as a look that everybody had the chance to say so."""
    leases.beat("dead", 0.001, again=False)
    leases.judge(LONG)
    shift(redis, settings, "steady_ms", -round(LONG * 1000))
    for _ in range(3):
        shift(redis, settings, "last_ms", -4_000)
        leases.beat("alive", LONG, again=False)
    judgement = leases.judge(LONG)
    assert (judgement.steady, judgement.died) == (True, ("dead",))


def test_change_of_the_leader_is_no_gap(leases: Leases, settings: Settings, redis: Redis) -> None:
    """It takes four seconds, and a worker that died together with the leader is found in its time."""
    leases.beat("a", 0.001, again=False)
    leases.judge(LONG)
    shift(redis, settings, "steady_ms", -round(LONG * 1000))
    shift(redis, settings, "last_ms", -4_000)
    judgement = leases.judge(LONG)
    assert (judgement.steady, judgement.died) == (True, ("a",))


def test_pause_of_half_a_short_lease_is_a_gap(leases: Leases, settings: Settings, redis: Redis) -> None:
    """Leases shorter than the pauses that do no harm to long ones."""
    leases.judge(2.0)
    shift(redis, settings, "steady_ms", -2_000)
    shift(redis, settings, "last_ms", -1_100)
    assert not leases.judge(2.0).steady


def test_lease_from_a_clock_far_ahead_ends_in_its_time(
    leases: Leases, settings: Settings, redis: Redis, until: Until
) -> None:
    """After a failover to a server an hour behind, a dead worker is not held for alive for an hour."""
    key = FleetKeys(settings.namespace).workers
    redis.zadd(key, {"ahead": now_ms(redis) + 3_600_000, "for ever": "+inf"})
    leases.judge(SHORT)
    assert all(left <= SHORT for left in leases.live().values())
    died: list[str] = []
    until(lambda: died.extend(leases.judge(SHORT).died) or len(died) == 2)
    assert sorted(died) == ["ahead", "for ever"]


def test_many_deaths_are_announced_bit_by_bit(leases: Leases, settings: Settings, redis: Redis, until: Until) -> None:
    """Whatever the number: no script runs long, and each death is announced once."""
    key = FleetKeys(settings.namespace).workers
    redis.zadd(key, {f"worker-{number}": 1 for number in range(250)})
    watch_sizes: list[int] = []
    until(lambda: watch_sizes.append(len(leases.judge(SHORT).died)) or sum(watch_sizes) >= 250)
    assert [size for size in watch_sizes if size] == [100, 100, 50]


def test_foreign_values_are_replaced(leases: Leases, settings: Settings, redis: Redis, until: Until) -> None:
    """Somebody else's keys, and bytes that are no text, end no worker."""
    keys = FleetKeys(settings.namespace)
    redis.set(keys.workers, "a string")
    redis.set(keys.sweep, "a string")
    leases.judge(SHORT)
    assert leases.beat("a", LONG, again=False)
    redis.hset(keys.sweep, mapping={"last_ms": "never", "steady_ms": "\xff"})
    redis.zadd(keys.workers, {b"\xff\xfe": 1})
    judgement = watch(leases, until)
    assert judgement.live == frozenset({"a"})
    assert len(judgement.died) == 1


def test_sweep_s_memory_does_not_stay_for_ever(leases: Leases, settings: Settings, redis: Redis) -> None:
    """A namespace that is not used any more leaves nothing but leases that nobody judged."""
    leases.judge(LONG)
    assert 0 < redis.ttl(FleetKeys(settings.namespace).sweep) <= 86_400


def test_death_is_announced_to_one_of_many_judges(settings: Settings, leases: Leases, redis: Redis) -> None:
    """Should two workers sweep at once, a dead one is found by one of them."""
    leases.beat("dead", 0.001, again=False)
    leases.judge(LONG)
    shift(redis, settings, "steady_ms", -round(LONG * 1000))
    died: list[str] = []
    start = threading.Barrier(6)

    def judge() -> None:
        mine = Leases(settings)
        start.wait()
        for _ in range(20):
            died.extend(mine.judge(LONG).died)
        mine.close()

    threads = [threading.Thread(target=judge) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert died == ["dead"]


def test_leases_survive_forgotten_scripts(leases: Leases, redis: Redis) -> None:
    """SCRIPT FLUSH costs a round trip, and no worker."""
    leases.beat("a", LONG, again=False)
    redis.script_flush()
    assert leases.beat("a", LONG, again=True)
    assert leases.judge(LONG).live == frozenset({"a"})


def test_redis_that_is_away_is_a_typed_error() -> None:
    """The lease's thread and the sweeper tell it from an error of their own."""
    environ = {"ATTUNE_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0", "ATTUNE_REDIS_TIMEOUT_SECONDS": "0.2"}
    leases = Leases(Settings.load(environ=environ))
    for call in (
        lambda: leases.beat("a", LONG, again=False),
        lambda: leases.drop("a"),
        lambda: leases.judge(LONG),
        leases.live,
    ):
        with pytest.raises(ServiceUnavailableError):
            call()
