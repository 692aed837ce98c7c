"""How does Anthropic's Messages API say what we ask and what it answers?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attune_worker.errors import ProviderError
from attune_worker.jobs import Usage
from attune_worker.providers import failures, wire
from attune_worker.providers.base import Answer, ChatRequest, Endpoint, HttpRequest, HttpResponse

API_VERSION = "2023-06-01"

OAUTH_BETA = "oauth-2025-04-20"
"""Without it the API refuses the bearer token of a subscription; as Anthropic's own clients and SDKs send it."""

FINISH_REASONS: Mapping[str, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
    "tool_use": "tool_use",
}
"""``stop_reason`` in our words; one that is not here (such as ``pause_turn``) keeps its own."""


class Anthropic:
    """The Messages API: ``POST {base_url}/v1/messages``.

    What is sent is what was asked: a model that takes no ``temperature`` answers 400, so the caller
    must know its models. A prompt that does not fit is refused with 400 ``invalid_request_error``
    and no code of its own, which is a ``BadRequestError``; only a body over the API's limit in bytes
    (413 ``request_too_large``) can be told apart, and is a ``ContextTooLongError``.
    """

    def misfit(self, temperature: float | None, stop: tuple[str, ...]) -> str | None:
        """Say why the Messages API would refuse these: temperatures end at 1, stop sequences need some ink."""
        if temperature is not None and temperature > 1:
            return "takes temperatures up to 1"
        return "takes no stop sequence of white space" if any(not text.strip() for text in stop) else None

    def build(self, endpoint: Endpoint, chat: ChatRequest) -> HttpRequest:
        """Return the request that asks ``chat``; all system messages go to the front, as the API wants them."""
        headers = {"content-type": "application/json", **_headers(endpoint)}
        if chat.call_id:
            headers["x-client-request-id"] = chat.call_id
        return HttpRequest(f"{endpoint.base_url}/v1/messages", headers, wire.encode(_fields(chat)))

    def parse(self, response: HttpResponse) -> Answer:
        """Read a 2xx response; raises ``MalformedAnswerError``. ``usage`` is None where none was given."""
        try:
            return _answer(wire.read_object(response.body), wire.request_id(response.headers))
        except wire.UnreadableError as error:
            raise failures.malformed(response, str(error)) from None

    def failure(self, response: HttpResponse) -> ProviderError:
        """Name the failure that a response other than 2xx stands for; never raises."""
        return failures.failure(response)

    def models_request(self, endpoint: Endpoint) -> HttpRequest:
        """Return the request for the models there are: ``GET {base_url}/v1/models``, which costs nothing."""
        return HttpRequest(f"{endpoint.base_url}/v1/models", _headers(endpoint), b"", "GET")


def _headers(endpoint: Endpoint) -> dict[str, str]:
    """Return what every request has: the version, and the key."""
    headers = {"accept": "application/json", "anthropic-version": API_VERSION}
    if endpoint.api_key and endpoint.bearer:
        headers["authorization"] = f"Bearer {endpoint.api_key}"
        headers["anthropic-beta"] = OAUTH_BETA
    elif endpoint.api_key:
        headers["x-api-key"] = endpoint.api_key
    return headers


def _fields(chat: ChatRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": chat.model_id,
        "max_tokens": chat.max_tokens,
        "messages": [{"role": turn.role, "content": turn.content} for turn in chat.messages if turn.role != "system"],
    }
    system = [turn.content for turn in chat.messages if turn.role == "system"]
    if chat.system:
        system.insert(0, chat.system)
    if system:
        fields["system"] = "\n\n".join(system)
    if chat.temperature is not None:
        fields["temperature"] = chat.temperature
    if chat.stop:
        fields["stop_sequences"] = chat.stop
    if chat.end_user:
        fields["metadata"] = {"user_id": chat.end_user}
    return fields


def _answer(body: Mapping[str, Any], request_id: str | None) -> Answer:
    blocks = body.get("content")
    if not isinstance(blocks, list):
        raise wire.UnreadableError("'content' is not a list")
    reason = wire.label(body.get("stop_reason")) or "unknown"
    return Answer(
        content="".join(map(_text_of, blocks)),
        finish_reason=FINISH_REASONS.get(reason, reason),
        usage=_usage(wire.mapping(body, "usage")),
        model_id=wire.label(body.get("model")),
        request_id=request_id,
    )


def _text_of(block: object) -> str:
    """Return a text block's text; thinking and tool calls are no part of the answer's text."""
    if not isinstance(block, dict):
        raise wire.UnreadableError("a content block is not an object")
    return wire.text(block, "text") if block.get("type") == "text" else ""


def _usage(usage: Mapping[str, Any]) -> Usage | None:
    """Return the counts in our terms; None where they are missing, because unknown is not zero.

    Anthropic counts what its cache served or stored beside ``input_tokens``; ``output_tokens`` holds
    everything that was generated (``types/usage.py`` of its Python SDK).
    """
    uncached = wire.optional_count(usage, "input_tokens")
    output = wire.optional_count(usage, "output_tokens")
    if uncached is None or output is None:
        return None
    read = wire.count(usage, "cache_read_input_tokens")
    written = wire.count(usage, "cache_creation_input_tokens")
    return wire.consistent(
        Usage(
            input_tokens=uncached + read + written,
            output_tokens=output,
            cache_read_tokens=read,
            cache_write_tokens=written,
            cache_write_1h_tokens=wire.count(wire.mapping(usage, "cache_creation"), "ephemeral_1h_input_tokens"),
            reasoning_tokens=wire.count(wire.mapping(usage, "output_tokens_details"), "thinking_tokens"),
        )
    )
