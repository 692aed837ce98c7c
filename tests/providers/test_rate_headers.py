"""Are the limits that providers tell of in their headers read as they mean them, and nothing else?"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.providers.rate_headers import Allowance, Observed, QuotaWindow, observed

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
DATE = "Mon, 23 Nov 2026 12:00:00 GMT"


def anthropic(kind: str, limit: object, remaining: object, reset: str) -> dict[str, str]:
    prefix = f"anthropic-ratelimit-{kind}"
    return {f"{prefix}-limit": str(limit), f"{prefix}-remaining": str(remaining), f"{prefix}-reset": reset}


def openai(kind: str, limit: object, remaining: object, reset: str) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(limit),
        f"x-ratelimit-remaining-{kind}": str(remaining),
        f"x-ratelimit-reset-{kind}": reset,
    }


def test_anthropic_resets_count_from_the_date_of_the_response() -> None:
    """The provider's own clock is the one that its resets are in, however wrong ours may be."""
    headers = {
        "date": DATE,
        **anthropic("requests", 4000, 3999, "2026-11-23T12:00:01Z"),
        **anthropic("tokens", 480000, 0, "2026-11-23T12:00:30+00:00"),
    }
    expected = Observed(Allowance(4000, 3999, 1000), Allowance(480_000, 0, 30_000))
    assert observed(headers) == expected
    assert observed(headers, NOW.replace(hour=3)) == expected


def test_without_a_date_the_given_time_counts() -> None:
    """Some gateways drop the date."""
    headers = anthropic("requests", 50, 0, "2026-11-23T12:00:07Z")
    assert observed(headers, NOW) == Observed(requests=Allowance(50, 0, 7000))
    assert observed(headers) == Observed(requests=Allowance(50, 0, None))


def test_reset_that_has_passed_is_now() -> None:
    """A negative wait would be taken for none at all."""
    headers = anthropic("requests", 50, 0, "2026-11-23T11:59:07Z")
    assert observed(headers, NOW) == Observed(requests=Allowance(50, 0, 0))


@pytest.mark.parametrize(("input_left", "output_left", "limit"), [(10, 500, 1000), (500, 10, 200)])
def test_scarcer_of_input_and_output_tokens_counts(input_left: int, output_left: int, limit: int) -> None:
    """Where there is no limit of both together, the call needs both."""
    headers = {
        **anthropic("input-tokens", 1000, input_left, "2026-11-23T12:00:01Z"),
        **anthropic("output-tokens", 200, output_left, "2026-11-23T12:00:02Z"),
    }
    seen = observed(headers, NOW)
    assert seen is not None
    assert seen.tokens is not None
    assert (seen.tokens.limit, seen.tokens.remaining) == (limit, 10)


def test_limit_of_all_tokens_comes_before_the_parts() -> None:
    """Anthropic's tokens header already is the most restrictive limit in effect."""
    headers = {
        **anthropic("tokens", 900, 800, "2026-11-23T12:00:01Z"),
        **anthropic("input-tokens", 1000, 1, "2026-11-23T12:00:01Z"),
    }
    assert observed(headers, NOW) == Observed(tokens=Allowance(900, 800, 1000))


@pytest.mark.parametrize(("reset", "milliseconds"), [("1s", 1000), ("6m0s", 360_000), ("12ms", 12), ("0.0001s", 1)])
def test_openai_resets_are_durations(reset: str, milliseconds: int) -> None:
    """Go's way of writing them, rounded up to whole milliseconds."""
    headers = {**openai("requests", 60, 59, reset), **openai("tokens", 150_000, 149_984, reset)}
    expected = Observed(Allowance(60, 59, milliseconds), Allowance(150_000, 149_984, milliseconds))
    assert observed(headers) == expected


@pytest.mark.parametrize("limit", ["-1", "0", "", "many", "1e9", "9" * 30])
def test_limit_that_is_none_says_nothing(limit: str) -> None:
    """Azure sends -1 and 0 where it has no limit to tell of; what is left of that is not used up."""
    assert observed(openai("requests", limit, 0, "6m0s")) is None
    assert observed(anthropic("tokens", limit, 0, "2026-11-23T12:00:01Z"), NOW) is None


