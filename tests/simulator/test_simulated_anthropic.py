"""The simulator speaks Anthropic's Messages API."""

import pytest

from attune_worker.simulator import count_tokens, prompt_digest


def test_an_answer_has_the_official_shape(simulate):
    """A client written for the real API finds every field where it expects it."""
    prompt = "Why is the sky blue? Answer briefly."
    response = simulate().anthropic(prompt)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["request-id"].startswith("req_")
    assert body["id"].startswith("msg_")
    text = body["content"][0].pop("text")
    assert prompt_digest(prompt) in text
    assert {name: body[name] for name in ("type", "role", "model", "content", "stop_reason", "stop_sequence")} == {
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5",
        "content": [{"type": "text"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert body["usage"] == {
        "input_tokens": count_tokens(prompt),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": count_tokens(text),
        "service_tier": "standard",
    }


def test_content_may_be_blocks(simulate):
    """Text in blocks is the same prompt as the same text in a string."""
    caller = simulate()
    blocks = [{"type": "text", "text": "Why is the sky blue?"}]
    as_blocks = caller.anthropic(messages=[{"role": "user", "content": blocks}], system=[{"type": "text", "text": "S"}])
    as_text = caller.anthropic("Why is the sky blue?", system="S")
    assert as_blocks.json()["content"] == as_text.json()["content"]


def test_max_tokens_cuts_the_answer(simulate):
    """An answer that is too long stops at the limit and says so."""
    body = simulate().anthropic("One sentence that goes on for a while.", max_tokens=3).json()
    assert body["stop_reason"] == "max_tokens"
    assert body["usage"]["output_tokens"] == 3


def test_a_stop_sequence_ends_the_answer(simulate):
    """The answer ends before the sequence, which is named."""
    body = simulate().anthropic("Red, green, blue.", stop_sequences=["yellow", "green"]).json()
    assert body["content"][0]["text"] == "Red, "
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "green")


def test_an_answer_can_be_empty(simulate):
    """A stop sequence at the very start leaves no content block, as in the real API."""
    body = simulate().anthropic("Red.", stop_sequences=["Red"]).json()
    assert body["content"] == []
    assert body["usage"]["output_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model: Field required"),
        ({"model": 5}, "model: Input should be a valid string"),
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": "many"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"messages": []}, "messages: at least one message is required"),
        ({"messages": "hello"}, "messages: Input should be a valid list"),
        ({"messages": ["hello"]}, "messages.0: Input should be an object"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        (
            {"messages": [{"role": "user", "content": ""}]},
            "messages.0: all messages must have non-empty content",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: Input should be 'user' or 'assistant'"),
        ({"temperature": 1.5}, "temperature: range: 0..1"),
        ({"stop_sequences": [" "]}, "stop_sequences: each stop sequence must contain non-whitespace"),
        ({"metadata": {"tenant": "t"}}, "metadata.tenant: Extra inputs are not permitted"),
        ({"prompt_cache_key": "k"}, "prompt_cache_key: Extra inputs are not permitted"),
        ({"stream": True}, "stream: this simulator does not stream; leave it out"),
    ],
)
def test_a_wrong_request_is_refused(simulate, changes, message):
    """What the real API refuses, the simulator refuses with the same body, and nothing is billed."""
    caller = simulate()
    response = caller.anthropic(**changes)
    assert response.status_code == 400
    assert response.json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": message},
        "request_id": response.headers["request-id"],
    }
    assert caller.invoice()["count"] == 0


def test_a_system_message_belongs_into_its_own_field(simulate):
    """The role that OpenAI allows is refused here, with a hint."""
    response = simulate().anthropic(messages=[{"role": "system", "content": "Be brief."}])
    assert response.status_code == 400
    assert 'Unexpected role "system"' in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": "\\ud800', b"\xff\xfe\xfa"])
def test_a_body_that_is_no_json_object_is_refused(simulate, content):
    """Broken bodies get the official error, not a broken connection."""
    headers = {"x-api-key": "key", "anthropic-version": "2023-06-01"}
    response = simulate().http.post("/v1/messages", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_text_that_is_no_unicode_is_refused(simulate):
    """JSON can escape half a surrogate pair; that is a bad request like any other."""
    content = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"\\ud800"}]}'
    headers = {"x-api-key": "key", "anthropic-version": "2023-06-01"}
    assert simulate().http.post("/v1/messages", content=content, headers=headers).status_code == 400


