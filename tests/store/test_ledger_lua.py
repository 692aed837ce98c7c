"""Is every call in the ledger once, in whatever order its worker and the sweeper settle it? On one server and more."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attune_worker.budget import Budgets
from attune_worker.jobs import Job
from attune_worker.ledger import Comparison, CostRow, Ledger, latest
from attune_worker.limits import Limits
from attune_worker.models.admission import Admission
from attune_worker.models.calls import Outcome, Permit, Quote, Request
from attune_worker.models.orphans import Orphans
from attune_worker.models.registry import Registry
from attune_worker.settings import Settings
from attune_worker.store.circuits import Circuits
from attune_worker.store.keys import FleetKeys
from attune_worker.store.scripts import Script
from attune_worker.telemetry.store import Telemetry

LEASE = "host:1:0badcafe"
JOB = Job.parse({"task_type": "summarize", "prompt": "?", "tenant": "acme", "workflow": "review"})
DONE = Outcome("succeeded", "success", 120, Decimal("0.25"), 60, 40, request_id="req-1")
BROKEN = Outcome("failed", "failure", 30, Decimal(0), 0, error="overloaded", status=529)
UNKNOWN = Outcome("failed", "ignored", 30, None, error="timeout")
RELEASED = Outcome.released()


@dataclass
class Expected:
    """What must be counted: one call's, or that of several added up."""

    spent: Decimal = Decimal(0)
    reserved: Decimal = Decimal(0)
    calls: int = 0
    cost: Decimal = Decimal(0)
    unknown: int = 0
    orphaned: int = 0
    told: int = 0
    """Calls that routing has learned of."""

    def __add__(self, other: Expected) -> Expected:
        return Expected(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


WORST = Decimal(1)
OPEN = Expected(reserved=WORST)
ENDS = {
    "orphan": Expected(spent=WORST, calls=1, orphaned=1),
    "settle": Expected(spent=Decimal("0.25"), calls=1, cost=Decimal("0.25"), told=1),
    "fail": Expected(calls=1, told=1),
    "lose": Expected(spent=WORST, calls=1, unknown=1, told=1),
    "release": Expected(),
}
OUTCOMES = {"settle": DONE, "fail": BROKEN, "lose": UNKNOWN, "release": RELEASED}


def end_of(steps: tuple[str, ...]) -> Expected:
    """Return what a call must have come to: the first word stands, but an orphan's worker may still have its own."""
    words = [step for step in steps if step != "orphan"]
    if words:
        return ENDS[words[0]]
    return ENDS["orphan"] if steps else OPEN


@dataclass
class Lab:
    """A fleet of one worker, and a sweeper elsewhere."""

    redis: Any
    settings: Settings
    admission: Admission
    orphans: Orphans
    taken: dict[str, Permit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = FleetKeys(self.settings.namespace)
        self.redis.zadd(self.keys.workers, {LEASE: (time.time() + 3600) * 1000})
        self.model = Registry.from_settings(self.settings).find("anthropic/claude-haiku-5-5")[0]

    def admit(
        self,
        job: Job = JOB,
        worst_usd: Decimal | None = WORST,
        tokens: int = 100,
        expected_usd: Decimal | None = None,
    ) -> Permit:
        """Get leave for a call of a job of its own."""
        quote = Quote(self.model, tokens, worst_usd, expected_usd=expected_usd)
        verdict = self.admission.admit(Request(uuid4().hex, uuid4().hex, job, (quote,), LEASE))
        assert isinstance(verdict, Permit), verdict
        return verdict

    def do(self, taken: Permit, step: str) -> None:
        if step == "orphan":
            self.orphans.of_job(taken.job_id, LEASE)
        else:
            self.admission.settle(taken, OUTCOMES[step])

    def row(self) -> CostRow:
        [row] = Ledger(self.settings, self.redis).report(2)
        return row

    def counted(self) -> Expected:
        row = self.row()
        [budget] = [one for one in Budgets(self.settings, self.redis).status() if one.tenant is None]
        told = Telemetry(self.settings, self.redis).stats("review", None, 2)
        return Expected(
            budget.spent_usd,
            budget.reserved_usd,
            row.calls,
            row.cost_usd,
            row.unknown_calls,
            row.orphaned_calls,
            sum(one.calls for one in told.values()),
        )


@pytest.fixture
def lab(settings: Settings, redis: Any) -> Iterator[Lab]:
    budgets = [{"per": "day", "limit_usd": "100000"}, {"per": "month", "limit_usd": "90000", "tenant": "*"}]
    breaker = {"failure_threshold": 100}
    changed = Settings.model_validate({**settings.model_dump(), "budgets": budgets, "breaker": breaker})
    elsewhere = Settings.model_validate({**settings.model_dump(), "budgets": [], "breaker": breaker})
    found = Lab(redis, changed, Admission(changed), Orphans(elsewhere, redis))
    yield found
    found.admission.close()


def test_every_order_of_settlements_counts_a_call_once(lab: Lab) -> None:
    """Orphaned, settled, lost, released, up to three of them in any order: budgets, sums and telemetry agree."""
    expected = Expected()
    for length in range(4):
        for steps in product(("orphan", "settle", "lose", "release"), repeat=length):
            taken = lab.admit()
            for step in steps:
                lab.do(taken, step)
            expected += end_of(steps)
            if length < 3:
                assert lab.counted() == expected, steps
    assert lab.counted() == expected
    row = lab.row()
    assert (row.orphaned_usd, row.unknown_usd) == (row.orphaned_calls * WORST, row.unknown_calls * WORST)
    assert (row.input_tokens, row.output_tokens) == (
        row.cost_usd / DONE.cost_usd * 60,
        row.cost_usd / DONE.cost_usd * 40,
    )
    assert Limits(lab.settings, lab.redis).status()["anthropic"].in_flight == 1  # the one that nobody settled


STEPS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["admit", *ENDS])), max_size=30)


