"""The simulator misbehaves exactly as its profile says."""

import json
from email.utils import parsedate_to_datetime

import httpx
import pytest

from tests.conftest import PATIENCE_SECONDS

WIRES = ["anthropic", "openai"]

REFUSALS = {
    "anthropic": {
        "rate_limited": (429, "rate_limit_error"),
        "overloaded": (529, "overloaded_error"),
        "server_error": (500, "api_error"),
        "bad_request": (400, "invalid_request_error"),
        "credential": (401, "authentication_error"),
        "spend_limit": (429, "rate_limit_error"),
        "context_too_long": (400, "invalid_request_error"),
    },
    "openai": {
        "rate_limited": (429, "requests"),
        "overloaded": (503, "server_error"),
        "server_error": (500, "server_error"),
        "bad_request": (400, "invalid_request_error"),
        "credential": (401, "invalid_request_error"),
        "spend_limit": (429, "insufficient_quota"),
        "context_too_long": (400, "invalid_request_error"),
    },
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("fault", REFUSALS["anthropic"])
def test_a_refusal_has_the_formats_own_status_and_type(simulate, wire, fault):
    """Each class of failure looks like the real provider's, and a refused call costs nothing."""
    caller = simulate(errors={fault: 1})
    response = caller.ask(wire)
    assert (response.status_code, response.json()["error"]["type"]) == REFUSALS[wire][fault]
    assert caller.invoice()["count"] == 0


def test_a_spend_limit_can_be_told_from_a_rate_limit(simulate):
    """Both are a 429; the code and the missing Retry-After tell them apart."""
    caller = simulate(errors={"spend_limit": 1})
    anthropic, openai = caller.anthropic(), caller.openai()
    assert anthropic.json()["error"]["details"] == {"error_code": "enforced_spend_limit_reached"}
    assert openai.json()["error"]["code"] == "insufficient_quota"
    assert "retry-after" not in anthropic.headers
    assert "retry-after" not in openai.headers


def test_a_prompt_that_fits_no_window_has_openais_code(simulate):
    """OpenAI names this error; Anthropic only words it."""
    caller = simulate(errors={"context_too_long": 1})
    assert caller.openai().json()["error"]["code"] == "context_length_exceeded"
    assert caller.anthropic("12345678").json()["error"]["message"] == "prompt is too long: 2 tokens > 1 maximum"


def test_a_context_window_refuses_only_longer_prompts(simulate):
    """A prompt that just fits is answered."""
    caller = simulate(context_window=10)
    assert caller.anthropic("x" * 40).status_code == 200
    assert caller.anthropic("x" * 41).json()["error"]["message"] == "prompt is too long: 11 tokens > 10 maximum"


@pytest.mark.parametrize(
    ("form", "header", "value"),
    [("retry-after", "retry-after", "2.5"), ("retry-after-ms", "retry-after-ms", "2500")],
)
def test_retry_after_comes_in_the_chosen_form(simulate, form, header, value):
    """Seconds and milliseconds are both in use."""
    response = simulate(errors={"rate_limited": 1}, retry_after={"seconds": 2.5, "form": form}).openai()
    assert response.headers[header] == value


def test_retry_after_can_be_a_date(simulate):
    """An HTTP date lies as far ahead of the Date header as the caller shall wait."""
    profile = {"errors": {"rate_limited": 1}, "retry_after": {"seconds": 120, "form": "http-date"}}
    headers = simulate(**profile).anthropic().headers
    wait = parsedate_to_datetime(headers["retry-after"]) - parsedate_to_datetime(headers["date"])
    assert 119 <= wait.total_seconds() <= 121


def test_retry_after_can_be_absent(simulate):
    """Absent headers are normal."""
    response = simulate(errors={"rate_limited": 1}, retry_after={"form": "none"}).openai()
    assert response.status_code == 429
    assert not [name for name in response.headers if name.startswith("retry-after")]


@pytest.mark.parametrize("wire", WIRES)
def test_requests_per_minute_are_enforced_for_each_model(simulate, wire):
    """The call over the limit is told when the next one may come; another model has its own limit."""
    caller = simulate(requests_per_minute=2)
    statuses = [caller.ask(wire, model="a").status_code for _ in range(2)]
    refused = caller.ask(wire, model="a")
    assert [*statuses, refused.status_code] == [200, 200, 429]
    assert 0 < float(refused.headers["retry-after"]) <= 30
    assert caller.ask(wire, model="b").status_code == 200


@pytest.mark.parametrize("wire", WIRES)
def test_a_truncated_answer_is_complete_http_and_broken_json(simulate, wire):
    """The response ends as announced, its JSON does not, and the provider charges."""
    caller = simulate(errors={"truncated": 1})
    response = caller.ask(wire)
    assert response.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        response.json()
    assert [call["outcome"] for call in caller.invoice()["calls"]] == ["truncated"]


@pytest.mark.parametrize("wire", WIRES)
def test_a_malformed_answer_is_a_page_of_html(simulate, wire):
    """A proxy's page arrives with status 200, and the provider charges."""
    caller = simulate(errors={"malformed": 1})
    response = caller.ask(wire)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html")
    assert [call["outcome"] for call in caller.invoice()["calls"]] == ["malformed"]


@pytest.mark.parametrize("wire", WIRES)
def test_a_disconnect_breaks_off_in_the_middle_of_the_answer(simulate, wire):
    """The announced body never arrives in full, and the provider charges."""
    caller = simulate(errors={"disconnect": 1})
    with pytest.raises(httpx.RemoteProtocolError):
        caller.ask(wire)
    assert [call["outcome"] for call in caller.invoice()["calls"]] == ["disconnect"]


@pytest.mark.parametrize("wire", WIRES)
def test_a_hanging_call_is_never_answered(simulate, until, wire):
    """The caller has to give up by itself, and the provider charges."""
    caller = simulate(errors={"hang": 1})
    caller.http.timeout = httpx.Timeout(PATIENCE_SECONDS, read=0.05)
    with pytest.raises(httpx.ReadTimeout):
        caller.ask(wire)
    caller.http.timeout = httpx.Timeout(PATIENCE_SECONDS)
    calls = until(lambda: caller.invoice()["calls"])  # the provider may see the request after its caller has gone
    assert [call["outcome"] for call in calls] == ["hang"]


def test_closing_ends_hanging_calls(simulate):
    """A simulator with a caller hanging on it still shuts down, and its thread ends."""
    caller = simulate(errors={"hang": 1})
    caller.http.timeout = httpx.Timeout(PATIENCE_SECONDS, read=0.05)
    with pytest.raises(httpx.ReadTimeout):
        caller.anthropic()
    caller.simulator.close()
    with pytest.raises(httpx.ConnectError):
        caller.http.get("/_sim/health")


def test_a_caller_that_leaves_early_is_charged(simulate, until):
    """The model runs on when nobody waits any more, so the call is billed as abandoned."""
    caller = simulate(latency=600)
    caller.http.timeout = httpx.Timeout(PATIENCE_SECONDS, read=0.05)
    with pytest.raises(httpx.ReadTimeout):
        caller.anthropic()
    caller.http.timeout = httpx.Timeout(PATIENCE_SECONDS)
    calls = until(lambda: caller.invoice()["calls"])  # the server learns of the closed connection on its own event loop
    assert [call["outcome"] for call in calls] == ["abandoned"]


def test_the_same_seed_gives_the_same_fates(simulate):
    """Two runs with one seed fail at the same calls; another seed fails at others."""
    errors = {"overloaded": 0.3, "rate_limited": 0.2}

    def statuses(seed):
        caller = simulate(seed=seed, errors=errors)
        return [caller.anthropic().status_code for _ in range(40)]

    first = statuses(7)
    assert first == statuses(7)
    assert first != statuses(8)
    assert set(first) == {200, 429, 529}


def test_a_retry_can_fare_differently(simulate):
    """The fate belongs to the call, not to the prompt."""
    caller = simulate(seed=1, errors={"overloaded": 0.5})
    assert len({caller.openai("the same prompt").status_code for _ in range(20)}) == 2


def test_one_model_can_be_down_alone(simulate):
    """A table under ``models`` replaces the profile's for that model only."""
    caller = simulate(models={"claude-haiku-4-5": {"errors": {"overloaded": 1}}})
    assert caller.anthropic(model="claude-haiku-4-5").status_code == 529
    assert caller.anthropic(model="claude-sonnet-4-5").status_code == 200


@pytest.mark.parametrize("wire", WIRES)
def test_a_model_can_be_missing(simulate, wire):
    """With ``only_listed_models`` an unlisted model is a 404."""
    caller = simulate(only_listed_models=True, models={"known": {}})
    assert caller.ask(wire, model="known").status_code == 200
    assert caller.ask(wire, model="unknown").status_code == 404
