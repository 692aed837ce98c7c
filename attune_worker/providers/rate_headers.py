"""What do a response's headers say of the provider's rate limits?

Absent headers are normal, and what cannot be read counts as absent. Sources: Anthropic "Rate limits",
section "Response headers" (RFC 3339 resets); OpenAI "Rate limits in headers" (Go durations), whose names
Azure, Groq, Mistral and others have taken over. The ``anthropic-ratelimit-unified-*`` headers of subscriptions are
not documented; their shape is that of responses: utilization a share of 1 with two decimals (a little over 1 where the
quota is overdrawn), reset in seconds since 1970, status ``allowed``, ``allowed_warning`` or ``rejected``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil

from attune_worker.providers.failures import duration_seconds, http_date

MAX_LIMIT = 10**12
"""Per minute. Nobody is allowed more; a larger number is not a limit."""

WINDOWS = ("5h", "7d")
"""The quota windows of a subscription, by the names that its headers have for them."""

MOST_UTILIZATION = 2.0
"""Up to here a utilization over 1 is an overdrawn quota; beyond, it is no share."""

_SHARE = re.compile(r"\d{1,3}(?:\.\d{1,12})?", re.ASCII)
_EPOCH_SECONDS = re.compile(r"\d{9,11}", re.ASCII)
_STATUS = re.compile(r"[a-z_]{1,32}", re.ASCII)
_COUNT = re.compile(r"\d{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is allowed per minute, what is left of it, and how long until it is all back; None: not said."""

    limit: int | None = None
    remaining: int | None = None
    reset_ms: int | None = None


@dataclass(frozen=True, slots=True)
class QuotaWindow:
    """How much of a subscription's quota is used (0 to 1), and when it is all back (ms since 1970)."""

    name: str
    utilization: float
    reset_ms: int
    status: str | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """The limits of one model, and the quota of a subscription, as the provider told them."""

    requests: Allowance | None = None
    tokens: Allowance | None = None
    windows: tuple[QuotaWindow, ...] = ()


def observed(headers: Mapping[str, str], now: datetime | None = None) -> Observed | None:
    """Return what ``headers`` (names in lower case) say of rate limits; None when they say nothing.

    A reset that is a point in time is compared with the response's own ``date``, so that no clock of
    ours matters, or with ``now`` where there is none. Of Anthropic's limits of input and of output
    tokens the scarcer one counts, unless there is one of both together.
    """
    if not any("ratelimit" in name for name in headers):
        return None
    at = http_date(headers.get("date", "")) or now
    requests = _anthropic(headers, "requests", at) or _openai(headers, "requests")
    tokens = (
        _anthropic(headers, "tokens", at)
        or _scarcer(_anthropic(headers, f"{kind}-tokens", at) for kind in ("input", "output"))
        or _openai(headers, "tokens")
    )
    windows = tuple(window for name in WINDOWS if (window := _window(headers, name)) is not None)
    return Observed(requests, tokens, windows) if requests or tokens or windows else None


def _window(headers: Mapping[str, str], name: str) -> QuotaWindow | None:
    """Return what is said of a quota window; None without a utilization, or without a reset: neither helps alone."""
    used, reset, status = (
        headers.get(f"anthropic-ratelimit-unified-{name}-{field}", "").strip()
        for field in ("utilization", "reset", "status")
    )
    known_status = status if _STATUS.fullmatch(status) else None
    if _SHARE.fullmatch(used) and float(used) <= MOST_UTILIZATION:
        utilization = min(float(used), 1.0)
    elif known_status == "rejected":
        utilization = 1.0
    else:
        return None
    if not _EPOCH_SECONDS.fullmatch(reset):
        return None
    return QuotaWindow(name, utilization, int(reset) * 1000, known_status)


def _anthropic(headers: Mapping[str, str], kind: str, now: datetime | None) -> Allowance | None:
    values = [headers.get(f"anthropic-ratelimit-{kind}-{field}") for field in ("limit", "remaining", "reset")]
    return _allowance(values[0], values[1], _seconds_until(values[2], now))


def _openai(headers: Mapping[str, str], kind: str) -> Allowance | None:
    values = [headers.get(f"x-ratelimit-{field}-{kind}") for field in ("limit", "remaining", "reset")]
    return _allowance(values[0], values[1], duration_seconds(values[2]))


def _allowance(limit_text: str | None, remaining_text: str | None, reset_seconds: float | None) -> Allowance | None:
    limit = _count(limit_text)
    if limit_text is not None and not limit:  # Azure says -1 or 0 where it has no limit to tell of
        return None
    remaining = _count(remaining_text)
    if limit is None and remaining is None:
        return None
    return Allowance(limit, remaining, None if reset_seconds is None else ceil(reset_seconds * 1000))


def _scarcer(allowances: Iterable[Allowance | None]) -> Allowance | None:
    return min((one for one in allowances if one is not None), key=_left, default=None)


def _left(allowance: Allowance) -> tuple[int, int]:
    limit = MAX_LIMIT if allowance.limit is None else allowance.limit
    return (limit if allowance.remaining is None else allowance.remaining), limit


def _count(text: str | None) -> int | None:
    if text is None or not _COUNT.fullmatch(text.strip()):
        return None
    count = int(text)
    return count if count <= MAX_LIMIT else None


def _seconds_until(text: str | None, now: datetime | None) -> float | None:
    if text is None or now is None:
        return None
    try:
        then = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max((then - now).total_seconds(), 0.0)