@hypothesis_settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_budgets_and_sums_equal_a_recount_from_the_ledger(lab: Lab, steps: list[tuple[int, str]]) -> None:
    """Whatever the interleaving of five calls: what is spent is what the records say, reserved is what is open."""
    for key in lab.redis.scan_iter(match=f"{lab.keys.tag}*"):
        if key.decode() != lab.keys.workers:
            lab.redis.delete(key)
    taken: dict[int, Permit] = {}
    for number, step in steps:
        if number in taken and step != "admit":
            lab.do(taken[number], step)
        elif number not in taken and step == "admit":
            taken[number] = lab.admit(worst_usd=Decimal(number))
    records = latest(Ledger(lab.settings, lab.redis).records())
    reserved = sum(
        Decimal(number)
        for number, one in taken.items()
        if lab.redis.hget(lab.keys.call(one.call_id), "state") == b"open"
    )
    spent = sum(one.estimate_usd if one.cost_usd is None else one.cost_usd for one in records)
    budgets = Budgets(lab.settings, lab.redis).status()
    assert {(one.spent_usd, one.reserved_usd) for one in budgets} == {(spent, reserved)}
    row = lab.row()
    assert row.calls == len(records)
    assert row.cost_usd == sum(one.cost_usd for one in records if one.cost_usd is not None)
    assert row.orphaned_usd == sum(one.estimate_usd for one in records if one.outcome == "orphaned")
    assert row.unknown_calls + row.orphaned_calls == sum(one.uncertain for one in records)


@pytest.mark.parametrize(
    ("steps", "compared"),
    [
        (("settle",), True),
        (("settle", "settle"), True),
        (("orphan", "settle"), True),
        (("orphan",), False),
        (("fail",), False),
        (("lose",), False),
        (("release",), False),
        (("lose", "settle"), False),
    ],
)
def test_what_was_expected_is_compared_once_where_a_cost_is_known(
    lab: Lab, steps: tuple[str, ...], compared: bool
) -> None:
    """Of answers alone; two that are off by the same, in either direction, are off by both."""
    for expected in ("0.20", "0.30", None):
        taken = lab.admit(expected_usd=None if expected is None else Decimal(expected))
        for step in steps:
            lab.do(taken, step)
    found = Ledger(lab.settings, lab.redis).report(2)[0].compared
    both = Comparison(2, Decimal("0.5"), Decimal("0.5"), Decimal("0.1"))
    assert found == (both if compared else Comparison())


def test_estimates_of_a_workflow_are_held_against_its_own_calls(lab: Lab) -> None:
    """By model, over all its tenants; a workflow with stars in its name is no pattern."""
    for workflow, tenant in (("review", "acme"), ("review", None), ("re*", "acme"), ("*", "acme")):
        fields = {"task_type": "summarize", "prompt": "?", "tenant": tenant, "workflow": workflow}
        lab.do(lab.admit(Job.parse(fields), expected_usd=Decimal("0.5")), "settle")
    ledger = Ledger(lab.settings, lab.redis)
    found = {name: ledger.compared(name, 7) for name in ("review", "re*", "*", "r")}
    assert {name: [(ref, one.calls) for ref, one in refs.items()] for name, refs in found.items()} == {
        "review": [("anthropic/claude-haiku-5-5", 2)],
        "re*": [("anthropic/claude-haiku-5-5", 1)],
        "*": [("anthropic/claude-haiku-5-5", 1)],
        "r": [],
    }
    one = found["review"]["anthropic/claude-haiku-5-5"]
    assert (one.ratio, one.mean_off_usd) == (0.5, Decimal("0.25"))


