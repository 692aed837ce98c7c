"""What do both wire formats share? A call that was understood, a refusal, and the promise each format keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, NamedTuple, Protocol

from attune_worker.simulator.answers import ModelAnswer, Turn
from attune_worker.simulator.profile import Fault, RetryAfterForm
from attune_worker.simulator.rate import Allowance

Headers = Mapping[str, str]
"""Headers of a request; the server's mapping ignores case."""

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Anthropic's documented limit for a request; it answers 413 beyond it."""

CLIENT_REQUEST_ID = "x-client-request-id"
"""The header with the caller's own id of a call."""

FIVE_MINUTES_SECONDS = 300
ONE_HOUR_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Call:
    """A valid request in no wire format's words.

    ``cacheable_turns`` is how many leading turns, after the system prompt, belong to the prefix that
    the provider may cache (None: nothing may be cached), for ``cache_seconds``. ``client_request_id`` is the
    caller's own id of the call.
    """

    model: str
    system: str = field(repr=False)
    turns: tuple[Turn, ...] = field(repr=False)
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    cacheable_turns: int | None = None
    cache_seconds: int = FIVE_MINUTES_SECONDS
    client_request_id: str | None = None


class Tokens(NamedTuple):
    """What a call is billed for. ``input`` is the whole prompt, with what was read from and written to the cache."""

    input: int
    output: int
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0


class Refusal(Exception):  # noqa: N818  (an answer of the provider, not an error of this program)
    """Raised when the provider refuses a request; the fields make up the official body."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        wait_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code
        self.wait_seconds = wait_seconds


class Wire(Protocol):
    """One wire format, seen from the provider's side."""

    name: str
    request_id_header: str
    writes_are_billed: bool
    """Whether putting a prefix into the cache is counted, and charged, apart from reading the prompt."""

    def key(self, headers: Headers) -> str | None:
        """Return the API key that a request carries."""
        ...

    def subscription(self, headers: Headers) -> str | None:
        """Return the token of a subscription that a request carries in the place where one is accepted."""
        ...

    def wrong_key(self, key: str | None) -> Refusal:
        """Refuse a missing key (None) or a wrong one."""
        ...

    def unpaid(self) -> Refusal:
        """Refuse a key that is right but not paid for."""
        ...

    def invalid(self, message: str) -> Refusal:
        """Refuse a request for a reason that the format has no special code for."""
        ...

    def too_large(self) -> Refusal:
        """Refuse a body of more than ``MAX_BODY_BYTES``."""
        ...

    def parse(self, body: dict[str, Any], headers: Headers) -> Call:
        """Return the call, or raise the ``Refusal`` that the real API answers such a request with."""
        ...

    def unknown_model(self, model: str) -> Refusal:
        """Refuse a model that the provider does not offer."""
        ...

    def too_long(self, prompt_tokens: int, window: int) -> Refusal:
        """Refuse a prompt that does not fit the window."""
        ...

    def failure(self, fault: Fault, model: str, wait_seconds: float) -> Refusal:
        """Return what the provider answers to a call that a fault hits before the model runs."""
        ...

    def request_id(self, serial: str) -> str:
        """Return the id of a request, which goes into a header."""
        ...

    def answer_id(self, serial: str) -> str:
        """Return the id of an answer, which goes into its body."""
        ...

    def success(self, answer_id: str, model: str, answer: ModelAnswer, tokens: Tokens, now: float) -> dict[str, Any]:
        """Return the body of a 200."""
        ...

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        """Return the body of a refusal."""
        ...

    def limit_headers(self, allowance: Allowance, now: float) -> dict[str, str]:
        """Tell a caller how much of its limit is left."""
        ...

    def models(self, ids: list[str]) -> dict[str, Any]:
        """Return the body that lists what the provider offers."""
        ...


# made once, because json.dumps makes an encoder for every call with settings of its own
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, check_circular=False)


def to_json(body: Any) -> bytes:
    """Return ``body`` as compact JSON; half a surrogate pair, which a refusal may repeat, becomes a question mark."""
    return _ENCODER.encode(body).encode(errors="replace")


def retry_after_headers(wait_seconds: float, form: RetryAfterForm, now: float) -> dict[str, str]:
    """Say how long to wait, in the given form; a date is rounded up to the full second it can express."""
    if form == "retry-after":
        return {"retry-after": f"{wait_seconds:.3f}".rstrip("0").rstrip(".")}
    if form == "retry-after-ms":
        return {"retry-after-ms": str(math.ceil(wait_seconds * 1000))}
    if form == "http-date":
        moment = datetime.fromtimestamp(math.ceil(now + wait_seconds), UTC)
        return {"retry-after": format_datetime(moment, usegmt=True)}
    return {}


def bearer_token(headers: Headers) -> str | None:
    """Return the token of an ``authorization`` header."""
    return headers.get("authorization", "").removeprefix("Bearer ").strip() or None


def text_of(content: Any) -> str:
    """Return the text of a message: a string, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or () if part.get("type") == "text")


def is_integer(value: Any) -> bool:
    """Whether ``value`` is a JSON integer; ``true`` is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a JSON number; ``true`` is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool)
