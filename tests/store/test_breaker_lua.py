from collections.abc import Callable
from uuid import uuid4

import pytest
from redis import Redis

from attune_worker.sections import BreakerSettings
from attune_worker.store.circuits import BREAKER_AVAILABLE, BREAKER_RECORD, BREAKER_SET, BREAKER_STATUS
from attune_worker.store.scripts import Script
from tests.store.breaker_lab import START_MS, Lab

DAY_MS = 86_400_000

Make = Callable[..., Lab]


@pytest.fixture
def make(redis: Redis) -> Make:
    """Return a function that makes a circuit with rules of its own: 3 failures in 100 s, then 10 s open."""

    def make_lab(**rules) -> Lab:
        chosen = {
            "failure_threshold": 3,
            "window_seconds": 100,
            "recovery_timeout_seconds": 10,
            "max_open_seconds": 35,
            **rules,
        }
        return Lab(redis, f"{{test-{uuid4().hex}}}:breaker:p:t", BreakerSettings(**chosen))

    return make_lab


@pytest.fixture
def lab(make: Make) -> Lab:
    return make()


def opened(lab: Lab) -> Lab:
    assert lab.fail(3) == ["opened"]
    return lab


def probing(lab: Lab) -> tuple[str, int]:
    """Open the circuit, wait until it may be probed, and return the probe's permit."""
    opened(lab)
    lab.now += 10_000
    return lab.permit()


@pytest.mark.parametrize(
    "script", [BREAKER_AVAILABLE, BREAKER_RECORD, BREAKER_SET, BREAKER_STATUS], ids=lambda s: s.name
)
def test_script_says_what_it_takes_and_returns(redis: Redis, script: Script) -> None:
    """Whoever debugs Redis reads the script there, and a wrong digest would send it in full each time."""
    own = script.text[script.text.index(f"-- {script.name.upper()}: ") :]
    head = "\n".join(line for line in own.splitlines() if line.startswith("--"))
    for part in ("KEYS  1 ", "ARGV  1 ", "Returns "):
        assert part in head
    assert redis.script_load(script.text) == script.sha


