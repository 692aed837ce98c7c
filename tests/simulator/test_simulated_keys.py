"""Each key and each subscription has an account of its own, and fails by itself."""

import json
import subprocess
import sys

import httpx
import pytest

from attune_worker.errors import ConfigurationError
from attune_worker.simulator import Profile
from tests.examples.stack import ROOT
from tests.simulator.conftest import BEARER, HUNDRED, TOKEN, VERSION, told, windows


def test_a_token_is_accepted_where_anthropic_takes_it(simulate):
    """As a bearer of the Anthropic format; as a key, or in the other format, it is wrong."""
    caller = simulate(**windows(), api_keys=["good"])
    assert caller.anthropic(headers=BEARER).status_code == 200
    assert caller.anthropic(headers={**VERSION, "x-api-key": "good"}).status_code == 200
    assert caller.anthropic(headers={**VERSION, "x-api-key": TOKEN}).status_code == 401
    assert caller.openai(headers={"authorization": f"Bearer {TOKEN}"}).status_code == 401
    assert caller.anthropic(headers={**VERSION, "authorization": "Bearer other"}).status_code == 401


@pytest.mark.parametrize(
    ("field", "wire", "status", "word"),
    [
        ("refused_keys", "anthropic", 401, "authentication_error"),
        ("refused_keys", "openai", 401, "invalid_api_key"),
        ("unpaid_keys", "anthropic", 402, "billing_error"),
        ("unpaid_keys", "openai", 402, "Insufficient Balance"),
        ("spend_limited_keys", "anthropic", 429, "enforced_spend_limit_reached"),
        ("spend_limited_keys", "openai", 429, "insufficient_quota"),
    ],
)
def test_one_key_fails_while_the_others_serve(simulate, field, wire, status, word):
    """It can begin and end while the simulator runs, and costs nothing meanwhile."""
    caller = simulate(api_keys=["key-a", "key-b"])
    keys = [{**VERSION, "x-api-key": key, "authorization": f"Bearer {key}"} for key in ("key-a", "key-b")]
    assert caller.http.put("/_sim/profile", json={field: ["key-a"]}).status_code == 200
    refused, served = (caller.ask(wire, headers=headers) for headers in keys)
    assert (refused.status_code, served.status_code) == (status, 200)
    assert word in refused.text
    assert "retry-after" not in refused.headers
    caller.simulator.profile = caller.simulator.profile.model_copy(update={field: ()})
    assert caller.ask(wire, headers=keys[0]).status_code == 200
    assert caller.invoice()["count"] == 2


def test_a_fault_of_one_key_leaves_the_windows_as_they_are(simulate):
    """A change elsewhere in the profile starts no window anew; a change of the subscription does."""
    caller = simulate(**windows(used_5h=0.5))
    caller.anthropic(**HUNDRED, headers=BEARER)
    shown = caller.http.get("/_sim/profile")
    assert TOKEN not in shown.text
    caller.http.put("/_sim/profile", json={**shown.json(), "refused_keys": [TOKEN]})
    assert caller.anthropic(**HUNDRED, headers=BEARER).status_code == 401
    caller.http.put("/_sim/profile", json={"refused_keys": []})
    assert told(caller.anthropic(**HUNDRED, headers=BEARER))["5h-utilization"] == "0.7"
    caller.http.put("/_sim/profile", json=windows(used_5h=0.1))
    assert told(caller.anthropic(**HUNDRED, headers=BEARER))["5h-utilization"] == "0.2"


def test_a_reset_gives_the_windows_their_first_state(simulate):
    """Use and counts are those of the start."""
    caller = simulate(**windows(used_5h=0.5))
    before = caller.simulator.subscriptions()["…1234"]
    caller.anthropic(**HUNDRED, headers=BEARER)
    caller.simulator.reset()
    after = caller.simulator.subscriptions()["…1234"]
    used = [report["windows"]["5h"]["used_tokens"] for report in (before, after)]
    assert (used, after["served"]) == ([500, 500], 0)


def test_a_call_of_a_subscription_costs_nothing_and_says_so(simulate):
    """Its tokens stay on the line; a model without a price is no gap then."""
    caller = simulate(**windows(name="team"))
    body = caller.anthropic(model="my-own-model", headers=BEARER).json()
    caller.anthropic()
    paid_by_quota, paid = caller.invoice()["calls"]
    assert (paid_by_quota["auth_mode"], paid_by_quota["cost_usd"]) == ("subscription", "0.000000000")
    assert paid_by_quota["usage"]["output_tokens"] == body["usage"]["output_tokens"]
    assert paid["auth_mode"] == "api"
    assert caller.invoice()["total_usd"] == paid["cost_usd"] != "0.000000000"
    assert caller.invoice()["unpriced"] == 0