def test_remaining_may_come_alone() -> None:
    """That nothing is left is worth knowing without the limit."""
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2"}
    assert observed(headers) == Observed(tokens=Allowance(None, 0, 2000))


@pytest.mark.parametrize("reset", ["", "soon", "-5s", "2026-13-99T00:00:00Z", "1e9", "99999999h"])
def test_reset_that_cannot_be_read_is_not_known(reset: str) -> None:
    """The rest of the header still counts."""
    assert observed(openai("requests", 60, 0, reset)) == Observed(requests=Allowance(60, 0, None))
    assert observed(anthropic("requests", 60, 0, reset), NOW) == Observed(requests=Allowance(60, 0, None))


def test_most_responses_say_nothing() -> None:
    """Absent headers are normal."""
    assert observed({"content-type": "application/json", "date": DATE}) is None


NAMES = [*anthropic("requests", 1, 1, ""), *anthropic("input-tokens", 1, 1, ""), *openai("tokens", 1, 1, ""), "date"]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=40) | st.integers().map(str)))
def test_no_header_makes_it_fail_or_go_below_zero(headers: dict[str, str]) -> None:
    """Headers come from whatever server base_url points at."""
    seen = observed(headers, NOW)
    for allowance in (seen.requests, seen.tokens) if seen else ():
        if allowance is not None:
            assert allowance.limit is None or allowance.limit > 0
            assert min(allowance.remaining or 0, allowance.reset_ms or 0) >= 0


def unified(name: str, **fields: str) -> dict[str, str]:
    return {f"anthropic-ratelimit-unified-{name}-{field}": text for field, text in fields.items()}


def test_quota_windows_of_a_subscription_are_read() -> None:
    """As responses have them: a share with two decimals, and seconds since 1970; what is no window is passed over."""
    headers = {
        **unified("5h", utilization="0.42", reset="1795440000", status="allowed_warning"),
        **unified("7d", utilization="0.18", reset="1795800000", status="allowed"),
        **unified("overage", status="rejected", utilization="0.9", reset="1795440000"),
        "anthropic-ratelimit-unified-status": "allowed",
        "anthropic-ratelimit-unified-representative-claim": "five_hour",
    }
    assert observed(headers) == Observed(
        windows=(
            QuotaWindow("5h", 0.42, 1_795_440_000_000, "allowed_warning"),
            QuotaWindow("7d", 0.18, 1_795_800_000_000, "allowed"),
        )
    )


@pytest.mark.parametrize(
    ("fields", "utilization"),
    [
        ({"utilization": "1.04", "reset": "1795440000", "status": "rejected"}, 1.0),
        ({"reset": "1795440000", "status": "rejected"}, 1.0),
        ({"utilization": "0", "reset": "1795440000"}, 0.0),
        ({"utilization": "42", "reset": "1795440000"}, None),
        ({"utilization": "-0.1", "reset": "1795440000"}, None),
        ({"utilization": "nan", "reset": "1795440000"}, None),
        ({"utilization": "1e-1", "reset": "1795440000"}, None),
        ({"utilization": "0.4", "reset": "soon"}, None),
        ({"utilization": "0.4", "reset": "9" * 40}, None),
        ({"utilization": "0.4"}, None),
        ({"reset": "1795440000", "status": "allowed"}, None),
    ],
)
def test_absurd_quota_counts_as_absent(fields: dict[str, str], utilization: float | None) -> None:
    """But for a quota that is overdrawn, or refused without a number: both are used up."""
    found = observed(unified("5h", **fields))
    assert (found.windows[0].utilization if found else None) == utilization


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_any_quota_headers_are_read_without_an_error(utilization: str, reset: str, status: str) -> None:
    """And what is read is within bounds."""
    found = observed(unified("7d", utilization=utilization, reset=reset, status=status))
    assert found is None or all(0 <= window.utilization <= 1 for window in found.windows)
