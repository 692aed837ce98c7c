"""How does OpenAI's Chat Completions, and every server that speaks it, say what we ask and what it answers?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from attune_worker.errors import ProviderError
from attune_worker.jobs import Usage
from attune_worker.providers import failures, wire
from attune_worker.providers.base import Answer, ChatRequest, Endpoint, HttpRequest, HttpResponse

OPENAI_HOST = "api.openai.com"

NO_USER_HOSTS = frozenset({"generativelanguage.googleapis.com", "api.mistral.ai"})
"""Hosts that answer 400 or 422 to fields they do not know, and for which ``user`` is undocumented."""

MAX_KEY_CHARACTERS = 64
"""OpenAI refuses a longer ``prompt_cache_key`` or ``safety_identifier``."""

FINISH_REASONS: Mapping[str, str] = {"tool_calls": "tool_use", "function_call": "tool_use"}
"""``finish_reason`` where ours differs; stop, length and content_filter are OpenAI's words."""


MAX_STOPS = 4
"""https://platform.openai.com/docs/api-reference/chat/create"""


class OpenAI:
    """Chat Completions: ``POST {base_url}/chat/completions``.

    What is sent is what was asked: a model that takes no ``temperature`` or ``stop`` answers 400, so
    the caller must know its models. Only OpenAI itself gets OpenAI's newer fields.
    """

    def misfit(self, temperature: float | None, stop: tuple[str, ...]) -> str | None:
        """Say why Chat Completions would refuse these: there may be four stop sequences."""
        return f"takes at most {MAX_STOPS} stop sequences" if len(stop) > MAX_STOPS else None

    def build(self, endpoint: Endpoint, chat: ChatRequest) -> HttpRequest:
        """Return the request that asks ``chat``; a server that needs no key gets none."""
        headers = {"content-type": "application/json", **_headers(endpoint)}
        if chat.call_id:
            headers["x-client-request-id"] = chat.call_id
        fields = _fields(chat) | _limits_and_keys(chat, _host(endpoint.base_url))
        return HttpRequest(f"{endpoint.base_url}/chat/completions", headers, wire.encode(fields))

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
        """Return the request for the models there are: ``GET {base_url}/models``, which costs nothing."""
        return HttpRequest(f"{endpoint.base_url}/models", _headers(endpoint), b"", "GET")


def _headers(endpoint: Endpoint) -> dict[str, str]:
    """Return what every request has: the key, where there is one."""
    headers = {"accept": "application/json"}
    if endpoint.api_key:
        headers["authorization"] = f"Bearer {endpoint.api_key}"
    return headers


@lru_cache(maxsize=256)
def _host(base_url: str) -> str:
    return urlsplit(base_url).hostname or ""


def _fields(chat: ChatRequest) -> dict[str, Any]:
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    if chat.system:
        messages.insert(0, {"role": "system", "content": chat.system})
    fields: dict[str, Any] = {"model": chat.model_id, "messages": messages}
    if chat.temperature is not None:
        fields["temperature"] = chat.temperature
    if chat.stop:
        fields["stop"] = chat.stop
    return fields


def _limits_and_keys(chat: ChatRequest, host: str) -> dict[str, Any]:
    """Return the fields whose names differ: OpenAI's reasoning models refuse ``max_tokens``, others know no other."""
    if host == OPENAI_HOST or host.endswith(f".{OPENAI_HOST}"):  # eu.api.openai.com and the like
        fields: dict[str, Any] = {"max_completion_tokens": chat.max_tokens}
        if chat.session:
            fields["prompt_cache_key"] = _short_key(chat.session)
        if chat.end_user:
            fields["safety_identifier"] = _short_key(chat.end_user)
        return fields
    fields = {"max_tokens": chat.max_tokens}
    if chat.end_user and host not in NO_USER_HOSTS:
        fields["user"] = chat.end_user
    return fields


def _short_key(key: str) -> str:
    return key if len(key) <= MAX_KEY_CHARACTERS else sha256(key.encode()).hexdigest()


def _answer(body: Mapping[str, Any], request_id: str | None) -> Answer:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise wire.UnreadableError("'choices' holds no object")
    choice = choices[0]
    if choice.get("error"):  # how OpenRouter reports, with status 200, that generation broke off
        raise wire.UnreadableError("it broke off with an error")
    message = wire.mapping(choice, "message")
    reason = _finish_reason(choice, message)
    if not message and reason != "content_filter":
        raise wire.UnreadableError("the choice has no message")
    return Answer(
        content=_content(message),
        finish_reason=reason,
        usage=_usage(wire.mapping(body, "usage")),
        model_id=wire.label(body.get("model")),
        request_id=request_id,
    )


def _finish_reason(choice: Mapping[str, Any], message: Mapping[str, Any]) -> str:
    if message.get("refusal"):  # OpenAI says "stop" beside a refusal
        return "content_filter"
    reason = wire.label(choice.get("finish_reason")) or "unknown"
    # Google's endpoint refuses with "content_filter: PROHIBITED_CONTENT", and no message at all.
    if reason.startswith("content_filter"):
        return "content_filter"
    return FINISH_REASONS.get(reason, reason)


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of an answer: a string, a list of parts, or the words of a refusal; "" for tool calls alone."""
    content = message.get("content")
    if content is None:
        return wire.text(message, "refusal") if message.get("refusal") else ""
    if isinstance(content, list):
        return "".join(map(_text_of, content))
    return wire.text(message, "content")


def _text_of(part: object) -> str:
    """Return the text of one part; what a model thought (Mistral sends it as a part) is no part of the answer."""
    if not isinstance(part, dict):
        raise wire.UnreadableError("a content part is not an object")
    kind = part.get("type")
    return wire.text(part, kind) if kind in ("text", "refusal") else ""


def _usage(usage: Mapping[str, Any]) -> Usage | None:
    """Return the counts in our terms; None where they are missing, because unknown is not zero.

    ``prompt_tokens`` holds what the cache served or stored. ``completion_tokens`` should hold the
    tokens of thinking, but Google's endpoint (discuss.ai.google.dev/t/98760) and Grok (Vertex AI's
    "Reasoning for Grok models") leave them out and count them in ``total_tokens`` only.
    """
    prompt = wire.optional_count(usage, "prompt_tokens")
    completion = wire.optional_count(usage, "completion_tokens")
    total = wire.optional_count(usage, "total_tokens")
    if prompt is None or (completion is None and total is None):
        return None
    prompt_details = wire.mapping(usage, "prompt_tokens_details")
    return wire.consistent(
        Usage(
            input_tokens=prompt,
            output_tokens=max(completion or 0, (total or 0) - prompt),
            cache_read_tokens=wire.count(prompt_details, "cached_tokens"),
            cache_write_tokens=wire.count(prompt_details, "cache_write_tokens"),
            reasoning_tokens=wire.count(wire.mapping(usage, "completion_tokens_details"), "reasoning_tokens"),
        )
    )