class TestClosed:
    """What opens a circuit, and what does not."""

    def test_opens_at_exactly_the_threshold(self, lab: Lab) -> None:
        """One failure fewer changes nothing."""
        assert lab.fail(2) == []
        assert lab.allowed
        assert lab.fail() == ["opened"]
        assert not lab.allowed

    def test_success_resets_the_count(self, lab: Lab) -> None:
        """The threshold counts consecutive failures."""
        lab.fail(2)
        lab.settle("success", lab.permit())
        assert lab.fail(2) == []
        assert lab.failures == 2

    def test_failures_out_of_the_window_do_not_count(self, lab: Lab) -> None:
        """At the window's edge a failure is forgotten, just before it is not."""
        lab.fail(2)
        lab.now += 100_000
        assert lab.fail(2) == []
        lab.now += 99_999
        assert lab.fail() == ["opened"]

    def test_ignored_results_do_not_count(self, lab: Lab) -> None:
        """A bad request or a cancelled call says nothing about the provider, not even that it is well."""
        lab.fail(2)
        lab.settle("ignored", lab.permit())
        assert lab.failures == 2
        assert lab.fail() == ["opened"]

    def test_nothing_is_written_by_looking_or_ignoring(self, lab: Lab) -> None:
        """Reading never changes state, and a result that counts for nothing creates none."""
        lab.settle("ignored", lab.permit())
        assert lab.state == "closed"
        assert not lab.redis.exists(lab.key)

    def test_results_without_a_permit_count(self, lab: Lab) -> None:
        """Whoever records without having asked is heard while the circuit is closed."""
        assert [lab.settle("failure") for _ in range(3)] == ["", "", "opened"]

    def test_a_result_told_twice_counts_once(self, lab: Lab) -> None:
        """A script may run twice when the connection breaks."""
        permit = lab.permit()
        for _ in range(5):
            assert lab.settle("failure", permit) == ""
        assert lab.failures == 1

    @pytest.mark.parametrize("lone_worker_opens", [False, True])
    def test_lone_worker(self, make: Make, lone_worker_opens: bool) -> None:
        """One bad worker does not open the fleet's circuit while another succeeds, unless it is told to."""
        lab = make(lone_worker_opens=lone_worker_opens)
        lab.settle("success", worker="good")
        lab.settle("success", worker="bad")
        assert lab.fail(3, worker="bad") == (["opened"] if lone_worker_opens else [])

    def test_second_worker_confirms_the_first(self, lab: Lab) -> None:
        """Failures of two workers are the provider's."""
        lab.settle("success", worker="good")
        assert lab.fail(5, worker="bad") == []
        assert lab.fail(1, worker="good") == ["opened"]

    def test_success_of_others_is_forgotten_with_the_window(self, lab: Lab) -> None:
        """What another worker saw long ago says nothing about now."""
        lab.settle("success", worker="good")
        lab.now += 100_000
        assert lab.fail(3, worker="bad") == ["opened"]

    def test_failure_rate_opens_from_the_minimum_of_calls_on(self, make: Make) -> None:
        """Half of the calls fail, never two in a row; few calls prove nothing."""
        lab = make(failure_rate_threshold=0.5, minimum_calls=10)
        events = []
        for _ in range(5):
            events += [lab.settle("success", lab.permit()), lab.settle("failure", lab.permit())]
        assert events == [*[""] * 9, "opened"]
        assert lab.redis.hget(lab.key, "reason") == b"5 of 10 calls failed"

    def test_rates_forget_what_is_older_than_the_window(self, make: Make) -> None:
        """Buckets of the window before do not count."""
        lab = make(failure_rate_threshold=0.5, minimum_calls=10)
        for _ in range(4):
            lab.settle("success", lab.permit())
            lab.settle("failure", lab.permit())
        lab.now += 100_000
        for _ in range(4):
            lab.settle("success", lab.permit())
        assert lab.fail(2) == []

    def test_slow_calls_open(self, make: Make) -> None:
        """Answers that take too long are trouble, even if they come."""
        lab = make(slow_call_seconds=5, slow_call_rate_threshold=0.5, minimum_calls=4)
        times_ms = [5000, 6000, 100, 6000]
        assert [lab.settle("success", lab.permit(), latency_ms=ms) for ms in times_ms] == ["", "", "", "opened"]

    def test_lone_worker_does_not_open_by_rate(self, make: Make) -> None:
        """The rate of failures, too, has to be more than one worker's."""
        lab = make(failure_rate_threshold=0.5, minimum_calls=4)
        events = []
        for _ in range(6):
            events += [lab.settle("success", worker="good"), lab.settle("failure", worker="bad")]
        assert set(events) == {""}
        assert lab.settle("failure", worker="good") == "opened"


class TestOpen:
    """Who is refused, for how long."""

    def test_refuses_until_the_wait_is_over(self, lab: Lab) -> None:
        """The refusal says how long, counted from the opening."""
        opened(lab)
        lab.now += 4_000
        refusal = lab.ask()
        assert (refusal.allowed, refusal.wait_ms, refusal.reason) == (False, 6_000, "open")
        lab.now += 5_999
        assert not lab.allowed
        lab.now += 1
        assert lab.allowed
        assert lab.state == "open"  # looking opened nothing

    def test_late_results_change_nothing(self, lab: Lab) -> None:
        """Neither do failures extend the break or open it again, nor does a success close it."""
        permits = [lab.permit() for _ in range(6)]
        before = [lab.settle("failure", permit) for permit in permits[:4]]
        assert before == ["", "", "opened", ""]
        lab.now += 9_000
        stored = lab.redis.hgetall(lab.key)
        events = [lab.settle("failure", permits[4], retry_after_ms=60_000), lab.settle("success", permits[5])]
        assert events == ["", ""]
        assert [lab.settle("failure"), lab.settle("success")] == ["", ""]  # without a permit
        assert lab.redis.hgetall(lab.key) == stored

    @pytest.mark.parametrize(("asked_ms", "waited_ms"), [(60_000, 60_000), (500, 10_000), (400 * DAY_MS, DAY_MS)])
    def test_longer_retry_after_wins(self, lab: Lab, asked_ms: int, waited_ms: int) -> None:
        """The provider's own word counts when it is longer, up to a day."""
        lab.fail(2)
        lab.fail(1, retry_after_ms=asked_ms)
        assert lab.ask().wait_ms == waited_ms

    def test_key_outlives_the_wait(self, make: Make) -> None:
        """The circuit must not close by being forgotten."""
        lab = opened(make(recovery_timeout_seconds=86_400))
        assert lab.redis.pttl(lab.key) > DAY_MS * 1.9


