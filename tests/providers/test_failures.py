"""Is every documented failure given the class, the wait and the words that the rest of the worker relies on?"""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import (
    BadRequestError,
    ContextTooLongError,
    CredentialError,
    MalformedAnswerError,
    OverloadedError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitedError,
)
from attune_worker.providers.base import HttpResponse
from attune_worker.providers.failures import duration_seconds, failure, retry_after_seconds

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def refused(status: int, body: object = b"", **headers: str) -> HttpResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpResponse(status, {name.replace("_", "-"): value for name, value in headers.items()}, raw)


def anthropic(kind: str, message: str = "as documented", **details: object) -> dict[str, object]:
    error: dict[str, object] = {"type": kind, "message": message}
    if details:
        error["details"] = details
    return {"type": "error", "error": error, "request_id": "req_in_body"}


def openai(code: str | None, kind: str = "invalid_request_error", message: str = "as documented") -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def google(code: int, status: str, *details: dict[str, object]) -> list[object]:
    return [{"error": {"code": code, "message": "as documented", "status": status, "details": list(details)}}]


ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo"
RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
MODERATION = {"reasons": ["violence"], "flagged_input": "…", "provider_name": "x", "model_slug": "y"}
IN_FLIGHT = {"limit_source": "openrouter_in_flight_budget"}


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        # Anthropic "Errors"
        (400, anthropic("invalid_request_error"), BadRequestError, "invalid_request_error"),
        (401, anthropic("authentication_error"), CredentialError, "authentication_error"),
        (402, anthropic("billing_error"), CredentialError, "billing_error"),
        (403, anthropic("permission_error"), CredentialError, "permission_error"),
        (404, anthropic("not_found_error"), BadRequestError, "not_found_error"),
        (409, anthropic("conflict_error"), OverloadedError, "conflict_error"),
        (413, anthropic("request_too_large"), ContextTooLongError, "request_too_large"),
        (429, anthropic("rate_limit_error"), RateLimitedError, "rate_limit_error"),
        (
            429,
            anthropic("rate_limit_error", error_code="enforced_spend_limit_reached"),
            CredentialError,
            "enforced_spend_limit_reached",
        ),
        (500, anthropic("api_error"), OverloadedError, "api_error"),
        (504, anthropic("timeout_error"), OverloadedError, "timeout_error"),
        (529, anthropic("overloaded_error"), OverloadedError, "overloaded_error"),
        # OpenAI "Error codes", and "Troubleshooting API rate limits and 429 errors"
        (400, openai("context_length_exceeded"), ContextTooLongError, "context_length_exceeded"),
        (400, openai("unsupported_value"), BadRequestError, "unsupported_value"),
        (401, openai("invalid_api_key"), CredentialError, "invalid_api_key"),
        (403, openai("unsupported_country_region_territory"), CredentialError, "unsupported_country_region_territory"),
        (404, openai("model_not_found"), BadRequestError, "model_not_found"),
        (422, openai(None), BadRequestError, "invalid_request_error"),
        (429, openai("rate_limit_exceeded", "tokens"), RateLimitedError, "rate_limit_exceeded"),
        (429, openai("insufficient_quota", "insufficient_quota"), CredentialError, "insufficient_quota"),
        (429, openai("credit_balance_exhausted", "insufficient_quota"), CredentialError, "credit_balance_exhausted"),
        (429, openai("a_limit_of_next_year", "insufficient_quota"), CredentialError, "a_limit_of_next_year"),
        (500, openai(None, "server_error"), OverloadedError, "server_error"),
        (503, openai(None, "server_error"), OverloadedError, "server_error"),
        # Google "Gemini API troubleshooting"; its compatible endpoint wraps the error in a list
        (400, google(400, "INVALID_ARGUMENT"), BadRequestError, "INVALID_ARGUMENT"),
        (
            400,
            google(400, "INVALID_ARGUMENT", {"@type": ERROR_INFO, "reason": "API_KEY_INVALID"}),
            CredentialError,
            "API_KEY_INVALID",
        ),
        (400, google(400, "FAILED_PRECONDITION"), CredentialError, "FAILED_PRECONDITION"),
        (429, google(429, "RESOURCE_EXHAUSTED"), RateLimitedError, "RESOURCE_EXHAUSTED"),
        (503, google(503, "UNAVAILABLE"), OverloadedError, "UNAVAILABLE"),
        # OpenRouter "Errors": codes are numbers, what matters is in the metadata
        (402, {"error": {"code": 402, "message": "no credits"}}, CredentialError, None),
        (
            402,
            {"error": {"code": 402, "message": "wait", "metadata": IN_FLIGHT}},
            RateLimitedError,
            "openrouter_in_flight_budget",
        ),
        (403, {"error": {"code": 403, "message": "flagged", "metadata": MODERATION}}, BadRequestError, None),
        # llama.cpp's server, vLLM of old and new, Ollama, Mistral
        (
            400,
            {"error": {"code": 400, "message": "long", "type": "exceed_context_size_error", "n_ctx": 256}},
            ContextTooLongError,
            "exceed_context_size_error",
        ),
        (
            400,
            {"object": "error", "message": "bad", "type": "BadRequestError", "code": 400},
            BadRequestError,
            "BadRequestError",
        ),
        (404, {"error": "model not found"}, BadRequestError, None),
        (
            422,
            {"object": "error", "message": {"detail": []}, "type": "invalid_request_error", "code": "3001"},
            BadRequestError,
            "invalid_request_error",
        ),
    ],
)
def test_documented_failures_have_their_class(
    status: int, body: object, kind: type[ProviderError], code: str | None
) -> None:
    """Status and code, in the shape each provider documents, decide the class; the code is handed on."""
    error = failure(refused(status, body))
    assert type(error) is kind
    assert (error.status, error.code) == (status, code)


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b"\xff\xff", b"[]", b"null", b"[" * 9_999, b" " * 2**21])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, MalformedAnswerError),
        (400, BadRequestError),
        (401, CredentialError),
        (407, CredentialError),
        (408, ProviderTimeoutError),
        (418, BadRequestError),
        (425, OverloadedError),
        (429, RateLimitedError),
        (502, OverloadedError),
        (520, OverloadedError),
        (529, OverloadedError),
    ],
)
def test_the_status_is_enough(status: int, kind: type[ProviderError], body: bytes) -> None:
    """A proxy's page, an empty or a huge body in place of an error leaves the class to the status."""
    error = failure(refused(status, body))
    assert type(error) is kind
    assert error.code is None


