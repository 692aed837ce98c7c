"""By what does a job's call go? Plan, size, mode, preference, credentials, quota and spill, against what ADMIT says.

What is expected is written here by hand, in two small tables; nothing of it is asked of the code.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from attune_worker.credentials import Credentials
from attune_worker.jobs import AuthMode, Job
from attune_worker.models.admission import Admission
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.calls import Outcome, Permit, Quote, Refusal, Request
from attune_worker.models.credentials import Credential, credentials_of, resolve, wish_of
from attune_worker.models.registry import Registry
from attune_worker.providers.rate_headers import observed
from attune_worker.settings import Settings
from tests.conftest import Environ

ENVIRON = {"KEY": "sk-test-key-never-shown", "TOKEN": "sk-test-token-never-shown"}
CREDENTIALS = {"none": (), "key": ("KEY",), "subscription": ("TOKEN",), "both": ("KEY", "TOKEN")}
PLANS = ("free", "pro", "max", "enterprise", "api_only")
MODES = ("auto", "subscription", "api")
SIZES = (0, 499, 500, 1999, 2000, 100_000)

S, A = "subscription", "api"
BY_SIZE = {
    # lines: (prefer_subscription, not), of a plan that has a subscription
    0: (S, S),
    499: (S, S),
    500: (S, A),
    1999: (S, A),
    2000: (A, A),
    100_000: (A, A),
}

REFUSED = "waits: its provider does not accept this key at the moment; it is tried again from time to time"
USED_UP = "waits: the subscription's quota is used up"
PACED = "waits: the subscription's quota is spread evenly until it is back"
GOES_BY = {
    # (credentials, recommended): quota free, used up, paced; the key refused; the token refused
    ("none", S): ("nothing",) * 5,
    ("none", A): ("nothing",) * 5,
    ("key", S): ("KEY", "KEY", "KEY", REFUSED, "KEY"),
    ("key", A): ("KEY", "KEY", "KEY", REFUSED, "KEY"),
    ("subscription", S): ("TOKEN", USED_UP, PACED, "TOKEN", REFUSED),
    ("subscription", A): ("TOKEN", USED_UP, PACED, "TOKEN", REFUSED),
    ("both", S): ("TOKEN", USED_UP, PACED, "TOKEN", REFUSED),
    ("both", A): ("KEY", "KEY", "KEY", REFUSED, "KEY"),
}
SPILLED = ("TOKEN", "KEY", "KEY", "TOKEN", "KEY")
"""Of both, where a subscription is recommended and may spill."""

STATES = ("free", "used up", "paced", "key refused", "token refused")


def recommended(plan: str, mode: str, lines: int, *, prefer: bool) -> str:
    """What the table says of a strategy; an explicit mode wins, and some plans have no subscription."""
    if mode != "auto":
        return mode
    return A if plan in {"free", "api_only"} else BY_SIZE[lines][0 if prefer else 1]


def answered(utilization: float, status: str = "allowed") -> Outcome:
    """An answer with the headers of a window of five hours that has just begun."""
    prefix = "anthropic-ratelimit-unified-5h"
    told = {f"{prefix}-status": status, f"{prefix}-utilization": str(utilization)}
    headers = {**told, f"{prefix}-reset": str(int(time.time()) + 5 * 3600)}
    return Outcome("succeeded", "success", 120, Decimal(0), 10, 0, observed=observed(headers, datetime.now(UTC)))


REFUSAL = Outcome("failed", "ignored", 30, Decimal(0), 0, error="credential", status=401, refused=True)
TOLD: Mapping[str, tuple[tuple[str, Outcome], ...]] = {
    "free": (("TOKEN", answered(0.1)),),
    "used up": (("TOKEN", answered(1.0, "rejected")),),
    "paced": (("TOKEN", answered(0.5)),),
    "key refused": (("TOKEN", answered(0.1)), ("KEY", REFUSAL)),
    "token refused": (("TOKEN", REFUSAL),),
}
"""The calls by which the fleet comes into a state, and how they ended."""


class Fleet:
    """A fleet with a key and a subscription, and one process that asks leave."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._admission = Admission(settings)
        [self._model, *_] = Registry.from_settings(settings).find("anthropic/claude-haiku-5-5")

    def there(self, names: str) -> tuple[Credential, ...]:
        """Those of the credentials whose secrets are in the environment."""
        environ = {name: ENVIRON[name] for name in CREDENTIALS[names]}
        return credentials_of(self.settings.providers["anthropic"], environ)

    def call(self, job: Job, credentials: tuple[Credential, ...], outcome: Outcome) -> str:
        """Ask leave, end the call so, and return by which credential it went, or why it waits."""
        quotes = tuple(Quote(self._model, 1000, Decimal(0), one) for one in credentials)
        verdict = self._admission.admit(Request(uuid4().hex, "", job, quotes))
        if isinstance(verdict, Refusal):
            return f"waits: {verdict.reason.partition(': ')[2]}"
        assert isinstance(verdict, Permit)
        self._admission.settle(verdict, outcome)
        return verdict.credential.name

    def close(self) -> None:
        self._admission.close()


