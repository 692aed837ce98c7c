"""A subscription pays with its windows, which are told to its callers and kept."""

import json

import pytest

from attune_worker.simulator import Profile
from attune_worker.simulator.anthropic import AnthropicWire
from attune_worker.simulator.service import Service
from tests.simulator.conftest import BEARER, HUNDRED, TOKEN, UNIFIED, told, windows

NOW = 1_800_000_000.0


class Clocked:
    """A service without a network, whose time stands still until it is moved."""

    def __init__(self, **profile) -> None:
        self.now = NOW
        self.service = Service(Profile.parse(profile), clock=lambda: self.now)

    def begin(self, **changes):
        """Let a call of 100 tokens arrive, and return its reply, which is not sent yet."""
        message = {"role": "user", "content": "x" * 396}
        body = {"model": "claude-haiku-4-5", "max_tokens": 1, "messages": [message], **changes}
        return self.service.call(AnthropicWire(), "/v1/messages", BEARER, json.dumps(body).encode())

    def end(self, reply, *, abandoned=False):
        """Send the reply, and return its headers."""
        return self.service.settle(reply, abandoned=abandoned).headers

    @property
    def quota(self):
        """The account of the only subscription."""
        (quota,) = self.service.subscriptions().values()
        return quota


def test_an_answer_tells_the_windows_with_the_call_in_them():
    """All of the captured set; the call that is answered counts in both windows."""
    clocked = Clocked(**windows(used_5h=0.3, used_7d=0.5))
    headers = clocked.end(clocked.begin())
    assert {name: text for name, text in headers.items() if name.startswith(UNIFIED)} == {
        f"{UNIFIED}-status": "allowed",
        f"{UNIFIED}-5h-status": "allowed",
        f"{UNIFIED}-5h-reset": "1800000600",
        f"{UNIFIED}-5h-utilization": "0.4",
        f"{UNIFIED}-7d-status": "allowed",
        f"{UNIFIED}-7d-reset": "1800086400",
        f"{UNIFIED}-7d-utilization": "0.51",
        f"{UNIFIED}-representative-claim": "five_hour",
        f"{UNIFIED}-reset": "1800000600",
        f"{UNIFIED}-fallback-percentage": "0.5",
        f"{UNIFIED}-overage-status": "rejected",
        f"{UNIFIED}-overage-disabled-reason": "org_level_disabled",
    }


@pytest.mark.parametrize(
    ("used_5h", "used_7d", "status", "claim", "surpassed"),
    [
        (0.79, 0.73, "allowed", "five_hour", {}),
        (0.80, 0.73, "allowed_warning", "five_hour", {"5h-surpassed-threshold": "0.9"}),
        (0.10, 0.74, "allowed_warning", "seven_day", {"7d-surpassed-threshold": "0.75"}),
        (
            0.80,
            0.74,
            "allowed_warning",
            "five_hour",
            {"5h-surpassed-threshold": "0.9", "7d-surpassed-threshold": "0.75"},
        ),
        (0.90, 0.10, "allowed_warning", "five_hour", {"5h-surpassed-threshold": "1.0"}),
    ],
)
def test_a_window_that_fills_up_warns(simulate, used_5h, used_7d, status, claim, surpassed):
    """At 90 % of five hours or 75 % of seven days, and the window that warns is the representative one."""
    headers = told(simulate(**windows(used_5h, used_7d)).anthropic(**HUNDRED, headers=BEARER))
    assert (headers["status"], headers["representative-claim"]) == (status, claim)
    assert headers["reset"] == headers["5h-reset" if claim == "five_hour" else "7d-reset"]
    assert {name: text for name, text in headers.items() if "surpassed" in name} == surpassed


@pytest.mark.parametrize(("decimals", "text"), [(1, "0.4"), (2, "0.37"), (3, "0.367"), (5, "0.36667")])
def test_utilization_has_the_decimals_of_the_profile(simulate, decimals, text):
    """1100 of 3000, to the nearest."""
    caller = simulate(**windows(capacity=3000, used_5h=1 / 3, decimals=decimals))
    assert told(caller.anthropic(**HUNDRED, headers=BEARER))["5h-utilization"] == text


def test_only_a_subscription_is_told_of_windows(simulate):
    """Calls with a key, and calls that fail, carry none of these headers."""
    caller = simulate(**windows(), models={"broken": {"errors": {"overloaded": 1}}})
    assert told(caller.anthropic()) == {}
    assert told(caller.anthropic(model="broken", headers=BEARER)) == {}


@pytest.mark.parametrize(("used", "status"), [(0.9, 200), (0.901, 429), (1.0, 429)])
def test_a_call_that_does_not_fit_is_refused(simulate, used, status):
    """Up to 100 % it is served; what would be more is refused and neither counted nor billed."""
    caller = simulate(**windows(used_5h=used))
    assert caller.anthropic(**HUNDRED, headers=BEARER).status_code == status
    (quota,) = caller.simulator.subscriptions().values()
    assert (quota["served"], quota["refused"], quota["went_over"]) == ((1, 0, 0) if status == 200 else (0, 1, 0))
    assert quota["windows"]["5h"]["used_tokens"] == (1000 if status == 200 else 1000 * used)
    assert caller.invoice()["count"] == quota["served"]


