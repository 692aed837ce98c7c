"""Do two worker processes share a subscription without going over its quota? Against a provider that enforces it."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from attune_worker.client import Client, JobHandle
from attune_worker.credentials import Credentials, CredentialStatus
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from tests.conftest import API_KEY, Until

SOON = 60.0
HAIKU = "claude-haiku-5-5"
CAPACITY = 20_000
TEAM, CLUB, SPARE = "sk-never-shown-team", "sk-never-shown-club", "sk-never-shown-spare"
CROWD = 120
FAR_SECONDS = 3600
KEY_SHOWN = API_KEY[-4:]


def subscription(name: str, secret: str, **rules: Any) -> dict[str, Any]:
    return {"name": name, "mode": "subscription", "secret": secret, "burst": 1.0, **rules}


def window(used: float, resets_in_seconds: float = FAR_SECONDS, capacity_tokens: int = CAPACITY) -> dict[str, Any]:
    return {"capacity_tokens": capacity_tokens, "used": used, "resets_in_seconds": resets_in_seconds}


@dataclass
class Fleet:
    """Two worker processes, and the provider of a subscription named team."""

    simulator: Simulator
    client: Client
    settings: Settings
    workers: list[LocalWorker]
    profile: dict[str, Any] = field(default_factory=dict)

    def submit(self, count: int, **fields: Any) -> list[JobHandle]:
        given = {"task_type": "summarize", "model": HAIKU, "auth_mode": "subscription", "max_tokens": 50, **fields}
        prompt = given.pop("prompt", "a prompt")
        return self.client.submit_many([{"prompt": f"{prompt} {number}", **given} for number in range(count)])

    def quota(self, name: str = "team") -> dict[str, Any]:
        """Return how the subscription stands, having made sure that nobody ever asked too much of it."""
        found: dict[str, Any] = self.simulator.subscriptions()[name]
        assert (found["refused"], found["went_over"]) == (0, 0), found
        return found

    def billed(self) -> dict[tuple[str, str], int]:
        """Return how many calls the invoice has by each key and mode."""
        by_key = self.simulator.invoice(summary=True)["by_key"]
        return {(one["key"].lstrip("…"), one["auth_mode"]): one["count"] for one in by_key}

    def status(self, name: str = "team") -> CredentialStatus:
        credentials = Credentials(self.settings)
        try:
            return next(one for one in credentials.status()["anthropic"] if one.name == name)
        finally:
            credentials.close()

    def begin(self, window: dict[str, Any]) -> None:
        """Have the subscription's window begin now, as it is told here."""
        self.change(subscriptions={TEAM: {"name": "team", "windows": {"5h": window}}})

    def change(self, **profile: Any) -> None:
        self.profile |= profile
        self.simulator.profile = Profile.parse(self.profile)


Start = Callable[..., Fleet]


@pytest.fixture
def start(make_environ: Any, start_worker: Callable[..., LocalWorker]) -> Iterator[Start]:
    """Return a function that starts two workers, and a provider whose windows are what it is told."""
    fleets: list[Fleet] = []

    def make(
        *windows: dict[str, Any], credentials: list[dict[str, Any]] | None = None, latency: float = 0.02, **environ: Any
    ) -> Fleet:
        names = zip((TEAM, CLUB), ("team", "club"), windows, strict=False)
        profile = {
            "api_keys": [API_KEY, SPARE],
            "latency": {"kind": "fixed", "seconds": latency},
            "subscriptions": {token: {"name": name, "windows": {"5h": one}} for token, name, one in names},
        }
        simulator = Simulator(Profile.parse(profile))
        found = make_environ(
            simulator,
            PROVIDERS__ANTHROPIC__CREDENTIALS=json.dumps(credentials or [subscription("team", TEAM)]),
            RETRY__PATIENCE_SECONDS=0.05,
            **environ,
        )
        settings = Settings.load(environ=found)
        workers = [start_worker(found, concurrency=20) for _ in range(2)]
        fleets.append(Fleet(simulator, Client(settings), settings, workers, profile))
        return fleets[-1]

    yield make
    for fleet in fleets:
        for worker in fleet.workers:
            worker.terminate()
        fleet.client.close()
        for worker in fleet.workers:
            worker.stop()
        fleet.simulator.close()


