"""In which form do the scripts take what a call is about? Keys, numbers and JSON; nothing is sent here."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from attune_worker.budget import nano_of
from attune_worker.store.keys import FleetKeys

to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def model_keys(keys: FleetKeys) -> Callable[[str, str, str, str], tuple[str, ...]]:
    """Return what names the circuits, limits and slots of a call: by provider, tier, model id and credential.

    What it has named before it remembers.
    """

    @lru_cache(maxsize=256)
    def of(provider: str, tier: str, model_id: str, credential: str) -> tuple[str, ...]:
        return (
            keys.circuit(provider, tier),
            keys.circuit(provider, None),
            keys.limits(provider),
            keys.limits(provider, model_id, credential),
            keys.slots(provider),
        )

    return of


def told(**fields: object) -> dict[str, Any]:
    """Return the fields that are known: a null would be a value to Lua."""
    return {name: value for name, value in fields.items() if value is not None}


def in_nano(amount_usd: Decimal | None) -> int | None:
    """Return an amount in nano-USD, and None for None."""
    return None if amount_usd is None else nano_of(amount_usd)


def in_ms(seconds: float | None) -> int | None:
    """Return seconds in whole milliseconds, and None for None."""
    return None if seconds is None else round(seconds * 1000)