def test_record_says_what_the_call_was_and_what_it_came_to(lab: Lab) -> None:
    """All of it, and of a call that failed the provider's status."""
    done, broken = lab.admit(expected_usd=Decimal("0.125")), lab.admit()
    lab.do(done, "settle")
    lab.do(broken, "fail")
    first, second = Ledger(lab.settings, lab.redis).records()
    assert (first.call_id, first.job_id, first.tenant, first.workflow) == (done.call_id, done.job_id, "acme", "review")
    assert (first.stage, first.provider, first.model_id) == ("summarize", "anthropic", "claude-haiku-5-5")
    assert (first.tier, first.mode, first.outcome, first.error) == ("cheap", "api", "succeeded", None)
    assert (first.cost_usd, first.estimate_usd, first.latency_ms) == (Decimal("0.25"), WORST, 120)
    assert (first.input_tokens, first.output_tokens, first.request_id) == (60, 40, "req-1")
    assert (first.expected_usd, second.expected_usd) == (Decimal("0.125"), None)
    assert 0 <= (first.written - first.time).total_seconds() < 10
    assert (second.outcome, second.error, second.status, second.cost_usd) == ("failed", "overloaded", 529, Decimal(0))


def test_settlement_of_an_orphan_is_a_second_record(lab: Lab) -> None:
    """The first is not rewritten; the second says that it takes its place."""
    taken = lab.admit()
    lab.do(taken, "orphan")
    lab.do(taken, "settle")
    records = list(Ledger(lab.settings, lab.redis).records())
    assert [(one.outcome, one.corrects_orphan) for one in records] == [("orphaned", False), ("succeeded", True)]
    assert [one.latency_ms for one in records] == [None, 120]
    assert latest(records) == records[1:]


def test_orphan_that_was_never_made_is_taken_back(lab: Lab) -> None:
    """A worker that was only frozen gives leave back: nothing was called, and nothing remains counted."""
    taken = lab.admit()
    lab.do(taken, "orphan")
    lab.do(taken, "release")
    records = list(Ledger(lab.settings, lab.redis).records())
    assert [one.outcome for one in records] == ["orphaned", "released"]
    assert latest(records) == []
    assert lab.counted() == Expected()


def test_orphan_without_a_price_says_so(lab: Lab) -> None:
    """At most how much it cost nobody knows, so it is counted apart, and taken back with it."""
    lab.settings = lab.settings.model_copy(update={"budgets": ()})
    lab.admission.close()
    lab.admission = Admission(lab.settings)
    taken = lab.admit(worst_usd=None)
    lab.do(taken, "orphan")
    assert (lab.row().orphaned_calls, lab.row().unpriced_calls, lab.row().orphaned_usd) == (1, 1, Decimal(0))
    lab.do(taken, "lose")
    assert (lab.row().orphaned_calls, lab.row().unpriced_calls, lab.row().unknown_calls) == (0, 1, 1)


def test_orphan_gives_its_slot_and_its_probe_back(lab: Lab) -> None:
    """The next call may probe at once; the dead worker's does not hold the circuit until its lease ends."""
    Circuits(lab.settings, lab.settings.breaker, lab.redis).open(("anthropic", "cheap"), 600_000)
    circuit = lab.keys.circuit("anthropic", "cheap")
    lab.redis.hset(circuit, "retry_ms", 1)  # that much later
    probe = lab.admit()
    assert lab.redis.hexists(circuit, f"lease:{probe.call_id}")
    lab.do(probe, "orphan")
    assert Limits(lab.settings, lab.redis).status()["anthropic"].in_flight == 0
    lab.do(lab.admit(), "settle")
    assert lab.redis.hget(circuit, "state") == b"closed"
    lab.do(probe, "fail")  # it comes too late to say anything of the circuit as it is now
    assert lab.redis.hget(circuit, "state") == b"closed"
    assert lab.redis.hget(circuit, "failures") in {None, b"0"}


def test_late_settlement_puts_the_tokens_of_an_orphan_right(lab: Lab) -> None:
    """Its reservation stands until somebody knows what was used."""
    providers = {
        name: one.model_copy(update={"tokens_per_minute": 60_000}) for name, one in lab.settings.providers.items()
    }
    lab.settings = lab.settings.model_copy(update={"providers": providers})
    lab.admission.close()
    lab.admission = Admission(lab.settings)

    def tokens() -> int:
        words = (lab.redis.hget(lab.keys.limits("anthropic"), "tokens_window") or b"").decode().split()
        return sum(int(word.partition(":")[2]) for word in words)

    taken = lab.admit(tokens=500)
    lab.do(taken, "orphan")
    assert tokens() == 500
    lab.do(taken, "settle")
    assert tokens() == 100


def test_lost_intent_is_no_orphan(lab: Lab) -> None:
    """Where the call's key was evicted nothing can be settled for the worker; what it tells itself counts."""
    taken = lab.admit()
    lab.redis.delete(lab.keys.call(taken.call_id))
    lab.do(taken, "orphan")
    assert list(Ledger(lab.settings, lab.redis).records()) == []
    lab.do(taken, "settle")
    assert lab.row().calls == 1


