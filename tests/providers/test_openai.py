"""Does the Chat Completions adapter serve OpenAI and the servers that are like it, each in its own dialect?"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import MalformedAnswerError
from attune_worker.jobs import Message, Usage
from attune_worker.providers.base import ChatRequest, Endpoint, HttpResponse
from attune_worker.providers.openai import OpenAI

OFFICIAL = "https://api.openai.com/v1"
VLLM = "http://127.0.0.1:8000/v1"
GOOGLE = "https://generativelanguage.googleapis.com/v1beta/openai"
HELLO = (Message(role="user", content="Grüße aus Zürich"),)

# "The chat completion object" in the API reference.
USAGE: dict[str, Any] = {
    "prompt_tokens": 1486,
    "completion_tokens": 651,
    "total_tokens": 2137,
    "prompt_tokens_details": {"cached_tokens": 1408, "cache_write_tokens": 64, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 512, "accepted_prediction_tokens": 0},
}
CHOICE: dict[str, Any] = {
    "index": 0,
    "message": {"role": "assistant", "content": "Grüezi.", "refusal": None, "annotations": []},
    "logprobs": None,
    "finish_reason": "stop",
}
ANSWER: dict[str, Any] = {
    "id": "chatcmpl-test",
    "object": "chat.completion",
    "created": 1780000000,
    "model": "gpt-6-mini-2026-09-01",
    "choices": [CHOICE],
    "usage": USAGE,
    "service_tier": "default",
}


def answered(body: object) -> HttpResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpResponse(200, {"x-request-id": "req_test"}, raw)


def with_message(message: object, finish_reason: object = "stop") -> HttpResponse:
    return answered(ANSWER | {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]})


def with_usage(usage: object) -> HttpResponse:
    return answered(ANSWER | {"usage": usage})


def sent(base_url: str, chat: ChatRequest) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(OpenAI().build(Endpoint("any", base_url, "key-of-a-test"), chat).body)
    return fields


def test_a_plain_question_is_sent_as_documented() -> None:
    """URL, headers and body of the smallest request are those of the API reference, byte for byte."""
    request = OpenAI().build(Endpoint("openai", OFFICIAL, "key-of-a-test"), ChatRequest("gpt-6-mini", HELLO, 64))
    assert request.url == "https://api.openai.com/v1/chat/completions"
    assert request.headers == {
        "content-type": "application/json",
        "accept": "application/json",
        "authorization": "Bearer key-of-a-test",
    }
    expected = (
        '{"model":"gpt-6-mini","messages":[{"role":"user","content":"Grüße aus Zürich"}],"max_completion_tokens":64}'
    )
    assert request.body == expected.encode()


def test_a_server_without_a_key_gets_no_authorization() -> None:
    """A local vLLM or Ollama, which has no key, gets no empty Bearer header."""
    request = OpenAI().build(Endpoint("local", VLLM), ChatRequest("m", HELLO, 1))
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("base_url", "own_fields"),
    [
        (OFFICIAL, {"max_completion_tokens": 64, "prompt_cache_key": "s-1", "safety_identifier": "u-1"}),
        (
            "https://eu.api.openai.com/v1",
            {"max_completion_tokens": 64, "prompt_cache_key": "s-1", "safety_identifier": "u-1"},
        ),
        (VLLM, {"max_tokens": 64, "user": "u-1"}),
        ("https://openrouter.ai/api/v1", {"max_tokens": 64, "user": "u-1"}),
        ("https://api.openai.com.example.org/v1", {"max_tokens": 64, "user": "u-1"}),
        (GOOGLE, {"max_tokens": 64}),
        ("https://api.mistral.ai/v1", {"max_tokens": 64}),
    ],
)
def test_each_server_gets_the_fields_it_knows(base_url: str, own_fields: dict[str, object]) -> None:
    """Newer fields go to OpenAI alone, and servers that refuse unknown fields get none that they may not know."""
    chat = ChatRequest("m", HELLO, 64, temperature=0.0, stop=("END",), end_user="u-1", session="s-1")
    shared = {
        "model": "m",
        "messages": [{"role": "user", "content": "Grüße aus Zürich"}],
        "temperature": 0.0,
        "stop": ["END"],
    }
    assert sent(base_url, chat) == shared | own_fields


def test_long_keys_are_shortened_alike() -> None:
    """OpenAI refuses keys beyond 64 characters; the same long one gives the same short one, another another."""
    keys = [sent(OFFICIAL, ChatRequest("m", HELLO, 1, session="s" * n))["prompt_cache_key"] for n in (64, 65, 65, 66)]
    assert [len(key) for key in keys] == [64] * 4
    assert len(set(keys)) == 3


def test_system_goes_first() -> None:
    """The system prompt is the first message, before system messages of the conversation."""
    turns = (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    messages = sent(VLLM, ChatRequest("m", turns, 64, system="You are a clerk."))["messages"]
    assert [turn["content"] for turn in messages] == ["You are a clerk.", "Be brief.", "Hi"]
    assert [turn["role"] for turn in messages] == ["system", "system", "user"]


def test_a_plain_answer_is_read() -> None:
    """Text, model, finish reason, tokens and request id come out of a documented answer."""
    answer = OpenAI().parse(answered(ANSWER))
    assert (answer.content, answer.finish_reason) == ("Grüezi.", "stop")
    assert answer.usage == Usage(
        input_tokens=1486, output_tokens=651, cache_read_tokens=1408, cache_write_tokens=64, reasoning_tokens=512
    )
    assert (answer.model_id, answer.request_id) == ("gpt-6-mini-2026-09-01", "req_test")


@pytest.mark.parametrize(
    ("message", "finish_reason", "content", "expected_reason"),
    [
        ({"content": "cut"}, "length", "cut", "length"),
        ({"content": ""}, "content_filter", "", "content_filter"),
        # "Structured outputs", refusals: content is null, the words are beside it, the reason is "stop"
        ({"content": None, "refusal": "I can't help."}, "stop", "I can't help.", "content_filter"),
        # "Function calling"
        ({"content": None, "tool_calls": [{"id": "call_1"}]}, "tool_calls", "", "tool_use"),
        ({"content": None, "function_call": {"name": "f"}}, "function_call", "", "tool_use"),
        # Google's endpoint, when thinking has used up max_tokens: no content at all
        ({"role": "assistant"}, "length", "", "length"),
        # Google's endpoint, when it refuses: no message either
        (None, "content_filter: PROHIBITED_CONTENT", "", "content_filter"),
        # Mistral's reasoning models: parts, with the thinking among them
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                    {"type": "text", "text": "4"},
                ]
            },
            "stop",
            "4",
            "stop",
        ),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "stop", "No.", "stop"),
        ({"content": []}, "stop", "", "stop"),
        ({"content": "x", "reasoning_content": "hm"}, "a_reason_of_next_year", "x", "a_reason_of_next_year"),
        ({"content": "x"}, None, "x", "unknown"),
    ],
)
def test_content_and_reason_of_every_shape_are_read(
    message: object, finish_reason: object, content: str, expected_reason: str
) -> None:
    """Strings, parts, refusals and tool calls give the answer's text and our word for how it ended."""
    answer = OpenAI().parse(with_message(message, finish_reason))
    assert (answer.content, answer.finish_reason) == (content, expected_reason)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # vLLM: no details, or null for them
        ({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}, Usage(input_tokens=9, output_tokens=3)),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": None},
            Usage(input_tokens=9, output_tokens=3),
        ),
        ({"prompt_tokens": 9, "completion_tokens": 3}, Usage(input_tokens=9, output_tokens=3)),
        # Google's endpoint (discuss.ai.google.dev, "Question with usage in OpenAI compatibility")
        (
            {"prompt_tokens": 758, "completion_tokens": 102, "total_tokens": 1725},
            Usage(input_tokens=758, output_tokens=967),
        ),
        # Vertex AI, "Reasoning for Grok models": reasoning is counted beside completion_tokens
        (
            {
                "prompt_tokens": 20,
                "completion_tokens": 50,
                "total_tokens": 270,
                "completion_tokens_details": {"reasoning_tokens": 200},
            },
            Usage(input_tokens=20, output_tokens=250, reasoning_tokens=200),
        ),
        # the prompt is all there was
        ({"prompt_tokens": 10, "total_tokens": 10}, Usage(input_tokens=10, output_tokens=0)),
    ],
)
def test_all_that_was_generated_is_output(usage: dict[str, object], expected: Usage) -> None:
    """Tokens of thinking are output, also where a server has them in total_tokens only."""
    assert OpenAI().parse(with_usage(usage)).usage == expected


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": 9},
        {"completion_tokens": 9, "total_tokens": 9},
        {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 10}},
        {"prompt_tokens": 9, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 4}},
    ],
)
def test_unknown_usage_is_none_and_the_answer_stays(usage: object) -> None:
    """Missing or contradictory counts are unknown, never zero, and do not cost the answer."""
    answer = OpenAI().parse(with_usage(usage))
    assert answer.usage is None
    assert answer.content == "Grüezi."


