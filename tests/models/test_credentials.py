"""By which key does a call go? Each combination of strategy, the job's wish, what is there, and what may be paid."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from attune_worker.jobs import AuthMode, Job, ModelTier
from attune_worker.models.attempts import attempt_of
from attune_worker.models.auth import AuthStrategy
from attune_worker.models.calls import Outcome
from attune_worker.models.credentials import (
    DEFAULT,
    Credential,
    Wish,
    credentials_of,
    lines_of,
    resolve,
    spread,
    wish_of,
    without_silent_spill,
)
from attune_worker.models.registry import ModelInfo
from attune_worker.models.routing import Candidates
from attune_worker.providers.base import HttpResponse
from attune_worker.providers.failures import failure
from attune_worker.sections import ProviderSettings

API, SUBSCRIPTION = AuthMode.API, AuthMode.SUBSCRIPTION
KEY, TOKEN = Credential("key"), Credential("token", SUBSCRIPTION)

BOTH = (KEY, TOKEN)
TABLE: list[tuple[AuthMode | None, AuthMode, tuple[Credential, ...], bool, tuple[Credential, ...]]] = [
    # wish, recommended, there is, may spill, goes by
    (None, API, (KEY,), False, (KEY,)),
    (None, API, (TOKEN,), False, (TOKEN,)),
    (None, API, BOTH, False, (KEY,)),
    (None, API, BOTH, True, (KEY,)),
    (None, SUBSCRIPTION, (KEY,), False, (KEY,)),
    (None, SUBSCRIPTION, (TOKEN,), False, (TOKEN,)),
    (None, SUBSCRIPTION, BOTH, False, (TOKEN,)),
    (None, SUBSCRIPTION, BOTH, True, (TOKEN, KEY)),
    (None, SUBSCRIPTION, (TOKEN,), True, (TOKEN,)),
    (SUBSCRIPTION, API, (KEY,), False, ()),
    (SUBSCRIPTION, API, (KEY,), True, (KEY,)),
    (SUBSCRIPTION, API, (TOKEN,), False, (TOKEN,)),
    (SUBSCRIPTION, API, BOTH, False, (TOKEN,)),
    (SUBSCRIPTION, API, BOTH, True, (TOKEN, KEY)),
    (API, SUBSCRIPTION, (KEY,), False, (KEY,)),
    (API, SUBSCRIPTION, (TOKEN,), False, ()),
    (API, SUBSCRIPTION, (TOKEN,), True, ()),
    (API, SUBSCRIPTION, BOTH, True, (KEY,)),
]


@pytest.mark.parametrize(("own", "recommended", "present", "spill", "expected"), TABLE)
def test_decision_table(
    own: AuthMode | None,
    recommended: AuthMode,
    present: tuple[Credential, ...],
    spill: bool,
    expected: tuple[Credential, ...],
) -> None:
    """Only credentials that exist, never an API key where a subscription was asked for, unless it may be paid for."""
    found = resolve(present, Wish(own, recommended, spill))
    assert found.credentials == expected
    assert found.constraint
    assert expected or found.constraint.startswith("has no")


def test_a_provider_without_credentials_has_none() -> None:
    """Whatever is wished for."""
    for own in (None, API, SUBSCRIPTION):
        assert resolve((), Wish(own, spill=True)).credentials == ()


def test_load_is_spread_within_a_mode() -> None:
    """Each key comes first about equally often, and a subscription never after the key that it may spill to."""
    draws = iter(range(10**6))
    tokens = tuple(Credential(f"token-{n}", SUBSCRIPTION) for n in range(3))
    keys = tuple(Credential(f"key-{n}") for n in range(3))
    orders = [spread((*tokens, *keys), lambda: (next(draws) * 0.618) % 1) for _ in range(600)]
    assert all(set(order[:3]) == set(tokens) for order in orders)
    for place in (0, 3):
        counts = Counter(order[place] for order in orders)
        assert len(counts) == 3
        assert min(counts.values()) > 100


@pytest.mark.parametrize(
    ("fields", "recommended", "setting", "expected"),
    [
        ({}, API, False, Wish(None, API, False)),
        ({}, SUBSCRIPTION, True, Wish(None, SUBSCRIPTION, True)),
        ({"spill_to_api": False}, SUBSCRIPTION, True, Wish(None, SUBSCRIPTION, False)),
        ({"spill_to_api": True}, SUBSCRIPTION, False, Wish(None, SUBSCRIPTION, True)),
        ({"auth_mode": "auto"}, SUBSCRIPTION, False, Wish(None, SUBSCRIPTION, False)),
        ({"auth_mode": "subscription"}, API, False, Wish(SUBSCRIPTION, API, False)),
        ({"auth_mode": "api"}, SUBSCRIPTION, False, Wish(API, API, False)),
    ],
)
def test_wish_of_a_job(fields: dict[str, Any], recommended: AuthMode, setting: bool, expected: Wish) -> None:
    """Its own fields before the settings, and its own mode before the strategy's."""
    job = Job.parse({"task_type": "summarize", "prompt": "?", **fields})
    assert wish_of(job, AuthStrategy(default_mode=recommended), setting) == expected