def test_words_never_decide() -> None:
    """A message that talks of other failures changes nothing about the class."""
    talk = "insufficient_quota 401 rate limit context_length_exceeded overloaded"
    assert type(failure(refused(400, anthropic("invalid_request_error", talk)))) is BadRequestError
    assert type(failure(refused(429, openai("rate_limit_exceeded", "tokens", talk)))) is RateLimitedError


def test_the_message_is_ours_with_the_providers_words_behind() -> None:
    """Status, code and the provider's explanation are there to be read in a log line."""
    error = failure(refused(404, anthropic("not_found_error", "model: claude-nope")))
    assert str(error) == "the provider refused the request (status 404, not_found_error): model: claude-nope"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, openai("invalid_api_key", message="Incorrect API key provided: sk-proj-abc*****xyz.")),
        (401, openai("sk-proj-abcdef-xyz", message="sk-proj-abc")),
        (403, {"error": "key sk-proj-abc may not"}),
        (400, google(400, "INVALID_ARGUMENT", {"@type": ERROR_INFO, "reason": "API_KEY_INVALID", "key": "sk-proj-"})),
    ],
)
def test_a_refused_key_is_not_quoted(status: int, body: object) -> None:
    """Providers echo parts of a key that they refuse; nothing of it reaches the error."""
    error = failure(refused(status, body))
    assert type(error) is CredentialError
    assert "sk-proj" not in f"{error} {error.code}"


def test_long_and_unprintable_words_are_tamed() -> None:
    """At most 300 characters of the provider's message, and none that a terminal would act upon."""
    error = failure(refused(400, openai("bad", message="a\x1b[31m\r\n\u202eb\x00" + "x" * 10_000)))
    words = str(error).partition(": ")[2]
    assert words.startswith("a [31m b xxx")
    assert len(words) == 300
    assert str(error).isprintable()


