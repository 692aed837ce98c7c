"""Which error does a response that is no answer stand for, and how long does the provider ask us to wait?

The class follows from the status and from the provider's own codes, never from the text of a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

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
from attune_worker.providers import wire
from attune_worker.providers.base import HttpResponse

MAX_BODY_BYTES = 2**20
"""A longer error body is not read: no provider sends one, and it would cost more than it could tell."""

MAX_MESSAGE_CHARACTERS = 300

MAX_WAIT_SECONDS = 7 * 86_400.0
"""Longest wait that is believed: the longest quota window of any provider is a week."""

CODES: Mapping[str, type[ProviderError]] = {
    # OpenAI help centre, "Troubleshooting API rate limits and 429 errors": waiting restores none of these
    "insufficient_quota": CredentialError,
    "credit_balance_exhausted": CredentialError,
    "organization_usage_limit_exceeded": CredentialError,
    "organization_spend_limit_exceeded": CredentialError,
    "project_spend_limit_exceeded": CredentialError,
    "billing_hard_limit_reached": CredentialError,
    "billing_not_active": CredentialError,
    # Anthropic "Errors": a 429 without Retry-After that lasts until the month ends
    "enforced_spend_limit_reached": CredentialError,
    # Google "Gemini API troubleshooting": both come with 400, the second where billing is off
    "API_KEY_INVALID": CredentialError,
    "FAILED_PRECONDITION": CredentialError,
    # OpenRouter "Errors": a 402 that passes as soon as running calls are settled
    "openrouter_in_flight_budget": RateLimitedError,
    # OpenAI and most who speak its format; llama.cpp's server; Anthropic's limit in bytes
    "context_length_exceeded": ContextTooLongError,
    "exceed_context_size_error": ContextTooLongError,
    "request_too_large": ContextTooLongError,
}
"""Codes that say more than the status they come with, by the name that the provider gives them."""

STATUSES: Mapping[int, type[ProviderError]] = {
    401: CredentialError,
    402: CredentialError,
    403: CredentialError,
    407: CredentialError,
    408: ProviderTimeoutError,
    409: OverloadedError,  # both official SDKs retry it: a lock at the provider timed out
    425: OverloadedError,
    429: RateLimitedError,
}
"""Statuses below 500 that are not simply a bad request."""

SENTENCES: Mapping[type[ProviderError], str] = {
    RateLimitedError: "the provider's rate limit is reached",
    CredentialError: "the provider does not accept this key, or its credit or spend limit is used up",
    OverloadedError: "the provider cannot answer at the moment",
    ProviderTimeoutError: "the provider ran out of time",
    MalformedAnswerError: "the provider sent neither an answer nor an error; does base_url point at its API?",
    BadRequestError: "the provider refused the request",
    ContextTooLongError: "the prompt does not fit this model",
}

# A code is a word. Digits are left out because every provider's keys have some, so that a key that
# a server puts where its code belongs cannot get into a message.
_CODE = re.compile(r"[A-Za-z][A-Za-z_.]{0,63}")
_SECONDS = re.compile(r"\d{1,18}(?:\.\d{1,18})?", re.ASCII)
_GO_PART = r"(\d{1,18}(?:\.\d{1,18})?)(h|ms|m|s|us|µs|ns)"
_GO_DURATION = re.compile(f"(?:{_GO_PART})+", re.ASCII)
_GO_PARTS = re.compile(_GO_PART, re.ASCII)
_UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_LIMIT_KINDS = ("requests", "tokens", "project-tokens")


def failure(response: HttpResponse) -> ProviderError:
    """Return the error that a response other than 2xx stands for; never raises.

    The caller adds ``provider`` and ``model_id``. The message is ours, followed by the provider's own
    words, except for a refused key, whose refusal may quote a part of it.
    """
    error = _error_in(response.body)
    codes = list(_codes(error))
    kind = _classify(response.status, codes, error)
    code = codes[0] if codes else None
    message = f"{SENTENCES[kind]} (status {response.status}{f', {code}' if code else ''})"
    words = "" if kind is CredentialError else _words(error.get("message"))
    return kind(
        f"{message}: {words}" if words else message,
        status=response.status,
        code=code,
        request_id=wire.request_id(response.headers) or wire.label(error.get("request_id")),
        retry_after=retry_after_seconds(response.headers, error, response.status),
    )


def malformed(response: HttpResponse, reason: str) -> MalformedAnswerError:
    """Return the error for a 2xx response that cannot be read, with a ``reason`` in our own words."""
    code = next(_codes(_error_in(response.body)), None)
    return MalformedAnswerError(
        f"the provider's answer cannot be read: {reason} (status {response.status}{f', {code}' if code else ''})",
        status=response.status,
        code=code,
        request_id=wire.request_id(response.headers),
    )


def retry_after_seconds(
    headers: Mapping[str, str], error: Mapping[str, Any], status: int = 429, now: datetime | None = None
) -> float | None:
    """Return how many seconds the provider asks us to wait; None where it does not say.

    In this order: ``retry-after-ms``, ``retry-after`` (seconds, or a date that is compared with
    ``now``, by default the response's own ``date``, so that no clock of ours matters), the
    ``RetryInfo`` of Google's error details, and for a 429 the reset of the limit that is used up.
    Negative and absurd values count as not given.
    """
    asked = headers.get("retry-after", "")
    wait = duration_seconds(f"{headers.get('retry-after-ms', '').strip()}ms")
    if wait is None:
        wait = duration_seconds(asked)
    if wait is None:
        wait = _seconds_until(asked, now or http_date(headers.get("date", "")))
    if wait is None:
        wait = _retry_info(error)
    if wait is None and status == 429:
        wait = _reset_of_used_up_limit(headers)
    return wait


def duration_seconds(text: object) -> float | None:
    """Return a duration in seconds: "1.5", or Go's "6m0s" and "12ms"; None for anything else, or over a week."""
    if not isinstance(text, str) or len(text) > 64:
        return None
    text = text.strip()
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    elif _GO_DURATION.fullmatch(text):
        seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _GO_PARTS.findall(text))
    else:
        return None
    return seconds if seconds <= MAX_WAIT_SECONDS else None