@pytest.mark.parametrize("step", ["settle", "orphan"])
def test_settlement_that_arrives_again_after_the_retention_time_counts_once(lab: Lab, step: str) -> None:
    """Results may be kept for a second; a call that is settled is known for longer than an outage keeps its answer."""
    changed = lab.settings.model_copy(update={"retention_seconds": 1})
    hasty = Lab(lab.redis, changed, Admission(changed), Orphans(changed, lab.redis))
    taken = hasty.admit()
    for _ in range(2):
        hasty.do(taken, step)
        hasty.do(taken, "settle")
        call = lab.keys.call(taken.call_id)
        lab.redis.expire(call, lab.redis.ttl(call) - 500)  # that much later
    assert (hasty.row().calls, hasty.row().cost_usd) == (1, Decimal("0.25"))
    hasty.admission.close()


DRIVER = """
for _, call in ipairs(cjson.decode(ARGV[1])) do
  for _ = 1, call.times or 1 do
    ledger_settle({ ledger = KEYS[1], costs = KEYS[2] }, call.now or now_in_ms(), call, cjson.decode(ARGV[2]))
  end
end
return redis.call('XLEN', KEYS[1])
"""
KEEP = {"ledger_ms": 86_400_000, "records": 1000, "sums_s": 3600}


@pytest.fixture
def write(redis: Any, settings: Settings) -> Callable[..., int]:
    """Return a function that settles calls in one go, and returns how many entries the ledger has."""
    keys = FleetKeys(settings.namespace)
    text = f"{Script('ledger', 'values', 'telemetry').text}\n{DRIVER}"

    def settle(*calls: dict[str, Any], **keep: int) -> int:
        whole = [{"record": "{}", "outcome": "succeeded", "group": "g", "cost_nano": 1, **call} for call in calls]
        told = json.dumps(KEEP | keep)
        return int(redis.eval(text, 2, keys.ledger, keys.costs("20261123"), json.dumps(whole), told))

    return settle


def test_ledger_keeps_about_as_many_records_as_it_may(write: Callable[..., int]) -> None:
    """Never fewer; and more only by what a node of the stream holds."""
    assert 1000 <= write({"times": 2500}) <= 1100


def test_old_records_leave(write: Callable[..., int]) -> None:
    """Two days later, of two hundred none is young enough; the new one is."""
    assert write({"times": 200}) == 200
    later_ms = round(time.time() * 1000) + 2 * 86_400_000
    assert write({"now": later_ms}) <= 101


def test_sums_have_room_for_so_many_groups(write: Callable[..., int], redis: Any, settings: Settings) -> None:
    """What comes after the 20,000th is counted together, and those before go on by themselves."""
    costs = FleetKeys(settings.namespace).costs("20261123")
    write({"group": "first"})
    redis.hset(costs, "groups", 20_000)
    write({"group": "first"}, {"group": "late"}, {"group": "later"})
    found = redis.hgetall(costs)
    assert (found[b"first|calls"], found[b"~other|calls"]) == (b"2", b"2")
    assert not any(name.startswith(b"late") for name in found)


@pytest.mark.parametrize("garbage", ["abc", "", "1.5", "9" * 30])
def test_garbled_sums_begin_again(write: Callable[..., int], redis: Any, settings: Settings, garbage: str) -> None:
    """No value in our keys makes a settlement fail, and none goes below zero by it."""
    costs = FleetKeys(settings.namespace).costs("20261123")
    for name in ("groups", "g|calls", "g|cost_nano", "g|orphaned", "g|orphaned_nano"):
        redis.hset(costs, name, garbage)
    write({"was_orphaned": True, "estimate_nano": 5}, {"cost_nano": 7})
    found = redis.hmget(costs, "g|calls", "g|cost_nano", "g|orphaned", "g|orphaned_nano")
    assert found == [b"1", b"8", b"0", b"0"]


def test_largest_cost_is_summed_exactly(write: Callable[..., int], redis: Any, settings: Settings) -> None:
    """A million dollars and a nano-dollar, twice."""
    write({"cost_nano": 10**15 + 1, "times": 2})
    assert redis.hget(FleetKeys(settings.namespace).costs("20261123"), "g|cost_nano") == str(2 * 10**15 + 2).encode()


def test_both_keys_end_by_themselves(write: Callable[..., int], redis: Any, settings: Settings) -> None:
    """As long after the last call as they are kept."""
    write({}, sums_s=50)
    keys = FleetKeys(settings.namespace)
    assert 0 < redis.ttl(keys.costs("20261123")) <= 50
    assert 86_000 < redis.ttl(keys.ledger) <= 86_400