def test_the_invoice_is_split_by_key(simulate):
    """Who served how much can be seen from the summary, and no key can be read from it."""
    caller = simulate(**windows(name="team"))
    keys = ["sk-secret-aaaa", "sk-secret-bbbb"]
    for key in [*keys, keys[0]]:
        caller.anthropic(headers={**VERSION, "x-api-key": key})
    caller.anthropic(headers=BEARER)
    response = caller.http.get("/_sim/invoice", params={"summary": 1})
    rows = [(row["key"], row["auth_mode"], row["count"]) for row in response.json()["by_key"]]
    assert rows == [("…aaaa", "api", 2), ("…bbbb", "api", 1), ("team", "subscription", 1)]
    lines = caller.http.get("/_sim/invoice").text
    requests = caller.http.get("/_sim/requests")
    assert [seen["key"] for seen in requests.json()["requests"]] == ["…aaaa", "…bbbb", "…aaaa", "team"]
    for shown in (response.text, lines, requests.text, repr(caller.simulator.profile)):
        assert "secret" not in shown


def test_accounts_can_be_read_over_http(simulate):
    """The same as from Python, by the subscription's name."""
    caller = simulate(**windows(name="team", used_5h=0.9))
    caller.anthropic(**HUNDRED, headers=BEARER)
    caller.anthropic(**HUNDRED, headers=BEARER)
    shown = caller.http.get("/_sim/subscriptions").json()
    assert shown == caller.simulator.subscriptions()
    quota = shown["team"]
    assert (quota["served"], quota["refused"], quota["went_over"], quota["tokens"]) == (1, 1, 0, 100)
    assert quota["windows"]["5h"]["capacity_tokens"] == quota["windows"]["5h"]["used_tokens"] == 1000


@pytest.mark.parametrize(("key", "shown"), [("sk-ant-1234567890", "…7890"), ("key-a", "…-a"), ("k", "…k")])
def test_a_key_is_shown_by_its_end(key, shown):
    """Four characters, and of a short key at most half, or its only one."""
    assert Profile().key_name(key) == shown


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (windows(used_5h=1.5), r"'subscriptions\.…1234\.windows\.5h\.used'"),
        (windows(capacity=0), r"'subscriptions\.…1234\.windows\.5h\.capacity_tokens'"),
        (windows(decimals=0), r"'subscriptions\.…1234\.decimals'"),
        ({"subscriptions": {TOKEN: {"windows": {}}}}, r"'subscriptions\.…1234\.windows'"),
        ({"subscriptions": {TOKEN: {"windows": {"1d": {"capacity_tokens": 1}}}}}, "1d"),
        ({**windows(), "api_keys": [TOKEN]}, "'api_keys' and a subscription"),
        (
            {"subscriptions": {f"{start}-secret-1234": {"windows": {"5h": {"capacity_tokens": 1}}} for start in "ab"}},
            "2 'subscriptions' are shown as …1234",
        ),
    ],
)
def test_a_wrong_subscription_is_refused_without_its_token(tmp_path, fields, words):
    """The message names the file, the field and the end of the token."""
    path = tmp_path / "p.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigurationError, match=words) as caught:
        Profile.load(path)
    assert "p.json" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_profile_from_a_file_is_served():
    """``attune-worker simulator --profile`` knows subscriptions and keys; shown with the example of the docs."""
    example = ROOT / "examples/simulator.toml"
    command = [sys.executable, "-m", "attune_worker", "simulator", "--port", "0", "--profile", str(example)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            with httpx.Client(base_url=process.stdout.readline().strip(), trust_env=False) as http:
                message = {"role": "user", "content": "x" * 4_000_000}
                body = {"model": "m", "max_tokens": 1, "messages": [message]}
                bearer = {**VERSION, "authorization": "Bearer simulated-subscription"}
                refused = http.post("/v1/messages", json=body, headers=bearer)
                wrong = http.post("/v1/messages", json=body, headers={**VERSION, "x-api-key": "simulated-key-2"})
                quota = http.get("/_sim/subscriptions").json()["team"]
        finally:
            process.terminate()
    assert (refused.status_code, told(refused)["status"], wrong.status_code) == (429, "rejected", 402)
    assert quota["refused"] == 1


def test_an_answer_that_arrived_is_on_the_account(simulate):
    """Whoever has the answer finds it billed and counted."""
    caller = simulate(**windows(capacity=100_000))
    for count in range(1, 21):
        caller.anthropic(headers=BEARER)
        assert caller.simulator.invoice(summary=True)["count"] == count
        assert caller.simulator.subscriptions()["…1234"]["served"] == count
