"""How does Anthropic's Messages API look from the inside?

Shapes: platform.claude.com/docs/en/api/messages, /api/errors and /api/rate-limits (``anthropic-version: 2023-06-01``).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from attune_worker.simulator.answers import ModelAnswer, Turn
from attune_worker.simulator.profile import Fault
from attune_worker.simulator.rate import Allowance
from attune_worker.simulator.wire import (
    FIVE_MINUTES_SECONDS,
    ONE_HOUR_SECONDS,
    Call,
    Headers,
    Refusal,
    Tokens,
    bearer_token,
    is_integer,
    is_number,
    text_of,
)

_DOCUMENTED_FIELDS = """
model messages max_tokens metadata stop_sequences stream system temperature thinking tool_choice tools top_k top_p
service_tier container context_management mcp_servers cache_control inference_geo output_config
"""
_FIELDS = frozenset(_DOCUMENTED_FIELDS.split())
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "stop_sequence": "stop_sequence"}


class AnthropicWire:
    """``POST /v1/messages``."""

    name = "anthropic"
    request_id_header = "request-id"
    writes_are_billed = True

    def key(self, headers: Headers) -> str | None:
        """Return the API key, or the bearer token of a subscription."""
        return headers.get("x-api-key") or bearer_token(headers)

    def subscription(self, headers: Headers) -> str | None:
        """Return the bearer token; a key beside it would win, so then there is none."""
        return None if headers.get("x-api-key") else bearer_token(headers)

    def wrong_key(self, key: str | None) -> Refusal:
        """Refuse a missing key (None) or a wrong one."""
        return Refusal(401, "authentication_error", "invalid x-api-key" if key else "x-api-key header is required")

    def unpaid(self) -> Refusal:
        """Refuse a key that is right but not paid for."""
        message = "Your account has a billing problem. Please check your payment information."
        return Refusal(402, "billing_error", message)

    def invalid(self, message: str) -> Refusal:
        """Refuse a request that is wrong in itself."""
        return Refusal(400, "invalid_request_error", message)

    def too_large(self) -> Refusal:
        """Refuse a body that is too large."""
        return Refusal(413, "request_too_large", "Request exceeds the maximum size")

    def unknown_model(self, model: str) -> Refusal:
        """Refuse a model that the provider does not offer."""
        return Refusal(404, "not_found_error", f"model: {model}")

    def too_long(self, prompt_tokens: int, window: int) -> Refusal:
        """Refuse a prompt that does not fit; Anthropic has no code of its own for it, only this message."""
        return self.invalid(f"prompt is too long: {prompt_tokens} tokens > {window} maximum")

    def failure(self, fault: Fault, model: str, wait_seconds: float) -> Refusal:
        """Return what the provider answers to a call that a fault hits before the model runs."""
        match fault:
            case Fault.RATE_LIMITED:
                message = "This request would exceed your organization's rate limit of requests per minute."
                return Refusal(429, "rate_limit_error", message, wait_seconds=wait_seconds)
            case Fault.SPEND_LIMIT:
                message = "You have reached your monthly API usage limit."
                return Refusal(429, "rate_limit_error", message, code="enforced_spend_limit_reached")
            case Fault.CREDENTIAL:
                return self.wrong_key("revoked")
            case Fault.OVERLOADED:
                return Refusal(529, "overloaded_error", "Overloaded")
            case Fault.SERVER_ERROR:
                return Refusal(500, "api_error", "Internal server error")
            case _:
                return self.invalid("messages: the simulated provider does not like this request")

    def request_id(self, serial: str) -> str:
        """Return the id of a request."""
        return f"req_01{serial}"

    def answer_id(self, serial: str) -> str:
        """Return the id of an answer."""
        return f"msg_01{serial}"

    def success(self, answer_id: str, model: str, answer: ModelAnswer, tokens: Tokens, now: float) -> dict[str, Any]:
        """Return the body of a 200; here ``input_tokens`` leaves out what the cache was used for."""
        return {
            "id": answer_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": answer.text}] if answer.text else [],
            "stop_reason": _STOP_REASONS[answer.finish_reason],
            "stop_sequence": answer.stop_sequence,
            "usage": {
                "input_tokens": tokens.input - tokens.cache_read - tokens.cache_write,
                "cache_creation_input_tokens": tokens.cache_write,
                "cache_read_input_tokens": tokens.cache_read,
                "cache_creation": {
                    "ephemeral_5m_input_tokens": tokens.cache_write - tokens.cache_write_1h,
                    "ephemeral_1h_input_tokens": tokens.cache_write_1h,
                },
                "output_tokens": tokens.output,
                "service_tier": "standard",
            },
        }

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        """Return the body of a refusal."""
        error: dict[str, Any] = {"type": refusal.kind, "message": refusal.message}
        if refusal.code:
            error["details"] = {"error_code": refusal.code}
        return {"type": "error", "error": error, "request_id": request_id}

    def limit_headers(self, allowance: Allowance, now: float) -> dict[str, str]:
        """Tell a caller how much of its limit is left, with the reset in RFC 3339."""
        reset = datetime.fromtimestamp(now + allowance.reset_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "anthropic-ratelimit-requests-limit": str(allowance.limit),
            "anthropic-ratelimit-requests-remaining": str(allowance.remaining),
            "anthropic-ratelimit-requests-reset": reset,
        }

    def models(self, ids: list[str]) -> dict[str, Any]:
        """Return the body that lists what the provider offers."""
        models = [
            {"type": "model", "id": model, "display_name": model, "created_at": "2025-01-01T00:00:00Z"} for model in ids
        ]
        return {
            "data": models,
            "has_more": False,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
        }

    def parse(self, body: dict[str, Any], headers: Headers) -> Call:
        """Return the call, or raise the ``Refusal`` that the real API answers such a request with."""
        if "anthropic-version" not in headers:
            raise self.invalid("anthropic-version: header is required")
        if unknown := body.keys() - _FIELDS:
            raise self.invalid(f"{min(unknown)}: Extra inputs are not permitted")
        self._check_options(body)
        turns = self._turns(body)
        cacheable, seconds = _cache_marker(body)
        return Call(
            model=body["model"],
            system=text_of(body.get("system")),
            turns=turns,
            max_tokens=body["max_tokens"],
            stop=tuple(body.get("stop_sequences") or ()),
            cacheable_turns=cacheable,
            cache_seconds=seconds,
        )

    def _check_options(self, body: dict[str, Any]) -> None:
        for name in ("model", "max_tokens", "messages"):
            if name not in body:
                raise self.invalid(f"{name}: Field required")
        if not isinstance(body["model"], str):
            raise self.invalid("model: Input should be a valid string")
        if not body["model"]:
            raise self.invalid("model: String should have at least 1 character")
        if not is_integer(body["max_tokens"]):
            raise self.invalid("max_tokens: Input should be a valid integer")
        if body["max_tokens"] < 1:
            raise self.invalid("max_tokens: Input should be greater than or equal to 1")
        if body.get("stream"):
            raise self.invalid("stream: this simulator does not stream; leave it out")
        self._check_sampling(body)
        if not isinstance(body.get("system") or "", str) and not _is_parts(body["system"]):
            raise self.invalid("system: Input should be a valid string or a list of text blocks")

    def _check_sampling(self, body: dict[str, Any]) -> None:
        temperature = body.get("temperature")
        if temperature is not None and not is_number(temperature):
            raise self.invalid("temperature: Input should be a valid number")
        if temperature is not None and not 0 <= temperature <= 1:
            raise self.invalid("temperature: range: 0..1")
        stop = body.get("stop_sequences") or []
        if not isinstance(stop, list) or not all(isinstance(sequence, str) for sequence in stop):
            raise self.invalid("stop_sequences: Input should be a valid list of strings")
        if not all(sequence.strip() for sequence in stop):
            raise self.invalid("stop_sequences: each stop sequence must contain non-whitespace")
        metadata = body.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise self.invalid("metadata: Input should be an object")
        if unknown := metadata.keys() - {"user_id"}:
            raise self.invalid(f"metadata.{min(unknown)}: Extra inputs are not permitted")

    def _turns(self, body: dict[str, Any]) -> tuple[Turn, ...]:
        messages = body["messages"]
        if not isinstance(messages, list):
            raise self.invalid("messages: Input should be a valid list")
        if not messages:
            raise self.invalid("messages: at least one message is required")
        return tuple(self._turn(place, message) for place, message in enumerate(messages))

    def _turn(self, place: int, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise self.invalid(f"messages.{place}: Input should be an object")
        for name in ("role", "content"):
            if name not in message:
                raise self.invalid(f"messages.{place}.{name}: Field required")
        role, content = message["role"], message["content"]
        if role == "system":
            raise self.invalid(
                'messages: Unexpected role "system". The Messages API accepts a top-level `system` parameter, '
                'not "system" as an input message role.'
            )
        if role not in ("user", "assistant"):
            raise self.invalid(f"messages.{place}.role: Input should be 'user' or 'assistant'")
        if not isinstance(content, str) and not _is_parts(content):
            raise self.invalid(f"messages.{place}.content: Input should be a valid string or list of content blocks")
        if not content:
            raise self.invalid(f"messages.{place}: all messages must have non-empty content")
        return role, text_of(content)


def _is_parts(content: Any) -> bool:
    """Whether ``content`` is a list of content blocks; blocks other than text are accepted and not read."""
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and isinstance(part.get("type"), str)
        and (part["type"] != "text" or isinstance(part.get("text"), str))
        for part in content
    )


def _cache_marker(body: dict[str, Any]) -> tuple[int | None, int]:
    """Return how many turns the last ``cache_control`` covers (0: the system prompt alone), and its lifetime.

    A marker inside a message counts for the whole message, which is coarser than the real API.
    """
    cacheable, marker = None, None
    for turns, content in enumerate([body.get("system"), *(message["content"] for message in body["messages"])]):
        for part in content if isinstance(content, list) else ():
            if part.get("cache_control"):
                cacheable, marker = turns, part["cache_control"]
    if body.get("cache_control"):
        cacheable, marker = len(body["messages"]), body["cache_control"]
    one_hour = isinstance(marker, dict) and marker.get("ttl") == "1h"
    return cacheable, ONE_HOUR_SECONDS if one_hour else FIVE_MINUTES_SECONDS