def answered(handles: list[JobHandle]) -> Counter[str | None]:
    """Return how many of the jobs were paid for in each way; each was answered by its first call."""
    results = [handle.result(SOON) for handle in handles]
    assert [result.status for result in results] == [JobStatus.SUCCEEDED] * len(results)
    assert [len(result.attempts) for result in results] == [1] * len(results)
    return Counter(result.auth_mode for result in results)


def reasons(fleet: Fleet, handles: list[JobHandle]) -> set[str]:
    """Return why jobs wait, of those that do."""
    records = fleet.client.records.read([handle.id for handle in handles])
    return {record.reason or "" for record in records if record.status is JobStatus.WAITING}


def test_crowd_goes_by_the_key_where_the_quota_ends(start: Start) -> None:
    """Nobody has told the fleet anything: 95 % are used, and of many jobs a few go by subscription."""
    fleet = start(window(0.95), AUTH__SPILL_TO_API="true")
    modes = answered(fleet.submit(CROWD))
    quota = fleet.quota()
    assert modes["subscription"] == quota["served"] > 0
    assert modes["api"] == CROWD - quota["served"] > 0
    assert fleet.billed() == {("team", "subscription"): modes["subscription"], (KEY_SHOWN, "api"): modes["api"]}
    assert fleet.status().in_flight == 0


def test_crowd_that_may_not_spill_waits_for_the_reset(start: Start, until: Until) -> None:
    """The jobs say why they wait, nothing is paid for by the token, and all are answered when the quota is back."""
    fleet = start(window(0.0))
    fleet.begin(window(0.95, resets_in_seconds=8))
    handles = fleet.submit(40)
    until(lambda: {reason for reason in reasons(fleet, handles) if "is used up" in reason})
    assert fleet.quota()["served"] < 40
    assert answered(handles) == {"subscription": 40}
    assert fleet.billed() == {("team", "subscription"): 40}
    assert fleet.quota()["served"] == 40


def test_what_the_fleet_has_learned_lets_the_crowd_go_side_by_side(start: Start) -> None:
    """From 50 % on it learns what the window holds; then the crowd takes nearly all of it, and no more."""
    fleet = start(window(0.5), AUTH__SPILL_TO_API="true", latency=0.1)
    assert answered(fleet.submit(60, prompt="x" * 200, spill_to_api=False)) == {"subscription": 60}
    learned = fleet.status().windows["5h"].capacity_tokens
    assert learned is not None
    assert 0.5 * CAPACITY < learned <= CAPACITY
    modes = answered(fleet.submit(2 * CROWD))
    quota = fleet.quota()
    assert modes == {"subscription": quota["served"] - 60, "api": 2 * CROWD + 60 - quota["served"]}
    assert quota["windows"]["5h"]["utilization"] > 0.8
    assert fleet.simulator.requests()["max_in_flight"] > 2


def test_job_s_own_word_on_spilling_goes_before_the_setting(start: Start, until: Until) -> None:
    """Each way round; what may not spill waits."""
    fleet = start(window(0.95), AUTH__SPILL_TO_API="true")
    assert fleet.submit(1)[0].result(SOON).auth_mode == "subscription"  # tells the fleet what is left
    own, by_setting = fleet.submit(5, spill_to_api=False), fleet.submit(5)
    assert answered(by_setting) == {"api": 5}
    until(lambda: [handle.status() for handle in own] == [JobStatus.WAITING] * 5)
    assert all("is used up" in reason for reason in reasons(fleet, own))
    assert fleet.billed() == {("team", "subscription"): 1, (KEY_SHOWN, "api"): 5}
    fleet.quota()