@pytest.mark.parametrize(("fields", "lines"), [({"module_lines": 0}, 0), ({"module_lines": 1999}, 1999), ({}, 500)])
def test_strategy_is_asked_for_the_lines_of_a_job(fields: dict[str, Any], lines: int) -> None:
    """Its own word, else what its prompt comes to."""
    job = Job.parse({"task_type": "summarize", "prompt": "x" * 4 * 10 * 500, **fields})
    assert lines_of(job, 10) == lines
    for threshold, mode in [(lines + 1, SUBSCRIPTION), (lines, API)]:
        strategy = AuthStrategy(tokens_per_line=10, small_module_threshold=threshold, medium_module_threshold=threshold)
        assert wish_of(job, strategy, False).recommended is mode


def provider(**fields: Any) -> ProviderSettings:
    return ProviderSettings.model_validate({"kind": "anthropic", "base_url": "http://127.0.0.1", **fields})


def test_credentials_are_those_whose_secrets_are_there() -> None:
    """A variable that is empty or missing is no key; a server that needs none has the default credential."""
    environ = {"A": "key-a", "EMPTY": " "}
    team = {"name": "team", "mode": "subscription", "secret": "env:A"}
    gone = {"name": "gone", "secret": "env:EMPTY"}
    found = provider(api_key="env:NOT_SET", credentials=[team, gone])
    assert credentials_of(found, environ) == (Credential("team", SUBSCRIPTION),)
    assert found.keys(environ) == {"team": "key-a"}
    assert credentials_of(provider(api_key="env:A", credentials=[gone]), environ) == (DEFAULT,)
    assert credentials_of(provider(), environ) == (DEFAULT,)
    assert credentials_of(provider(credentials=[gone]), environ) == ()
    assert not provider(credentials=[gone]).usable(environ)


def test_no_bill_at_another_provider_instead_of_a_quota() -> None:
    """Where somebody has a subscription, who has none is left out, with the reason; where nobody has, nobody is."""
    here, there = ModelInfo("m", "here", ModelTier.CHEAP), ModelInfo("m", "there", ModelTier.CHEAP)
    found = Candidates((there, here), ())
    left = without_silent_spill(found, {"here": BOTH, "there": (KEY,)})
    assert left.models == (here,)
    [(model, reason)] = left.dropped
    assert model == there
    assert "spill_to_api is off" in reason
    assert without_silent_spill(found, {"here": (KEY,), "there": (KEY,)}) == found


@pytest.mark.parametrize(
    ("status", "body", "refused"),
    [
        (401, b"", True),
        (402, b"", True),
        (403, b'{"error": {"type": "permission_error"}}', True),
        (403, b"<html>Attention Required!</html>", False),
        (407, b"", False),
        (
            429,
            b'{"error": {"type": "rate_limit_error", "details": {"error_code": "enforced_spend_limit_reached"}}}',
            True,
        ),
        (429, b"", False),
        (529, b"", False),
    ],
)
def test_only_a_provider_refuses_a_key(status: int, body: bytes, *, refused: bool) -> None:
    """A firewall on the way that does not like one prompt takes the key from nobody else's."""
    error = failure(HttpResponse(status, {}, body))
    attempt = attempt_of(ModelInfo("haiku", "anthropic", ModelTier.CHEAP), KEY, error, 10)
    assert Outcome.of(error, attempt, None).refused is refused
