"""What does the ledger say of one call? Read as SETTLE has written it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Self

from attune_worker.budget import usd_of
from attune_worker.sections import DEFAULT_CREDENTIAL

OUTCOMES = ("succeeded", "failed", "orphaned", "released")

_TEXTS = ("call", "job", "workflow", "stage", "provider", "model", "tier", "mode")
_COUNTS = (
    *("cost_nano", "estimate_nano", "expected_nano", "input", "output", "cache_read", "cache_write"),
    *("latency_ms", "status"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRecord:
    """One call to a provider and what it cost; no prompt, no answer, no user.

    ``outcome``: succeeded; failed; orphaned (its worker died before it said what the call did); released (a call
    taken for orphaned was never made). ``cost_usd`` is None where it is not known; then ``estimate_usd``, the most
    that the call could cost (None: no price is known), is what budgets count. ``expected_usd`` is what it should have
    cost, going by the calls before it. ``time`` is when the call was admitted,
    ``written`` when the record was. ``corrects_orphan``: it takes the place of an earlier record of the same call.
    ``request_id`` is the provider's, ``status`` that of the HTTP answer of a call that failed. ``mode`` says how the
    call was paid for, ``credential`` by which of the provider's keys: by subscription it cost 0.
    """

    call_id: str
    job_id: str
    tenant: str | None
    workflow: str
    stage: str
    provider: str
    model_id: str
    tier: str
    mode: str
    credential: str = DEFAULT_CREDENTIAL
    outcome: str
    error: str | None
    cost_usd: Decimal | None
    estimate_usd: Decimal | None
    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None
    cache_write_tokens: int | None
    latency_ms: int | None
    status: int | None
    request_id: str | None
    time: datetime
    written: datetime
    corrects_orphan: bool = False
    expected_usd: Decimal | None = None

    @property
    def uncertain(self) -> bool:
        """Whether the call may have cost something, and nobody knows what."""
        return self.cost_usd is None

    @classmethod
    def from_entry(cls, entry_id: bytes, fields: Mapping[bytes, bytes]) -> Self:
        """Read an entry of the ledger's stream; raises ``ValueError`` for one that is no record."""
        written_ms = int(entry_id.partition(b"-")[0])
        return cls.from_json(
            fields.get(b"record", b""), _moment(written_ms), corrects_orphan=fields.get(b"corrects") == b"orphaned"
        )

    @classmethod
    def from_json(cls, text: str | bytes, written: datetime, *, corrects_orphan: bool = False) -> Self:
        """Read a record as SETTLE wrote it; raises ``ValueError`` for anything else."""
        fields = _fields_of(text)
        texts = {name: _text(fields, name) for name in _TEXTS}
        counts = {name: _whole(fields, name) for name in _COUNTS}
        outcome, admitted_ms = fields.get("outcome"), _whole(fields, "admitted_ms")
        if outcome not in OUTCOMES or admitted_ms is None:
            raise ValueError("a record says what became of its call, and when it was admitted")
        return cls(
            call_id=texts["call"],
            job_id=texts["job"],
            tenant=_text(fields, "tenant") if "tenant" in fields else None,
            workflow=texts["workflow"],
            stage=texts["stage"],
            provider=texts["provider"],
            model_id=texts["model"],
            tier=texts["tier"],
            mode=texts["mode"],
            credential=_text(fields, "credential") if "credential" in fields else DEFAULT_CREDENTIAL,
            outcome=outcome,
            error=_text(fields, "error") if "error" in fields else None,
            cost_usd=_usd(counts["cost_nano"]),
            estimate_usd=_usd(counts["estimate_nano"]),
            input_tokens=counts["input"],
            output_tokens=counts["output"],
            cache_read_tokens=counts["cache_read"],
            cache_write_tokens=counts["cache_write"],
            latency_ms=counts["latency_ms"],
            status=counts["status"],
            request_id=_text(fields, "request_id") if "request_id" in fields else None,
            time=_moment(admitted_ms),
            written=written,
            corrects_orphan=corrects_orphan,
            expected_usd=_usd(counts["expected_nano"]),
        )


def _fields_of(text: str | bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep for a record") from None
    if not isinstance(fields, dict):
        raise ValueError("a record is an object")  # noqa: TRY004  # whoever reads asks only whether it is a record
    return fields


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is a text")  # noqa: TRY004  # as above
    return value


def _whole(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"{name} is a whole number")
    return value


def _moment(at_ms: int) -> datetime:
    try:
        return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=at_ms)
    except OverflowError:
        raise ValueError(f"{at_ms} ms is no time") from None


def _usd(nano: int | None) -> Decimal | None:
    return None if nano is None else usd_of(nano)