@pytest.mark.parametrize("count", [-1, 1.5, True, "12", [], 2**31 + 1])
@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "total_tokens"])
def test_counts_that_are_no_counts_are_refused(field: str, count: object) -> None:
    """Negative, broken or absurd token counts make the answer malformed instead of the bill wrong."""
    with pytest.raises(MalformedAnswerError, match=field):
        OpenAI().parse(with_usage(USAGE | {field: count}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>502 Bad Gateway</html>",
        b'{"choices": [',
        b"\xff\xfe\xff",
        b"[" * 100_000,
        [],
        None,
        {},
        ANSWER | {"choices": []},
        ANSWER | {"choices": {}},
        ANSWER | {"choices": [None]},
        ANSWER | {"choices": [{"index": 0, "finish_reason": "stop"}]},
        ANSWER | {"choices": [CHOICE | {"message": "text"}]},
        ANSWER | {"choices": [CHOICE | {"message": {"content": 7}}]},
        ANSWER | {"choices": [CHOICE | {"message": {"content": ["text"]}}]},
        ANSWER | {"choices": [CHOICE | {"message": {"content": [{"type": "text"}]}}]},
        ANSWER | {"choices": [CHOICE | {"message": {"content": None, "refusal": [1]}}]},
        ANSWER | {"usage": "many"},
        ANSWER | {"usage": USAGE | {"prompt_tokens_details": [1]}},
    ],
)
def test_what_is_no_completion_is_malformed(body: object) -> None:
    """Anything but a completion with a choice raises MalformedAnswerError with the status and the request id."""
    with pytest.raises(MalformedAnswerError) as caught:
        OpenAI().parse(answered(body))
    assert (caught.value.status, caught.value.request_id) == (200, "req_test")


@pytest.mark.parametrize(
    "body",
    [  # OpenRouter "Errors": once generation has begun the status stays 200
        {"error": {"code": 502, "message": "upstream fell over", "metadata": {"provider_name": "x"}}},
        ANSWER | {"choices": [CHOICE | {"finish_reason": "error", "error": {"code": 502, "message": "fell over"}}]},
    ],
)
def test_an_error_with_status_200_is_no_answer(body: object) -> None:
    """A generation that broke off is not passed on as a finished answer."""
    with pytest.raises(MalformedAnswerError):
        OpenAI().parse(answered(body))


NAMES = [*ANSWER, *CHOICE, *USAGE, "content", "refusal", "cached_tokens", "error"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=5),
    max_leaves=25,
)
NEARLY = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"message": JSON, "finish_reason": JSON}), max_size=2)},
    optional={"usage": JSON, "model": JSON},
)


@given(st.binary(max_size=200) | NEARLY | JSON)
def test_no_body_raises_anything_else(body: object) -> None:
    """Whatever arrives, parse returns storable text or raises MalformedAnswerError."""
    with suppress(MalformedAnswerError):
        OpenAI().parse(answered(body)).content.encode()
