"""A running simulator, and a caller that speaks to it over real HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from attune_worker.simulator import Profile, Simulator
from tests.conftest import PATIENCE_SECONDS

ANTHROPIC_HEADERS = {"x-api-key": "key", "anthropic-version": "2023-06-01"}
OPENAI_HEADERS = {"authorization": "Bearer key"}
HAIKU = "claude-haiku-4-5"
MINI = "gpt-4o-mini"

TOKEN = "oat-secret-1234"
VERSION = {"anthropic-version": "2023-06-01"}
BEARER = {**VERSION, "authorization": f"Bearer {TOKEN}"}
UNIFIED = "anthropic-ratelimit-unified"
HUNDRED = {"prompt": "x" * 396, "max_tokens": 1}
"""A call of 99 + 1 tokens."""


def windows(used_5h: float = 0.0, used_7d: float = 0.0, capacity: int = 1000, **subscription: Any) -> dict[str, Any]:
    """Return the profile fields of one subscription."""
    five = {"capacity_tokens": capacity, "used": used_5h, "resets_in_seconds": 600}
    seven = {"capacity_tokens": 10 * capacity, "used": used_7d, "resets_in_seconds": 86_400}
    return {"subscriptions": {TOKEN: {"windows": {"5h": five, "7d": seven}, **subscription}}}


def told(response: httpx.Response) -> dict[str, str]:
    """Return what a response says about the windows, by the end of the header's name."""
    return {
        name.removeprefix(f"{UNIFIED}-"): text for name, text in response.headers.items() if name.startswith(UNIFIED)
    }


class Caller:
    """Sends well-formed requests; keyword arguments change body fields, and None removes one."""

    def __init__(self, simulator: Simulator, http: httpx.Client) -> None:
        self.simulator = simulator
        self.http = http

    def anthropic(
        self, prompt: str = "Why is the sky blue?", *, headers: dict[str, str] | None = None, **changes: Any
    ) -> httpx.Response:
        """Send a Messages request."""
        body = {"model": HAIKU, "max_tokens": 256, "messages": [{"role": "user", "content": prompt}]}
        body = {name: value for name, value in {**body, **changes}.items() if value is not None}
        return self.http.post("/v1/messages", json=body, headers=ANTHROPIC_HEADERS if headers is None else headers)

    def openai(
        self, prompt: str = "Why is the sky blue?", *, headers: dict[str, str] | None = None, **changes: Any
    ) -> httpx.Response:
        """Send a Chat Completions request."""
        body = {"model": MINI, "messages": [{"role": "user", "content": prompt}]}
        body = {name: value for name, value in {**body, **changes}.items() if value is not None}
        return self.http.post("/v1/chat/completions", json=body, headers=OPENAI_HEADERS if headers is None else headers)

    def ask(self, wire: str, prompt: str = "Why is the sky blue?", **changes: Any) -> httpx.Response:
        """Send a request in the named wire format."""
        return getattr(self, wire)(prompt, **changes)

    def invoice(self) -> dict[str, Any]:
        """Read the invoice as any client would."""
        return self.http.get("/_sim/invoice").json()


@pytest.fixture
def simulate() -> Iterator[Callable[..., Caller]]:
    """Start a simulator with the given profile fields; it is closed when the test ends."""
    with ExitStack() as stack:

        def start(**profile: Any) -> Caller:
            simulator = stack.enter_context(Simulator(Profile.parse(profile)))
            client = httpx.Client(base_url=simulator.url, trust_env=False, timeout=PATIENCE_SECONDS)
            http = stack.enter_context(client)
            return Caller(simulator, http)

        yield start
