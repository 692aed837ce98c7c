"""Does the Messages API adapter ask what it was asked, and read what the API documents?"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import MalformedAnswerError
from attune_worker.jobs import Message, Usage
from attune_worker.providers.anthropic import Anthropic
from attune_worker.providers.base import ChatRequest, Endpoint, HttpResponse

ENDPOINT = Endpoint("anthropic", "https://api.anthropic.com", "key-of-a-test")
HELLO = (Message(role="user", content="Grüße aus Zürich"),)

# "Messages" in the API reference: every field of a plain answer.
ANSWER: dict[str, Any] = {
    "id": "msg_test",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku-4-5-20251001",
    "content": [{"type": "text", "text": "Grüezi."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 14, "output_tokens": 6, "service_tier": "standard"},
}


def answered(body: object) -> HttpResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpResponse(200, {"request-id": "req_test"}, raw)


def sent(chat: ChatRequest) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(Anthropic().build(ENDPOINT, chat).body)
    return fields


def test_a_plain_question_is_sent_as_documented() -> None:
    """URL, headers and body of the smallest request are those of the API reference, byte for byte."""
    request = Anthropic().build(ENDPOINT, ChatRequest("claude-haiku-4-5", HELLO, 64))
    assert request.url == "https://api.anthropic.com/v1/messages"
    assert request.headers == {
        "content-type": "application/json",
        "accept": "application/json",
        "anthropic-version": "2023-06-01",
        "x-api-key": "key-of-a-test",
    }
    expected = '{"model":"claude-haiku-4-5","max_tokens":64,"messages":[{"role":"user","content":"Grüße aus Zürich"}]}'
    assert request.body == expected.encode()


def test_a_subscription_s_token_goes_as_a_bearer() -> None:
    """With the beta header that the API asks for, and never as a key."""
    endpoint = Endpoint("anthropic", "https://api.anthropic.com", "token-of-a-test", bearer=True)
    headers = Anthropic().build(endpoint, ChatRequest("claude-haiku-4-5", HELLO, 64)).headers
    assert headers["authorization"] == "Bearer token-of-a-test"
    assert headers["anthropic-beta"] == "oauth-2025-04-20"
    assert "x-api-key" not in headers
    assert "token-of-a-test" not in repr(endpoint)


def test_every_option_has_its_field() -> None:
    """Temperature, stop sequences and the end user reach the API under its own names."""
    chat = ChatRequest(
        "claude-haiku-4-5", HELLO, 64, temperature=0.0, stop=("END", "\n\n"), end_user="u-1", session="s"
    )
    fields = sent(chat)
    assert fields["temperature"] == 0.0
    assert fields["stop_sequences"] == ["END", "\n\n"]
    assert fields["metadata"] == {"user_id": "u-1"}
    assert set(fields) == {"model", "max_tokens", "messages", "temperature", "stop_sequences", "metadata"}


def test_system_messages_move_to_the_front() -> None:
    """All system texts are joined in the top-level field, in order, and leave the list of turns."""
    turns = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Hello"),
        Message(role="system", content="Be kind."),
        Message(role="user", content="Bye"),
    )
    fields = sent(ChatRequest("claude-haiku-4-5", turns, 64, system="You are a clerk."))
    assert fields["system"] == "You are a clerk.\n\nBe brief.\n\nBe kind."
    assert [turn["role"] for turn in fields["messages"]] == ["user", "assistant", "user"]


def test_no_key_sends_no_key_header() -> None:
    """An endpoint without a key, such as a gateway that adds its own, gets no empty header."""
    request = Anthropic().build(Endpoint("gateway", "http://127.0.0.1:4000"), ChatRequest("m", HELLO, 1))
    assert "x-api-key" not in request.headers


def test_a_plain_answer_is_read() -> None:
    """Text, model, finish reason, tokens and request id come out of a documented answer."""
    answer = Anthropic().parse(answered(ANSWER))
    assert (answer.content, answer.finish_reason) == ("Grüezi.", "stop")
    assert answer.usage == Usage(input_tokens=14, output_tokens=6)
    assert (answer.model_id, answer.request_id) == ("claude-haiku-4-5-20251001", "req_test")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], ""),
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two", "citations": None}], "one two"),
        # "Extended thinking": thinking and redacted blocks come before the text
        (
            [
                {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "eA=="},
                {"type": "text", "text": "42"},
            ],
            "42",
        ),
        ([{"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {}}], ""),
        ([{"type": "a_block_of_next_year", "text": 7}], ""),
    ],
)
def test_only_text_blocks_are_the_answer(content: list[object], text: str) -> None:
    """Text blocks are joined; thinking, tool calls and kinds not known yet add nothing."""
    assert Anthropic().parse(answered(ANSWER | {"content": content})).content == text


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [  # "Handling stop reasons"
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("tool_use", "tool_use"),
        ("pause_turn", "pause_turn"),
        ("a_reason_of_next_year", "a_reason_of_next_year"),
        (None, "unknown"),
    ],
)
def test_stop_reasons_are_said_in_our_words(stop_reason: str | None, finish_reason: str) -> None:
    """Documented reasons are normalised, others kept, and a missing one is not taken for a proper end."""
    assert Anthropic().parse(answered(ANSWER | {"stop_reason": stop_reason})).finish_reason == finish_reason


def test_cached_tokens_belong_to_the_prompt() -> None:
    """The API counts cache reads and writes beside input_tokens; ours hold the whole prompt ("Prompt caching")."""
    usage = {
        "input_tokens": 50,
        "cache_read_input_tokens": 100_000,
        "cache_creation_input_tokens": 700,
        "cache_creation": {"ephemeral_5m_input_tokens": 456, "ephemeral_1h_input_tokens": 244},
        "output_tokens": 503,
        "output_tokens_details": {"thinking_tokens": 450},
    }
    assert Anthropic().parse(answered(ANSWER | {"usage": usage})).usage == Usage(
        input_tokens=100_750,
        output_tokens=503,
        cache_read_tokens=100_000,
        cache_write_tokens=700,
        cache_write_1h_tokens=244,
        reasoning_tokens=450,
    )


def test_null_cache_counts_are_zero() -> None:
    """The SDK's types allow null for every count but input and output."""
    usage = {
        "input_tokens": 3,
        "output_tokens": 4,
        "cache_read_input_tokens": None,
        "cache_creation_input_tokens": None,
        "cache_creation": None,
        "output_tokens_details": None,
    }
    assert Anthropic().parse(answered(ANSWER | {"usage": usage})).usage == Usage(input_tokens=3, output_tokens=4)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"input_tokens": 3},
        {"output_tokens": 3},
        {"input_tokens": 3, "output_tokens": 4, "output_tokens_details": {"thinking_tokens": 5}},
        {"input_tokens": 3, "output_tokens": 4, "cache_creation": {"ephemeral_1h_input_tokens": 5}},
    ],
)
def test_unknown_usage_is_none_and_the_answer_stays(usage: object) -> None:
    """Missing or contradictory counts are unknown, never zero, and do not cost the answer."""
    answer = Anthropic().parse(answered(ANSWER | {"usage": usage}))
    assert answer.usage is None
    assert answer.content == "Grüezi."