@pytest.mark.parametrize(
    ("rules", "most"), [({"keep_free": 0.4}, 0.6), ({"burst": 0.3}, 0.35)], ids=["keep_free", "pace"]
)
def test_share_of_others_and_the_pace_are_kept(start: Start, rules: dict[str, Any], most: float) -> None:
    """The rest goes by the key; with the whole window ahead the pace is what may be used at once."""
    five_hours = 5 * 3600
    fleet = start(
        window(0.2, five_hours, 5000), credentials=[subscription("team", TEAM, **rules)], AUTH__SPILL_TO_API="true"
    )
    assert answered(fleet.submit(12, spill_to_api=False))["subscription"] == 12  # learns
    modes = answered(fleet.submit(CROWD))
    assert modes["api"] > 0
    used = fleet.quota()["windows"]["5h"]["highest_utilization"]
    assert 0.2 < used <= most


def test_call_of_a_killed_worker_holds_the_quota_no_longer_than_its_worker_is_missed(
    start: Start, until: Until
) -> None:
    """It counts as used, so that the fleet goes not over; the job is answered by the other worker."""
    fleet = start(window(0.5), RECOVERY__LEASE_SECONDS=2)
    fleet.submit(1)[0].result(SOON)
    fleet.change(latency={"kind": "fixed", "seconds": SOON})
    [handle] = fleet.submit(1)
    until(lambda: fleet.simulator.requests()["in_flight"] == 1)
    held = fleet.status()
    assert (held.in_flight, held.reserved_tokens > 50) == (1, True)
    [record] = fleet.client.records.read([handle.id])
    fleet.change(latency={"kind": "fixed", "seconds": 0.02})
    [victim] = [
        worker for worker in fleet.workers if worker.process and f":{worker.process.pid}:" in (record.worker or "")
    ]
    assert victim.process is not None
    os.killpg(victim.process.pid, signal.SIGKILL)
    result = handle.result(SOON)
    assert [attempt.outcome for attempt in result.attempts] == ["orphaned", "succeeded"]
    assert {attempt.auth_mode for attempt in result.attempts} == {"subscription"}
    left = fleet.status()
    assert (left.in_flight, left.reserved_tokens) == (0, 0)
    assert fleet.billed() == {("team", "subscription"): 3}
    fleet.quota()


def test_two_subscriptions_share_the_crowd(start: Start) -> None:
    """Neither goes over, and the key is needed only when both are used up."""
    both = [subscription("team", TEAM), subscription("club", CLUB)]
    fleet = start(window(0.5), window(0.5), credentials=both, AUTH__SPILL_TO_API="true")
    assert answered(fleet.submit(60, prompt="x" * 200, spill_to_api=False)) == {"subscription": 60}
    modes = answered(fleet.submit(CROWD))
    served = {name: fleet.quota(name)["served"] for name in ("team", "club")}
    assert min(served.values()) > 15
    assert sum(served.values()) == 60 + modes["subscription"]


def test_refused_key_goes_out_alone_and_comes_back(start: Start, until: Until) -> None:
    """Of two keys one gets a 401: the fleet goes on by the other, shows it, and takes it up after the check."""
    spare = {"name": "spare", "secret": SPARE}
    fleet = start(window(0.5), credentials=[spare], AUTH__RECHECK_SECONDS=3)
    fleet.change(refused_keys=[SPARE])
    results = [handle.result(SOON) for handle in fleet.submit(40, auth_mode="api")]
    assert all(result.succeeded for result in results)
    refused = [attempt for result in results for attempt in result.attempts if attempt.outcome == "failed"]
    assert {(one.credential, one.status) for one in refused} == {("spare", 401)}
    assert set(fleet.billed()) == {(KEY_SHOWN, "api")}
    shown = fleet.status("spare").refused
    assert shown is not None
    assert shown.status == 401
    assert fleet.status("default").refused is None
    fleet.change(refused_keys=[])

    def comes_back() -> bool:
        answered(fleet.submit(4, auth_mode="api"))
        return (SPARE[-4:], "api") in fleet.billed()

    until(comes_back)
    assert fleet.status("spare").refused is None