def test_request_ids_are_found_in_headers_and_body() -> None:
    """Each provider's header is read, and Anthropic's body where a proxy dropped the header."""
    assert failure(refused(500, b"", request_id="req_a")).request_id == "req_a"
    assert failure(refused(500, b"", x_request_id="req_o")).request_id == "req_o"
    assert failure(refused(500, anthropic("api_error"))).request_id == "req_in_body"
    assert failure(refused(500, b"", request_id="x" * 10_000)).request_id is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": " 0.25 "}, 0.25),
        ({"retry_after": "0"}, 0.0),
        ({"retry_after_ms": "1500", "retry_after": "9"}, 1.5),
        ({"retry_after_ms": "900000"}, 900.0),
        ({"retry_after_ms": "soon", "retry_after": "9"}, 9.0),
        ({"retry_after": "Fri, 20 Nov 2026 12:00:30 GMT", "date": "Fri, 20 Nov 2026 12:00:00 GMT"}, 30.0),
        ({"retry_after": "Fri, 20 Nov 2026 12:00:30 GMT"}, None),
        ({"retry_after": "Fri, 20 Nov 2026 11:00:00 GMT", "date": "Fri, 20 Nov 2026 12:00:00 GMT"}, None),
        ({"retry_after": "Fri, 20 Nov 2099 12:00:00 GMT", "date": "Fri, 20 Nov 2026 12:00:00 GMT"}, None),
        ({"retry_after": "Fri, 99 Nov 2026 99:99:99 +9999999999", "date": "never"}, None),
        *(
            ({"retry_after": odd}, None)
            for odd in ("-1", "nan", "inf", "1e3", "1_0", "٣", "", "99999999999", "9" * 999)
        ),
        # "Rate limits" of OpenAI: Go durations; only a limit that is used up says how long to wait
        ({"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "12ms"}, 0.012),
        ({"x_ratelimit_remaining_requests": "59", "x_ratelimit_reset_requests": "1s"}, None),
        (
            {
                "x_ratelimit_remaining_requests": "0",
                "x_ratelimit_reset_requests": "1s",
                "x_ratelimit_remaining_tokens": "0",
                "x_ratelimit_reset_tokens": "6m0s",
            },
            360.0,
        ),
        ({"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "-1"}, None),
        ({"retry_after": "3", "x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "6m0s"}, 3.0),
    ],
)
def test_the_wait_is_read_from_headers(headers: dict[str, str], seconds: float | None) -> None:
    """Every documented spelling is understood, and what cannot be true counts as not given."""
    assert failure(refused(429, b"", **headers)).retry_after == seconds


def test_a_date_can_be_compared_with_a_given_now() -> None:
    """A caller who knows the time needs no Date header."""
    headers = {"retry-after": "Fri, 20 Nov 2026 12:01:00 GMT"}
    assert retry_after_seconds(headers, {}, now=NOW) == 60.0


@pytest.mark.parametrize(("delay", "seconds"), [("59s", 59.0), ("1.5s", 1.5), ("-3s", None), (7, None), (None, None)])
def test_googles_wait_is_read_from_the_body(delay: object, seconds: float | None) -> None:
    """Google sends no headers about limits; its RetryInfo is in the error's details."""
    body = google(429, "RESOURCE_EXHAUSTED", {"@type": RETRY_INFO, "retryDelay": delay})
    assert failure(refused(429, body)).retry_after == seconds


def test_an_outage_may_say_how_long_it_lasts_but_limits_do_not_speak_for_it() -> None:
    """Retry-After counts for any failure; a used-up rate limit says nothing about a 503."""
    assert failure(refused(503, b"", retry_after="20")).retry_after == 20.0
    used_up = {"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "6m0s"}
    assert failure(refused(503, b"", **used_up)).retry_after is None


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_go_durations_add_up(hours: int, minutes: int, seconds: int, milliseconds: int) -> None:
    """A duration of all its units is the sum of them."""
    expected = hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    assert duration_seconds(f"{hours}h{minutes}m{seconds}s{milliseconds}ms") == pytest.approx(expected)


NAMES = ["error", "message", "type", "code", "details", "metadata", "reason", "retryDelay", "status", "request_id"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=5),
    max_leaves=25,
)
HEADERS = st.dictionaries(
    st.sampled_from(["retry_after", "retry_after_ms", "date", "request_id", "x_ratelimit_reset_tokens"]), st.text()
)


@given(st.integers(100, 999), st.binary(max_size=200) | JSON, HEADERS)
def test_a_failure_always_has_a_name(status: int, body: object, headers: dict[str, str]) -> None:
    """Whatever arrives, failure returns an error whose message can be printed and stored, and a sane wait."""
    error = failure(refused(status, body, **headers))
    assert str(error).isprintable()
    assert len(str(error)) < 600
    assert error.retry_after is None or 0 <= error.retry_after <= 7 * 86_400