@pytest.mark.parametrize("count", [-1, 1.5, True, "12", [], 2**31 + 1])
@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "cache_read_input_tokens"])
def test_counts_that_are_no_counts_are_refused(field: str, count: object) -> None:
    """Negative, broken or absurd token counts make the answer malformed instead of the bill wrong."""
    usage = {"input_tokens": 3, "output_tokens": 4} | {field: count}
    with pytest.raises(MalformedAnswerError, match=field):
        Anthropic().parse(answered(ANSWER | {"usage": usage}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>502 Bad Gateway</html>",
        b'{"content": [',
        b"\xff\xfe\xff",
        b"[" * 100_000,
        b'{"content": ' + b"9" * 5_000 + b"}",
        [],
        None,
        "text",
        {},
        ANSWER | {"content": None},
        ANSWER | {"content": "text"},
        ANSWER | {"content": ["text"]},
        ANSWER | {"content": [{"type": "text"}]},
        ANSWER | {"content": [{"type": "text", "text": None}]},
        ANSWER | {"usage": [1]},
    ],
)
def test_what_is_no_message_is_malformed(body: object) -> None:
    """Anything but a message object raises MalformedAnswerError with the status and the request id."""
    with pytest.raises(MalformedAnswerError) as caught:
        Anthropic().parse(answered(body))
    assert (caught.value.status, caught.value.request_id) == (200, "req_test")


def test_half_an_emoji_is_replaced() -> None:
    """Text cut inside a surrogate pair still fits into UTF-8, and whole pairs beside it survive."""
    body = json.dumps(ANSWER).replace("Gr\\u00fcezi.", "ok \\ud83d\\ude00 cut \\ud83d").encode()
    assert Anthropic().parse(answered(body)).content == "ok 😀 cut \ufffd"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*ANSWER, "text", "input_tokens", "output_tokens"]) | st.text(), inner, max_size=5
        )
    ),
    max_leaves=25,
)


@given(st.binary(max_size=200) | st.fixed_dictionaries({}, optional=dict.fromkeys(ANSWER, JSON)) | JSON)
def test_no_body_raises_anything_else(body: object) -> None:
    """Whatever arrives, parse returns storable text or raises MalformedAnswerError."""
    with suppress(MalformedAnswerError):
        Anthropic().parse(answered(body)).content.encode()