@pytest.fixture
def in_state(make_environ: Environ, simulator: Any) -> Iterator[Callable[[str], Fleet]]:
    """Return a function that makes a fleet whose calls have met with a state."""
    fleets: list[Fleet] = []

    def make(state: str) -> Fleet:
        loaded = Settings.load(environ=make_environ(simulator)).model_dump()
        credentials = [
            {"name": "KEY", "secret": "env:KEY"},
            {"name": "TOKEN", "mode": "subscription", "secret": "env:TOKEN"},
        ]
        loaded["providers"]["anthropic"] |= {"api_key": None, "credentials": credentials}
        fleet = Fleet(Settings.model_validate(loaded))
        fleets.append(fleet)
        names = {one.name: one for one in fleet.there("both")}
        for name, outcome in TOLD[state]:
            assert fleet.call(asked(0), (names[name],), outcome) == name
        return fleet

    yield make
    for fleet in fleets:
        fleet.close()


def asked(lines: int, *, spill: bool = False) -> Job:
    return Job.parse({"task_type": "summarize", "prompt": "?", "module_lines": lines, "spill_to_api": spill})


STRATEGIES = list(itertools.product(PLANS, MODES, (True, False)))


@pytest.mark.parametrize("plan", PLANS)
def test_recommended_mode_is_that_of_the_table(plan: str) -> None:
    """At the borders, just below them, and far from them; never AUTO."""
    for mode, prefer, lines in itertools.product(MODES, (True, False), SIZES):
        strategy = AuthStrategy(subscription_tier=plan, default_mode=mode, prefer_subscription=prefer)
        expected = recommended(plan, mode, lines, prefer=prefer)
        assert strategy.get_recommended_mode(lines) == expected, (plan, mode, prefer, lines)


@pytest.mark.parametrize("spill", [False, True], ids=["waits", "spills"])
@pytest.mark.parametrize("state", STATES)
def test_call_goes_by_what_the_table_says(in_state: Callable[[str], Fleet], state: str, spill: bool) -> None:
    """Every strategy, size and set of credentials, each asked of ADMIT as a worker would ask."""
    fleet = in_state(state)
    place = STATES.index(state)
    wrong = []
    for (plan, mode, prefer), lines, there in itertools.product(STRATEGIES, SIZES[1:-1], CREDENTIALS):
        strategy = AuthStrategy(subscription_tier=plan, default_mode=mode, prefer_subscription=prefer)
        job = asked(lines, spill=spill)
        found = resolve(fleet.there(there), wish_of(job, strategy, False)).credentials
        went = fleet.call(job, found, Outcome.released()) if found else "nothing"
        wanted = recommended(plan, mode, lines, prefer=prefer)
        expected = SPILLED[place] if spill and (there, wanted) == ("both", S) else GOES_BY[there, wanted][place]
        if went != expected:
            wrong.append(f"{plan}, {mode}, prefer {prefer}, {lines} lines, {there}: {went}; expected {expected}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("own", ["api", "subscription"])
@pytest.mark.parametrize("state", STATES)
def test_own_wish_of_a_job_wins_over_every_strategy(in_state: Callable[[str], Fleet], state: str, own: str) -> None:
    """And is never met by the other mode: where there is no credential for it there is no call."""
    fleet = in_state(state)
    place = STATES.index(state)
    of_mode = {"api": ("key", A), "subscription": ("subscription", S)}[own]
    for mode, there in itertools.product(MODES, CREDENTIALS):
        strategy = AuthStrategy(default_mode=mode)
        job = asked(1000).model_copy(update={"auth_mode": AuthMode(own)})
        found = resolve(fleet.there(there), wish_of(job, strategy, False)).credentials
        went = fleet.call(job, found, Outcome.released()) if found else "nothing"
        assert went == (GOES_BY[of_mode][place] if there in (of_mode[0], "both") else "nothing"), (mode, there)


@pytest.mark.parametrize(
    ("state", "held"),
    [
        ("free", {}),
        ("used up", {"TOKEN": "quota_used_up"}),
        ("paced", {"TOKEN": "quota_paced"}),
        ("key refused", {"KEY": "credential_refused"}),
        ("token refused", {"TOKEN": "credential_refused"}),
    ],
)
def test_status_says_what_admit_says(in_state: Callable[[str], Fleet], state: str, held: dict[str, str]) -> None:
    """An operator sees why a call would wait before one does."""
    found = Credentials(in_state(state).settings, environ=ENVIRON).status()["anthropic"]
    assert {one.name: one.held.reason for one in found if one.held is not None} == held
    assert all(one.held.until > datetime.now(UTC) for one in found if one.held is not None)
    assert {one.name for one in found if one.refused} == {name for name in held if "refused" in held[name]}