def test_the_version_header_is_required(simulate):
    """A client that forgets the version learns it here and not in production."""
    response = simulate().anthropic(headers={"x-api-key": "key"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "anthropic-version: header is required"


def test_a_missing_key_is_refused(simulate):
    """Without a key there is no answer."""
    response = simulate().anthropic(headers={"anthropic-version": "2023-06-01"})
    assert response.status_code == 401
    assert response.json()["error"] == {"type": "authentication_error", "message": "x-api-key header is required"}


def test_only_listed_keys_open(simulate):
    """A profile with keys refuses all others, whether sent as a key or as a subscription's bearer token."""
    caller = simulate(api_keys=["good"])
    version = {"anthropic-version": "2023-06-01"}
    assert caller.anthropic(headers={**version, "x-api-key": "bad"}).status_code == 401
    assert caller.anthropic(headers={**version, "x-api-key": "good"}).status_code == 200
    assert caller.anthropic(headers={**version, "authorization": "Bearer good"}).status_code == 200


def test_limits_are_told_in_headers(simulate):
    """A limited model says what is left, with an RFC 3339 reset."""
    headers = simulate(requests_per_minute=2).anthropic().headers
    assert headers["anthropic-ratelimit-requests-limit"] == "2"
    assert headers["anthropic-ratelimit-requests-remaining"] == "1"
    assert headers["anthropic-ratelimit-requests-reset"].endswith("Z")


def test_a_marked_prefix_is_written_then_read(simulate):
    """With ``cache``, a marked prefix costs a write the first time and a read after that."""
    caller = simulate(cache=True)
    system = [{"type": "text", "text": "s" * 8000, "cache_control": {"type": "ephemeral"}}]
    first = caller.anthropic("One?", system=system).json()["usage"]
    second = caller.anthropic("Two?", system=system).json()["usage"]
    assert (first["input_tokens"], first["cache_creation_input_tokens"], first["cache_read_input_tokens"]) == (
        1,
        2000,
        0,
    )
    assert first["cache_creation"] == {"ephemeral_5m_input_tokens": 2000, "ephemeral_1h_input_tokens": 0}
    assert (second["input_tokens"], second["cache_creation_input_tokens"], second["cache_read_input_tokens"]) == (
        1,
        0,
        2000,
    )


def test_an_hour_of_cache_is_counted_apart(simulate):
    """Anthropic charges more for a prefix kept for an hour, so it has a count of its own."""
    marker = {"type": "ephemeral", "ttl": "1h"}
    system = [{"type": "text", "text": "s" * 8000, "cache_control": marker}]
    usage = simulate(cache=True).anthropic(system=system).json()["usage"]
    assert usage["cache_creation"] == {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 2000}


def test_an_unmarked_prefix_is_not_cached(simulate):
    """Anthropic caches only what it is asked to cache."""
    caller = simulate(cache=True)
    for prompt in ("One?", "Two?"):
        assert caller.anthropic(prompt, system="s" * 8000).json()["usage"]["cache_read_input_tokens"] == 0


def test_models_are_listed_in_its_own_shape(simulate):
    """The models of the profile are what the provider offers."""
    response = simulate(models={"claude-haiku-4-5": {}}).http.get(
        "/v1/models", headers={"x-api-key": "key", "anthropic-version": "2023-06-01"}
    )
    body = response.json()
    assert [model["id"] for model in body["data"]] == ["claude-haiku-4-5"]
    assert (body["data"][0]["type"], body["has_more"]) == ("model", False)