class TestHalfOpen:
    """Probes: how many, whose result counts, and what follows."""

    @pytest.mark.parametrize("calls", [1, 3])
    def test_only_so_many_probes_at_a_time(self, make: Make, calls: int) -> None:
        """Everybody else is refused, and told when a lease ends."""
        lab = opened(make(half_open_calls=calls))
        lab.now += 10_000
        grants = [lab.ask() for _ in range(50)]
        assert [grant.allowed for grant in grants] == [True] * calls + [False] * (50 - calls)
        assert (grants[-1].reason, grants[-1].wait_ms) == ("probing", 1000)
        assert len({grant.permits for grant in grants[:calls]}) == 1  # one round, one generation

    def test_holder_of_a_lease_may_ask_again(self, lab: Lab) -> None:
        """A script may run twice when the connection breaks, which must not cost the probe."""
        call, generation = probing(lab)
        again = lab.ask(call_id=call)
        assert again.permits == ((generation, True),)

    def test_success_closes_with_an_empty_window(self, lab: Lab) -> None:
        """It takes the full threshold to open it again, for the shortest time."""
        assert lab.settle("success", probing(lab)) == "closed"
        assert (lab.state, lab.failures) == ("closed", 0)
        assert lab.fail(2) == []
        assert lab.fail() == ["opened"]
        assert lab.ask().wait_ms == 10_000

    def test_rates_begin_anew_after_closing(self, make: Make) -> None:
        """What opened the circuit does not open it again."""
        lab = make(failure_threshold=100, failure_rate_threshold=0.5, minimum_calls=4)
        assert lab.fail(4) == ["opened"]
        lab.now += 10_000
        assert lab.settle("success", lab.permit()) == "closed"
        assert lab.fail(3) == []

    def test_open_time_doubles_up_to_its_limit(self, lab: Lab) -> None:
        """One failed probe opens it again, each time for longer."""
        opened(lab)
        waits = []
        for _ in range(4):
            lab.now += lab.ask().wait_ms
            assert lab.settle("failure", lab.permit()) == "reopened"
            waits.append(lab.ask().wait_ms)
        assert waits == [20_000, 35_000, 35_000, 35_000]

    def test_slow_probe_is_no_recovery(self, make: Make) -> None:
        """With a rule about slow calls a probe has to be quick."""
        lab = make(slow_call_seconds=5, slow_call_rate_threshold=0.5)
        assert lab.settle("success", probing(lab), latency_ms=6000) == "reopened"

    def test_ignored_probe_gives_its_lease_back(self, lab: Lab) -> None:
        """A cancelled probe leaves room for exactly one other."""
        assert lab.settle("ignored", probing(lab)) == ""
        assert [lab.ask().allowed for _ in range(2)] == [True, False]

    def test_dead_prober_costs_its_lease(self, lab: Lab) -> None:
        """When the lease is over another one may try, and the first one's result counts no more."""
        dead = probing(lab)
        lab.now += 999
        assert not lab.ask().allowed
        lab.now += 1
        alive = lab.permit()
        assert lab.settle("failure", dead) == ""
        assert lab.settle("success", alive) == "closed"

    def test_result_of_an_expired_lease_is_dropped(self, lab: Lab) -> None:
        """Also when nobody else has taken the probe yet."""
        late = probing(lab)
        lab.now += 1000
        assert lab.settle("success", late) == ""
        assert lab.state == "half_open"

    def test_results_of_others_do_not_count(self, lab: Lab) -> None:
        """Only a probe decides: not a call of before, not one without a permit, not another call's id."""
        before = lab.permit()
        _, generation = probing(lab)
        events = [
            lab.settle("success", before),
            lab.settle("success"),
            lab.settle("failure"),
            lab.settle("failure", ("somebody", generation)),
        ]
        assert events == ["", "", "", ""]
        assert lab.state == "half_open"

    def test_result_of_an_earlier_round_is_dropped(self, make: Make) -> None:
        """Two probes; one fails. The other's success, in whatever state, closes nothing."""
        lab = opened(make(half_open_calls=2))
        lab.now += 10_000
        first, second = lab.permit(60_000), lab.permit(60_000)
        assert lab.settle("failure", first) == "reopened"
        assert lab.settle("success", second) == ""
        lab.now += 20_000
        lab.permit()
        assert lab.settle("success", second) == ""
        assert lab.state == "half_open"

    def test_second_success_of_a_round_changes_nothing(self, make: Make) -> None:
        """The first closes; a late failure of the same round is no failure of the closed circuit."""
        lab = opened(make(half_open_calls=2))
        lab.now += 10_000
        first, second = lab.permit(), lab.permit()
        assert [lab.settle("success", first), lab.settle("failure", second)] == ["closed", ""]
        assert lab.failures == 0

    def test_expired_leases_do_not_pile_up(self, lab: Lab) -> None:
        """Probers that die one after the other leave one lease behind, not thousands."""
        probing(lab)
        for _ in range(5):
            lab.now += 1000
            lab.permit()
        leases = [field for field in lab.redis.hkeys(lab.key) if field.startswith(b"lease:")]
        assert len(leases) == 1


