"""The server holds many callers, shows what arrived, and stops cleanly."""

import asyncio
import signal
import subprocess
import sys

import httpx
import pytest

from tests.conftest import PATIENCE_SECONDS

SERVE = "from attune_worker.simulator import serve; serve()"


def test_what_arrived_is_shown_without_secrets(simulate):
    """Path, model and headers are shown; keys are not."""
    caller = simulate()
    caller.anthropic(headers={"x-api-key": "sk-secret", "anthropic-version": "2023-06-01", "x-mark": "seen"})
    caller.openai(headers={"authorization": "Bearer sk-secret"}, messages=[])
    shown = caller.http.get("/_sim/requests", params={"last": 5})
    first, second = shown.json()["requests"]
    assert (first["path"], first["model"], first["status"]) == ("/v1/messages", "claude-haiku-4-5", 200)
    assert first["headers"]["x-mark"] == "seen"
    assert (second["path"], second["status"]) == ("/v1/chat/completions", 400)
    assert "sk-secret" not in shown.text


def test_only_the_last_requests_are_shown(simulate):
    """``last`` keeps the newest, in the order they came."""
    caller = simulate()
    for model in ("a", "b", "c"):
        caller.anthropic(model=model)
    assert [seen["model"] for seen in caller.simulator.requests(last=2)["requests"]] == ["b", "c"]
    assert caller.http.get("/_sim/requests", params={"last": "many"}).status_code == 400


def test_callers_wait_side_by_side(simulate):
    """Slow answers do not queue behind each other: all callers are in flight at once."""
    caller = simulate(latency=600)

    async def ask_all():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=caller.simulator.openai_url, limits=limits, trust_env=False) as http:
            body = {"model": "m", "messages": [{"role": "user", "content": "Why?"}]}
            call = {"json": body, "headers": {"authorization": "Bearer k"}, "timeout": None}
            calls = [asyncio.create_task(http.post("/chat/completions", **call)) for _ in range(20)]
            while (await http.get(f"{caller.simulator.url}/_sim/health")).json()["in_flight"] < len(calls):
                pass  # each round trip gives the callers their turn
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(asyncio.wait_for(ask_all(), timeout=PATIENCE_SECONDS))
    assert caller.simulator.requests(last=0)["max_in_flight"] == 20


def test_connections_are_kept_alive(simulate):
    """Refusals and answers leave the connection usable."""
    caller = simulate()
    responses = [caller.anthropic(**changes) for changes in ({}, {"messages": []}, {})]
    assert [response.status_code for response in responses] == [200, 400, 200]
    ports = {response.extensions["network_stream"].get_extra_info("client_addr") for response in responses}
    assert len(ports) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/nothing", 404), ("GET", "/v1/messages", 405), ("GET", "/v1/chat/completions", 405)],
)
def test_an_unknown_address_is_refused_as_the_apis_refuse_it(simulate, method, path, status):
    """A wrong base URL shows as an error object, not as a bare page."""
    response = simulate().http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_over_the_limit_is_refused(simulate):
    """More than 32 MiB is the official 413."""
    response = simulate().anthropic("x" * (32 * 1024 * 1024))
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "request_too_large"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_process_says_where_it_listens_and_stops_on_a_signal(number):
    """``serve`` prints its URL, answers there, and ends with code 0."""
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            assert httpx.get(f"{url}/_sim/health", trust_env=False, timeout=PATIENCE_SECONDS).json()["status"] == "ok"
        finally:
            process.send_signal(number)
        assert process.wait(timeout=PATIENCE_SECONDS) == 0
