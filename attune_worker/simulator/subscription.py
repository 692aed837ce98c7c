"""How much of a subscription's quota is used up, and what does Anthropic tell its caller about it?

The ``anthropic-ratelimit-unified-*`` headers are in no documentation of Anthropic's. They are sent here as they were
captured from it, with the names, statuses and forms of these:

- 2026-08-21, 200, Claude Max: 5h at 0.86 and 7d at 0.74, both ``allowed``, claim ``five_hour``; utilization with two
  decimals, reset in epoch seconds. Another of 2026-07-03 has the same set, with 5h at 0.01, 7d at 0.57, and still
  the claim ``five_hour``.
- github.com/cnighswonger/claude-code-cache-fix, issue 47: ``allowed_warning`` and ``7d-surpassed-threshold: 0.75``
  when 7d is at 0.76. Claude Code names 0.9 for 5h.
- 2026-01-03, 429: ``5h-status: rejected``, utilization 1.0033…, ``5h-surpassed-threshold: 1.0``, 7d at 0.664,
  ``retry-after: 11054``, whole seconds. It had 16 decimals then. github.com/Yeachan-Heo/gajae-code, pull request
  2444, and github.com/askalf/dario, issue 1244, show refusals at 1.08 and 1.04.
- github.com/lidge-jun/opencodex, pull request 3809: with both windows used up, the later reset is the one to wait for.

A utilization above 1 shows that the provider counts when a call is over and sets nothing aside for calls that run.
So does the simulator: calls that run side by side can take a window beyond its capacity, and each that did is told
in ``went_over``. In one thing it is stricter: it knows its answers beforehand, and refuses also a call that alone would
be too much for what is left. No capture says how utilization is rounded; here it is to the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attune_worker.simulator.profile import Subscription, Window, WindowName
from attune_worker.simulator.wire import Refusal

LENGTH_SECONDS: Mapping[WindowName, int] = {"5h": 5 * 3600, "7d": 7 * 86_400}
WARNING_AT: Mapping[WindowName, float] = {"5h": 0.9, "7d": 0.75}
CLAIMS: Mapping[WindowName, str] = {"5h": "five_hour", "7d": "seven_day"}
STATUSES = ("allowed", "allowed_warning", "rejected")

_PREFIX = "anthropic-ratelimit-unified"


@dataclass(slots=True)
class Use:
    """What is used of one window until ``resets_at`` (epoch seconds), and the most that was ever used of it."""

    name: WindowName
    capacity_tokens: int
    used_tokens: int
    resets_at: int
    highest_tokens: int

    @classmethod
    def start(cls, name: WindowName, window: Window, now: float) -> Use:
        """Return a window as the profile has it begin; a reset falls on the full second, as all that are told do."""
        used = round(window.capacity_tokens * window.used)
        seconds = LENGTH_SECONDS[name] if window.resets_in_seconds is None else window.resets_in_seconds
        return cls(name, window.capacity_tokens, used, math.ceil(now + seconds), used)

    @property
    def utilization(self) -> float:
        """The share that is used; more than 1 when calls went over."""
        return self.used_tokens / self.capacity_tokens

    def roll(self, now: float) -> None:
        """Begin anew if the reset has come."""
        if now >= self.resets_at:
            length = LENGTH_SECONDS[self.name]
            self.resets_at += length * (1 + int((now - self.resets_at) // length))
            self.used_tokens = 0

    def has_room(self, tokens: int) -> bool:
        """Whether a call of this size fits."""
        return self.used_tokens + tokens <= self.capacity_tokens

    def count(self, tokens: int) -> bool:
        """Count a call, and return whether it went over."""
        self.used_tokens += tokens
        self.highest_tokens = max(self.highest_tokens, self.used_tokens)
        return not self.has_room(0)

    def status(self) -> str:
        """Return what a caller is told that was let through."""
        return STATUSES[self.utilization >= WARNING_AT[self.name]]

    def report(self) -> dict[str, Any]:
        """Return its state as JSON values."""
        return {
            "capacity_tokens": self.capacity_tokens,
            "used_tokens": self.used_tokens,
            "utilization": self.utilization,
            "highest_utilization": self.highest_tokens / self.capacity_tokens,
            "resets_at": self.resets_at,
        }


@dataclass(slots=True)
class Quota:
    """The windows of one subscription, and the calls on it since the start."""

    terms: Subscription
    uses: list[Use]
    served: int = 0
    refused: int = 0
    went_over: int = 0
    tokens: int = 0

    @classmethod
    def start(cls, terms: Subscription, now: float) -> Quota:
        """Return the quota of a subscription that begins at ``now`` (epoch seconds)."""
        return cls(terms, [Use.start(name, window, now) for name, window in sorted(terms.windows.items())])

    def admit(self, tokens: int, now: float) -> tuple[Refusal, dict[str, str]] | None:
        """Return None for a call for which there is room, else the refusal and what its headers tell.

        A call is refused when a window is used up, or when the call alone would take it beyond its capacity.
        """
        self._roll(now)
        spent = {use.name for use in self.uses if not use.has_room(tokens)}
        if not spent:
            return None
        self.refused += 1
        wait = max(use.resets_at for use in self.uses if use.name in spent) - now
        message = "This request would exceed your account's rate limit. Please try again later."
        refusal = Refusal(429, "rate_limit_error", message, wait_seconds=math.ceil(wait))
        return refusal, self._told({use.name: "rejected" if use.name in spent else use.status() for use in self.uses})

    def count(self, tokens: int, now: float) -> dict[str, str]:
        """Count a call that is over, and return what the headers of its answer tell: its own tokens are in it."""
        self._roll(now)
        over = [use.count(tokens) for use in self.uses]
        self.served += 1
        self.went_over += any(over)
        self.tokens += tokens
        return self._told({use.name: use.status() for use in self.uses})

    def report(self, now: float) -> dict[str, Any]:
        """Return its state as JSON values."""
        self._roll(now)
        return {
            "served": self.served,
            "refused": self.refused,
            "went_over": self.went_over,
            "tokens": self.tokens,
            "windows": {use.name: use.report() for use in self.uses},
        }

    def _roll(self, now: float) -> None:
        for use in self.uses:
            use.roll(now)

    def _told(self, statuses: Mapping[WindowName, str]) -> dict[str, str]:
        claim = self._representative(statuses)
        headers = {f"{_PREFIX}-status": statuses[claim.name]}
        for use in self.uses:
            headers[f"{_PREFIX}-{use.name}-status"] = statuses[use.name]
            headers[f"{_PREFIX}-{use.name}-reset"] = str(use.resets_at)
            headers[f"{_PREFIX}-{use.name}-utilization"] = _decimal(use.utilization, self.terms.decimals)
            surpassed = 1.0 if use.utilization >= 1 else WARNING_AT[use.name]
            if use.utilization >= surpassed:
                headers[f"{_PREFIX}-{use.name}-surpassed-threshold"] = str(surpassed)
        return {
            **headers,
            f"{_PREFIX}-representative-claim": CLAIMS[claim.name],
            f"{_PREFIX}-reset": str(claim.resets_at),
            f"{_PREFIX}-fallback-percentage": "0.5",
            # of paid use beyond the plan, which this subscription has not bought: no word about the windows
            f"{_PREFIX}-overage-status": "rejected",
            f"{_PREFIX}-overage-disabled-reason": "org_level_disabled",
        }

    def _representative(self, statuses: Mapping[WindowName, str]) -> Use:
        """Return the window in the worst state; of two that are used up the later reset, else the shorter window."""
        worst = max(statuses.values(), key=STATUSES.index)
        candidates = [use for use in self.uses if statuses[use.name] == worst]
        return max(candidates, key=lambda use: use.resets_at) if worst == "rejected" else candidates[0]


def _decimal(share: float, decimals: int) -> str:
    """Write a share as the captures have it: ``0.86``, ``0.2``, ``1.0``."""
    text = f"{share:.{decimals}f}".rstrip("0")
    return f"{text}0" if text.endswith(".") else text


class Quotas:
    """The quotas of all subscriptions of a profile, by token."""

    def __init__(self, subscriptions: Mapping[str, Subscription], now: float) -> None:
        self._quotas = {token: Quota.start(terms, now) for token, terms in subscriptions.items()}

    def apply(self, subscriptions: Mapping[str, Subscription], now: float) -> None:
        """Follow a changed profile: a subscription with the same terms goes on, another begins now."""
        before = self._quotas
        self._quotas = {
            token: before[token] if token in before and before[token].terms == terms else Quota.start(terms, now)
            for token, terms in subscriptions.items()
        }

    def of(self, key: str | None) -> Quota | None:
        """Return the quota of the subscription with this token, if it is one."""
        return self._quotas.get(key) if key else None

    def items(self) -> list[tuple[str, Quota]]:
        """Return each token with its quota."""
        return list(self._quotas.items())
