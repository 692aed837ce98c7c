"""Which limit has an operator set for a budget of the running fleet? ``store/lua/budget.lua`` goes by it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from attune_worker.errors import ConfigurationError
from attune_worker.jobs import NANO_USD
from attune_worker.store.scripts import Script

BUDGET_SET = Script("budget_set", "values", "budget")

SET_FIELDS = tuple(f"{kind}_{name}" for kind in ("hard", "soft") for name in ("limit", "by", "reason", "ms"))
"""What is kept of it in a budget's hash."""

HIGHEST_USD = 1_000_000
"""As in the settings."""

LONGEST = timedelta(days=3660)
"""How far away the end of a limit can be that is not set for good; as in ``budget.lua``."""

Until = datetime | Literal["window_end", "for_good"]


@dataclass(frozen=True, slots=True)
class SetLimit:
    """A limit that an operator set; ``until`` is None where it holds for good."""

    limit_usd: Decimal
    until: datetime | None
    by: str
    reason: str
    at: datetime | None


def wish(limit_usd: Decimal | None, until: Until, now: datetime) -> dict[str, Any]:
    """Return what ``budget_set`` is told of a limit (None: the configured one) and its end.

    Raises ``ConfigurationError`` for an amount or a time that makes no sense.
    """
    told: dict[str, Any] = {} if limit_usd is None else {"limit_nano": _nano(limit_usd)}
    if until == "for_good":
        return told | {"until_ms": 0}
    if isinstance(until, datetime):
        if not now < until <= now + LONGEST:
            raise ConfigurationError(
                f"until {until.isoformat()}: it should be a time to come, within ten years; "
                f"by Redis' clock it is {now.isoformat(timespec='seconds')}"
            )
        told["until_ms"] = round(until.timestamp() * 1000)
    return told


def set_limit_in(fields: Mapping[str, bytes | None], kind: Literal["hard", "soft"], now: datetime) -> SetLimit | None:
    """Read a budget's fields, as ``budget.lua`` does: what is garbled, or over, is nothing."""
    found = re.fullmatch(rb"([0-9]{1,16}) ([0-9]{1,15})", fields[f"{kind}_limit"] or b"")
    if not found:
        return None
    until = _moment(found[2])
    if int(found[2]) and (until is None or not now < until <= now + LONGEST):
        return None
    by, reason = ((fields[f"{kind}_{name}"] or b"").decode(errors="replace") for name in ("by", "reason"))
    return SetLimit(int(found[1]) * NANO_USD, until, by, reason, _moment(fields[f"{kind}_ms"]))


def _nano(limit_usd: Decimal) -> int:
    if not limit_usd.is_finite() or not 0 <= limit_usd <= HIGHEST_USD or limit_usd % NANO_USD:
        raise ConfigurationError(
            f"a limit of {limit_usd} USD is not allowed; allowed: 0 to {HIGHEST_USD}, with at most 9 decimal places"
        )
    return int(limit_usd / NANO_USD)


def _moment(ms: bytes | None) -> datetime | None:
    """Return a time of Redis' clock; None for 0, and for what nobody of us wrote."""
    try:
        return datetime.fromtimestamp(int(ms or 0) / 1000, UTC) if int(ms or 0) else None
    except (OverflowError, ValueError, OSError):
        return None
