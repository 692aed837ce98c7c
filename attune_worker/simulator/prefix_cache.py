"""How much of a prompt has the provider seen before?"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from attune_worker.simulator.answers import count_prompt_tokens
from attune_worker.simulator.wire import ONE_HOUR_SECONDS, Call, Tokens

MIN_PREFIX_TOKENS = 1024
"""Shorter prefixes are not cached: OpenAI's documented minimum, and Anthropic's for most models."""

MAX_PREFIXES = 10_000


class PrefixCache:
    """Remembers prefixes for as long as they asked for; using one keeps it for that long again."""

    def __init__(self) -> None:
        self._kept_until: OrderedDict[bytes, float] = OrderedDict()

    def bill(self, call: Call, output_tokens: int, now: float, *, writes_are_billed: bool) -> Tokens:
        """Return the call's tokens, with its prefix as a cache read if it is known and as a write if not."""
        tokens = Tokens(count_prompt_tokens(call.system, call.turns), output_tokens)
        if call.cacheable_turns is None:
            return tokens
        turns = call.turns[: call.cacheable_turns]
        prefix_tokens = count_prompt_tokens(call.system, turns)
        if prefix_tokens < MIN_PREFIX_TOKENS:
            return tokens
        key = hashlib.blake2b(f"{call.model}\0{call.system}\0{turns!r}".encode(), digest_size=16).digest()
        if self._use(key, now, call.cache_seconds):
            return tokens._replace(cache_read=prefix_tokens)
        if not writes_are_billed:
            return tokens
        one_hour = prefix_tokens if call.cache_seconds == ONE_HOUR_SECONDS else 0
        return tokens._replace(cache_write=prefix_tokens, cache_write_1h=one_hour)

    def _use(self, key: bytes, now: float, seconds: float) -> bool:
        known = self._kept_until.pop(key, 0.0) > now
        self._kept_until[key] = now + seconds
        if len(self._kept_until) > MAX_PREFIXES:
            self._kept_until.popitem(last=False)
        return known