class TestForeignValues:
    """What others may do to our keys."""

    def test_key_of_another_type_counts_as_missing(self, lab: Lab) -> None:
        """The circuit is closed, and works."""
        for write in (lambda: lab.redis.set(lab.key, "text"), lambda: lab.redis.rpush(lab.key, "a", "b")):
            write()
            assert lab.allowed
            opened(lab)
            lab.redis.delete(lab.key)

    @pytest.mark.parametrize(
        "fields",
        [
            {"state": "open"},
            {"state": "open", "retry_ms": "soon"},
            {"state": "open", "retry_ms": "inf"},
            {"state": "open", "retry_ms": str(START_MS + 32 * DAY_MS)},
            {"state": "melted", "retry_ms": str(START_MS + 1000)},
            {"state": b"\xff\x00", "generation": "-1", "reopens": "nan", "failed_at": "1/2/3 x/y/z " * 1000},
            {"state": "half_open", "generation": "1e300", "lease:x": "for ever", "lease:": "nan"},
            {"failed_at": f"{START_MS + 10**12}/w/c " * 5, "failures": "many"},
            {"override": "yes please", "override_until_ms": "never", "b0": "a b c d e", "unknown": "x"},
            {"last_success_ms": "nan", "last_success_by": "good", "other_success_ms": "1e99", "other_success_by": "a"},
        ],
    )
    @pytest.mark.parametrize("rules", [{}, {"failure_rate_threshold": 0.99, "minimum_calls": 100}])
    def test_garbled_fields_count_as_missing(self, make: Make, fields, rules) -> None:
        """Calls are allowed, and the circuit opens, recovers and closes as ever."""
        lab = make(**rules)
        lab.redis.hset(lab.key, mapping=fields)
        assert lab.allowed
        if lab.state == "half_open":
            assert lab.settle("failure", lab.permit()) == "reopened"
        else:
            opened(lab)
        lab.now += lab.ask().wait_ms
        assert lab.settle("success", lab.permit()) == "closed"
        assert lab.failures == 0

    def test_evicted_circuit_is_closed_and_old_results_are_dropped(self, lab: Lab) -> None:
        """Generations never come again, so a probe of a circuit that was lost cannot count in the new one."""
        probe = probing(lab)
        lab.redis.delete(lab.key)
        assert lab.allowed
        assert lab.settle("failure", probe) == ""
        assert lab.failures == 0
        opened(lab)
        lab.now += 10_000
        assert lab.permit()[1] > probe[1]

    def test_everything_written_has_a_time_to_live(self, lab: Lab) -> None:
        """At each step of a circuit's life."""
        steps = [lambda: lab.fail(2), lambda: lab.fail(1), lab.permit, lambda: lab.settle("ignored")]
        for step in steps:
            step()
            lab.now += 10_000
            assert lab.redis.pttl(lab.key) > 0