def test_a_refusal_says_which_window_and_until_when():
    """The official body, both windows' states, and the seconds until the reset."""
    clocked = Clocked(**windows(used_5h=1.0, used_7d=0.2))
    clocked.now += 0.5
    reply = clocked.begin()
    assert reply.status == 429
    assert json.loads(reply.body)["error"]["type"] == "rate_limit_error"
    headers = reply.headers
    assert headers["retry-after"] == "600"
    assert headers[f"{UNIFIED}-status"] == headers[f"{UNIFIED}-5h-status"] == "rejected"
    assert headers[f"{UNIFIED}-7d-status"] == "allowed"
    assert headers[f"{UNIFIED}-5h-utilization"] == "1.0"
    assert headers[f"{UNIFIED}-representative-claim"] == "five_hour"


def test_with_both_windows_used_up_the_later_reset_counts():
    """Waiting for the five hours would be in vain."""
    headers = Clocked(**windows(used_5h=1.0, used_7d=1.0)).begin().headers
    assert headers["retry-after"] == "86400"
    assert headers[f"{UNIFIED}-representative-claim"] == "seven_day"
    assert headers[f"{UNIFIED}-reset"] == headers[f"{UNIFIED}-7d-reset"]


def test_calls_side_by_side_can_go_over_and_are_told():
    """Nothing is set aside for a call that runs, so two that fit alone may not fit together."""
    clocked = Clocked(**windows(used_5h=0.85))
    replies = [clocked.begin(), clocked.begin()]
    shown = [clocked.end(reply)[f"{UNIFIED}-5h-utilization"] for reply in replies]
    assert shown == ["0.95", "1.05"]
    assert (clocked.quota["served"], clocked.quota["went_over"]) == (2, 1)
    assert clocked.quota["windows"]["5h"]["highest_utilization"] == 1.05
    assert clocked.quota["windows"]["7d"]["used_tokens"] == 200


@pytest.mark.parametrize("fault", ["hang", "disconnect", "truncated", "malformed"])
def test_a_call_whose_answer_is_lost_counts_once(fault):
    """The model ran, whatever became of the answer."""
    clocked = Clocked(**windows(), errors={fault: 1})
    reply = clocked.begin()
    clocked.end(reply, abandoned=fault == "hang")
    assert (clocked.quota["served"], clocked.quota["tokens"]) == (1, 100)


def test_a_call_that_nobody_waits_for_counts():
    """Hanging up saves no quota."""
    clocked = Clocked(**windows(), latency=10)
    clocked.end(clocked.begin(), abandoned=True)
    assert clocked.quota["tokens"] == 100
    assert clocked.service.invoice.report()["calls"][0]["outcome"] == "abandoned"


def test_tokens_of_the_cache_count_as_well():
    """What is counted is the whole prompt and the answer."""
    clocked = Clocked(**windows(capacity=100_000), cache=True)
    marked = {"type": "text", "text": "s" * 8000, "cache_control": {"type": "ephemeral"}}
    for _ in range(2):
        clocked.end(clocked.begin(system=[marked]))
    assert clocked.quota["tokens"] == 2 * (2000 + 100)


def test_a_window_begins_anew_at_its_reset():
    """Its use is gone, the next reset is one length later, and the other window goes on."""
    clocked = Clocked(**windows(used_5h=1.0, used_7d=0.5))
    clocked.now = NOW + 599.9
    assert clocked.begin().status == 429
    clocked.now = NOW + 600
    headers = clocked.end(clocked.begin())
    assert headers[f"{UNIFIED}-5h-utilization"] == "0.1"
    assert headers[f"{UNIFIED}-5h-reset"] == str(int(NOW) + 600 + 5 * 3600)
    assert headers[f"{UNIFIED}-7d-utilization"] == "0.51"
    assert clocked.quota["windows"]["5h"]["highest_utilization"] == 1.0


def test_several_resets_may_pass_unseen():
    """A subscription that nobody used for long has its next reset in the future."""
    clocked = Clocked(**windows(used_5h=1.0))
    clocked.now = NOW + 600 + 3 * 5 * 3600
    assert clocked.quota["windows"]["5h"]["resets_at"] == NOW + 600 + 4 * 5 * 3600


def test_a_call_that_ends_after_the_reset_counts_in_the_new_window():
    """It is counted when it is over."""
    clocked = Clocked(**windows(used_5h=0.9))
    reply = clocked.begin()
    clocked.now = NOW + 700
    assert clocked.end(reply)[f"{UNIFIED}-5h-utilization"] == "0.1"
    assert clocked.quota["went_over"] == 0


def test_without_a_time_a_window_begins_with_the_simulator():
    """Then its reset is one length after the start."""
    clocked = Clocked(subscriptions={TOKEN: {"windows": {"7d": {"capacity_tokens": 100}}}})
    assert clocked.quota["windows"]["7d"]["resets_at"] == NOW + 7 * 86_400
    assert f"{UNIFIED}-5h-status" not in clocked.end(clocked.begin())
