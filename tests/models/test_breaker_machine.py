"""Fifty workers at once, in any order: the fleet's circuit does what a plain model in Python does."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis import Redis

from attune_worker.models.local_circuits import LocalCircuits
from attune_worker.sections import BreakerSettings
from tests.store.breaker_lab import Lab

WORKERS = 50
NAME = ("provider", "tier")

POLICIES = [
    BreakerSettings(failure_threshold=2, window_seconds=30, recovery_timeout_seconds=4, max_open_seconds=15),
    BreakerSettings(
        failure_threshold=6,
        window_seconds=20,
        recovery_timeout_seconds=3,
        half_open_calls=3,
        failure_rate_threshold=0.5,
        slow_call_seconds=2,
        slow_call_rate_threshold=0.4,
        minimum_calls=4,
    ),
]

workers = st.integers(0, WORKERS - 1).map("worker-{}".format)


class Fleet(RuleBasedStateMachine):
    """Workers ask, finish, fail, die and come late; the model is told the same, and must answer the same."""

    redis: Redis
    policy: BreakerSettings

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab(self.redis, "{machine}:breaker:provider:tier", self.policy)
        self.redis.delete(self.lab.key)
        self.model = LocalCircuits(self.policy, lambda: self.lab.now / 1000)
        self.permits: list[tuple[str, str, int, int]] = []
        self.last_generation = 0

    @rule(worker=workers, lease_ms=st.sampled_from([500, 5000]))
    def ask(self, worker: str, lease_ms: int) -> None:
        self._ask(worker, lease_ms)

    @rule(asking=st.lists(workers, min_size=WORKERS, max_size=WORKERS), lease_ms=st.just(5000))
    def all_ask_at_once(self, asking: list[str], lease_ms: int) -> None:
        for worker in asking:
            self._ask(worker, lease_ms)

    @rule(which=st.integers(0), outcome=st.sampled_from(["success", "failure", "failure", "ignored"]), data=st.data())
    def finish(self, which: int, outcome: str, data: st.DataObject) -> None:
        if self.permits:
            worker, call, fleet_generation, model_generation = self.permits.pop(which % len(self.permits))
            extra = data.draw(st.sampled_from([{}, {"latency_ms": 3000}, {"retry_after_ms": 9000}]))
            result = {"call": call, "outcome": outcome, "worker": worker, **extra}
            self._record({**result, "generation": fleet_generation}, {**result, "generation": model_generation})

    @rule(worker=workers, outcome=st.sampled_from(["success", "failure", "ignored"]))
    def record_without_a_permit(self, worker: str, outcome: str) -> None:
        result = {"call": self.lab.new_call(), "outcome": outcome, "worker": worker}
        self._record(result, result)

    @rule(first=workers, second=workers)
    def provider_is_down(self, first: str, second: str) -> None:
        for worker in [first, second] * 3:
            self.record_without_a_permit(worker, "failure")

    @rule(which=st.integers(0))
    def die(self, which: int) -> None:
        if self.permits:
            self.permits.pop(which % len(self.permits))

    @rule(ms=st.sampled_from([1, 400, 1000, 3000, 4000, 10_000, 31_000]))
    def wait(self, ms: int) -> None:
        self.lab.now += ms

    @invariant()
    def probes_are_within_their_number(self) -> None:
        assert self.lab._run("look")[2] <= self.policy.half_open_calls

    @invariant()
    def generations_only_grow(self) -> None:
        generation = int(self.lab._run("look")[3])
        assert generation >= self.last_generation
        self.last_generation = generation

    @invariant()
    def state_is_the_models(self) -> None:
        assert self.lab.state == self.model._circuit(NAME).state

    def _ask(self, worker: str, lease_ms: int) -> None:
        call = self.lab.new_call()
        fleet, model = self.lab.ask([NAME], call, lease_ms), self.model.ask([NAME], call, lease_ms)
        assert (fleet.allowed, fleet.wait_ms, fleet.reason) == (model.allowed, model.wait_ms, model.reason)
        if fleet.allowed:
            [(fleet_generation, fleet_probe)], [(model_generation, model_probe)] = fleet.permits, model.permits
            assert fleet_probe == model_probe
            self.permits = [*self.permits[-200:], (worker, call, fleet_generation, model_generation)]

    def _record(self, to_fleet: dict[str, object], to_model: dict[str, object]) -> None:
        assert self.lab.record({NAME: to_fleet}) == self.model.record({NAME: to_model})


@pytest.mark.parametrize("rules", POLICIES, ids=["consecutive", "rates"])
def test_fleet_does_what_the_model_does(redis: Redis, rules: BreakerSettings) -> None:
    """Whatever happens in whatever order, both give the same permits, waits and transitions."""
    machine = type("Machine", (Fleet,), {"redis": redis, "policy": rules})
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=checks, database=None
        ),
    )
