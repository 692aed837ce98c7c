import pytest
from redis import Redis

from attune_worker.sections import BreakerSettings
from attune_worker.settings import Settings
from attune_worker.store.circuits import Circuits, rules_in_ms
from attune_worker.store.keys import FleetKeys

TIER, PROVIDER = ("anthropic", "capable"), ("anthropic", None)
DAY_MS = 86_400_000


@pytest.fixture
def circuits(settings: Settings, redis: Redis) -> Circuits:
    return Circuits(settings, BreakerSettings(failure_threshold=2), redis)


def fail(circuits: Circuits, call: str) -> list[str]:
    generation, _ = circuits.ask([TIER, PROVIDER], call, 1000).permits[0]
    return circuits.record({TIER: {"call": call, "outcome": "failure", "worker": "w", "generation": generation}})


def test_open_circuit_refuses_and_is_seen(circuits: Circuits) -> None:
    """On one server and on a cluster: ask, record and read work on the same circuit."""
    assert [fail(circuits, "1"), fail(circuits, "2")] == [[""], ["opened: 2 failures in a row"]]
    refusal = circuits.ask([TIER, PROVIDER], "3", 1000)
    assert (refusal.allowed, refusal.reason, refusal.permits) == (False, "open", ())
    assert 0 < refusal.wait_ms <= 60_000
    assert circuits.names() == [TIER]
    assert circuits.read([TIER, PROVIDER])[TIER]["state"] == b"open"
    assert PROVIDER not in circuits.read([TIER, PROVIDER])


def test_probe_is_taken_from_both_circuits_or_from_none(circuits: Circuits) -> None:
    """While the provider's own circuit refuses, the tier's keeps its probe for later."""
    circuits.open(TIER, 1)
    circuits.override(PROVIDER, "open", by="ada", reason="trial")
    while (refusal := circuits.ask([TIER, PROVIDER], "1", 60_000)).reason == "open":
        assert refusal.wait_ms <= 1
    assert refusal.reason == "forced_open"
    assert circuits.read([TIER])[TIER]["probes"] == 0
    circuits.reset(PROVIDER)
    assert circuits.ask([TIER, PROVIDER], "2", 60_000).permits[0][1]
    assert circuits.ask([TIER, PROVIDER], "3", 60_000).reason == "probing"


def test_operators_leave_their_names(circuits: Circuits) -> None:
    """Of an override, an opening and a reset alike: by whom, and why."""
    circuits.override(TIER, "metrics_only", by="ada", reason="trial")
    found = circuits.read([TIER])[TIER]
    assert (found["override"], found["by"], found["reason"]) == (b"metrics_only", b"ada", b"trial")
    circuits.override(TIER, "")
    circuits.open(TIER, 60_000, by="bob", reason="\ud800 outage")
    found = circuits.read([TIER])[TIER]
    assert (found["override"], found["by"], found["reason"]) == (b"", b"bob", b"? outage")
    circuits.reset(TIER, by="eve")
    found = circuits.read([TIER])[TIER]
    assert (found["state"], found["by"], found["failures"]) == (b"closed", b"eve", 0)


def test_opening_for_a_time_never_shortens(circuits: Circuits) -> None:
    """Nor does it lift an override."""
    circuits.open(TIER, 3_600_000)
    circuits.override(TIER, "disabled")
    circuits.open(TIER, 1000)
    assert circuits.ask([TIER], "1", 1000).allowed
    circuits.override(TIER, "")
    assert circuits.ask([TIER], "1", 1000).wait_ms > 3_000_000


def test_what_is_forced_for_good_is_not_forgotten_in_a_day(
    circuits: Circuits, redis: Redis, settings: Settings
) -> None:
    """Nothing writes to a circuit that refuses, so its key has to last."""
    circuits.override(TIER, "open")
    keys = FleetKeys(settings.namespace)
    assert redis.pttl(keys.circuit(*TIER)) > 365 * DAY_MS
    assert redis.pttl(keys.circuits) > 365 * DAY_MS


def test_rules_that_are_not_set_are_not_sent() -> None:
    """A missing rule is no rule, which JSON's null would not say in Lua."""
    assert None not in rules_in_ms(BreakerSettings()).values()