def http_date(text: str) -> datetime | None:
    """Return the moment that a header such as ``date`` names; None for anything else."""
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _classify(status: int, codes: list[str], error: Mapping[str, Any]) -> type[ProviderError]:
    for code in codes:
        if code in CODES:
            return CODES[code]
    if status == 403 and "flagged_input" in _dict(error.get("metadata")):
        return BadRequestError  # OpenRouter's moderation refuses this prompt, not the key
    if status in STATUSES:
        return STATUSES[status]
    if status >= 500:
        return OverloadedError
    if status >= 400:
        return BadRequestError
    # No provider's API redirects, and following one would hand the key to another host. The
    # endpoint is no use as it is configured, so other models are tried and the breaker is told.
    return MalformedAnswerError


def _error_in(body: bytes) -> Mapping[str, Any]:
    """Return the error object of a body, whatever its shape; empty where there is none.

    Known shapes: ``{"error": {…}}``, Google's ``[{"error": {…}}]``, Ollama's ``{"error": "…"}``, and
    the fields at the top, as Mistral and older vLLM have them.
    """
    if len(body) > MAX_BODY_BYTES:
        return {}
    try:
        document = wire.decode(body)
    except wire.UnreadableError:
        return {}
    if isinstance(document, list) and document:
        document = document[0]
    document = _dict(document)
    error = document.get("error", document)
    if isinstance(error, str):
        error = {"message": error}
    return {"request_id": document.get("request_id")} | _dict(error)


def _codes(error: Mapping[str, Any]) -> Iterator[str]:
    """Yield the provider's codes, the most telling first."""
    details = error.get("details")
    yield from _code(_dict(details).get("error_code"))  # Anthropic
    yield from _code(_dict(error.get("metadata")).get("limit_source"))  # OpenRouter
    yield from _code(error.get("code"))  # OpenAI
    if isinstance(details, list):  # Google: google.rpc.ErrorInfo
        for detail in details:
            yield from _code(_dict(detail).get("reason"))
    yield from _code(error.get("type"))
    yield from _code(error.get("status"))


def _code(value: object) -> Iterator[str]:
    if isinstance(value, str) and _CODE.fullmatch(value):
        yield value


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _words(message: object) -> str:
    """Return a provider's message on one line, without what a terminal or a log would act upon."""
    if not isinstance(message, str):
        return ""
    start = message[: 2 * MAX_MESSAGE_CHARACTERS]
    printable = "".join(character if character.isprintable() else " " for character in start)
    return " ".join(printable.split())[:MAX_MESSAGE_CHARACTERS]


def _seconds_until(text: str, now: datetime | None) -> float | None:
    date = http_date(text)
    if date is None or now is None:
        return None
    seconds = (date - now).total_seconds()
    return seconds if 0 <= seconds <= MAX_WAIT_SECONDS else None


def _retry_info(error: Mapping[str, Any]) -> float | None:
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        wait = duration_seconds(_dict(detail).get("retryDelay"))
        if wait is not None:
            return wait
    return None


def _reset_of_used_up_limit(headers: Mapping[str, str]) -> float | None:
    used_up = (kind for kind in _LIMIT_KINDS if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0")
    resets = [duration_seconds(headers.get(f"x-ratelimit-reset-{kind}")) for kind in used_up]
    return max((reset for reset in resets if reset is not None), default=None)
