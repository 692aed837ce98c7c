"""The simulator speaks OpenAI's Chat Completions API."""

import pytest

from attune_worker.simulator import count_tokens, prompt_digest
from attune_worker.simulator.openai import go_duration


def test_an_answer_has_the_official_shape(simulate):
    """A client written for the real API finds every field where it expects it."""
    prompt = "Why is the sky blue? Answer briefly."
    response = simulate().openai(prompt)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["x-request-id"]
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "gpt-4o-mini")
    choice = body["choices"][0]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    assert prompt_digest(prompt) in choice["message"]["content"]
    usage = body["usage"]
    assert usage["prompt_tokens"] == count_tokens(prompt)
    assert usage["completion_tokens"] == count_tokens(choice["message"]["content"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_the_same_conversation_has_the_same_answer_in_both_formats(simulate):
    """A system message here is the system prompt there."""
    caller = simulate()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    here = caller.openai(messages=messages, model="m").json()["choices"][0]["message"]["content"]
    there = caller.anthropic("Why?", system="Be brief.", model="m").json()["content"][0]["text"]
    assert here == there


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_limit_cuts_the_answer(simulate, name):
    """Both names of the output limit work, and the answer says that it was cut."""
    body = simulate().openai("One sentence that goes on for a while.", **{name: 3}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stop", ["green", ["yellow", "green"]])
def test_a_stop_sequence_ends_the_answer(simulate, stop):
    """Stop sequences may be one or many; the answer ends before the first that is met."""
    choice = simulate().openai("Red, green, blue.", stop=stop).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Red, ", "stop")


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": None}, None, None),
        ({"model": 5}, "model", "invalid_type"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": ["hello"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, None, "invalid_parameter_combination"),
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
        ({"stop_sequences": ["a"]}, "stop_sequences", "unknown_parameter"),
        ({"stream": True}, "stream", None),
        ({"n": 2}, "n", None),
    ],
)
def test_a_wrong_request_is_refused(simulate, changes, param, code):
    """What the real API refuses, the simulator refuses with the same codes, and nothing is billed."""
    caller = simulate()
    response = caller.openai(**changes)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error.pop("message")
    assert error == {"type": "invalid_request_error", "param": param, "code": code}
    assert caller.invoice()["count"] == 0


def test_a_missing_key_is_refused(simulate):
    """Without a key there is no answer."""
    assert simulate().openai(headers={}).status_code == 401


def test_a_wrong_key_is_refused_without_repeating_it(simulate):
    """The official code comes back, the key does not."""
    response = simulate(api_keys=["good"]).openai(headers={"authorization": "Bearer sk-wrong"})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "sk-wrong" not in response.text


def test_a_local_server_needs_no_key(simulate):
    """With ``require_key = false`` a caller without a key is served."""
    assert simulate(require_key=False).openai(headers={}).status_code == 200


def test_limits_are_told_in_headers(simulate):
    """A limited model says what is left, with a Go duration until it is full again."""
    headers = simulate(requests_per_minute=2).openai().headers
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-reset-requests"] == "30s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.012, "12ms"), (1.5, "1.5s"), (59.9996, "1m0s"), (360, "6m0s"), (3661.25, "1h1m1.25s")],
)
def test_durations_are_printed_as_go_prints_them(seconds, text):
    """Clients have to parse this form, so it has to be right."""
    assert go_duration(seconds) == text


def test_a_repeated_prefix_is_read_from_the_cache(simulate):
    """With ``cache``, the second call with the same system prompt reads it, unasked."""
    caller = simulate(cache=True)
    system = {"role": "system", "content": "s" * 8000}
    cached = [
        caller.openai(messages=[system, {"role": "user", "content": prompt}]).json()["usage"]["prompt_tokens_details"]
        for prompt in ("One?", "Two?")
    ]
    assert [details["cached_tokens"] for details in cached] == [0, 2000]


def test_a_short_prefix_is_not_cached(simulate):
    """Below the documented minimum nothing is cached."""
    caller = simulate(cache=True)
    system = {"role": "system", "content": "s" * 400}
    for prompt in ("One?", "Two?"):
        usage = caller.openai(messages=[system, {"role": "user", "content": prompt}]).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_models_are_listed_in_its_own_shape(simulate):
    """The models of the profile are what the provider offers."""
    caller = simulate(models={"gpt-4o-mini": {}})
    body = caller.http.get("/v1/models", headers={"authorization": "Bearer key"}).json()
    assert body["object"] == "list"
    assert [(model["id"], model["object"]) for model in body["data"]] == [("gpt-4o-mini", "model")]
