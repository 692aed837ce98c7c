"""The invoice is exact: it can be recounted from the answers."""

from decimal import Decimal

import pytest

from attune_worker.simulator import BilledCall, Price
from attune_worker.simulator.invoice import cost_of
from attune_worker.simulator.wire import Tokens

NANO = Decimal("1e-9")

# USD per million tokens: input, output (anthropic.com/pricing, openai.com/api/pricing)
HAIKU = (Decimal(1), Decimal(5))
MINI = (Decimal("0.15"), Decimal("0.60"))


def priced(rates, input_tokens, output_tokens):
    """Recount a call by hand."""
    return ((rates[0] * input_tokens + rates[1] * output_tokens) / 1_000_000).quantize(NANO)


def billed(tokens, price=None, model="claude-haiku-4-5"):
    """Return a call made on a fixed day, so that its price stays what it was."""
    return BilledCall("id", "request", 1_767_225_600.0, "anthropic", model, model, "succeeded", tokens, price)


def test_the_total_is_the_sum_of_the_answers(simulate):
    """Counting the usage of every answer by hand gives the provider's total to the nano-dollar."""
    caller = simulate()
    expected = Decimal(0)
    for length in range(1, 30, 3):
        usage = caller.anthropic("word " * length).json()["usage"]
        expected += priced(HAIKU, usage["input_tokens"], usage["output_tokens"])
        usage = caller.openai("word " * length).json()["usage"]
        expected += priced(MINI, usage["prompt_tokens"], usage["completion_tokens"])
    invoice = caller.invoice()
    assert invoice["total_usd"] == format(expected, "f")
    assert invoice["count"] == len(invoice["calls"]) == 20
    assert sum(Decimal(call["cost_usd"]) for call in invoice["calls"]) == expected


def test_a_line_names_the_call(simulate):
    """A line can be matched with the answer, and says what was billed."""
    caller = simulate()
    response = caller.anthropic("12345678")
    (line,) = caller.invoice()["calls"]
    assert line["id"] == response.json()["id"]
    assert line["request_id"] == response.headers["request-id"]
    assert (line["wire"], line["model"], line["outcome"]) == ("anthropic", "claude-haiku-4-5", "succeeded")
    assert line["usage"] == {
        "input_tokens": 2,
        "output_tokens": response.json()["usage"]["output_tokens"],
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "cache_write_1h_tokens": 0,
    }


@pytest.mark.parametrize("wire", ["anthropic", "openai"])
def test_a_line_has_the_callers_own_id(simulate, wire):
    """Sent as x-client-request-id; a caller without one has none on its line."""
    caller = simulate()
    keys = {"x-api-key": "key", "authorization": "Bearer key", "anthropic-version": "2023-06-01"}
    caller.ask(wire, headers={**keys, "X-Client-Request-Id": "call-7"})
    caller.ask(wire)
    assert [line["client_request_id"] for line in caller.invoice()["calls"]] == ["call-7", None]


def test_the_summary_leaves_the_calls_out(simulate):
    """A long invoice can be read by its totals."""
    caller = simulate()
    caller.anthropic()
    summary = caller.http.get("/_sim/invoice", params={"summary": 1}).json()
    assert summary == {name: value for name, value in caller.invoice().items() if name != "calls"}


def test_an_empty_invoice_is_zero(simulate):
    """The total keeps its nine decimals when there is nothing to add."""
    assert simulate().invoice() == {
        "calls": [],
        "count": 0,
        "total_usd": "0.000000000",
        "unpriced": 0,
        "by_key": [],
    }


def test_an_unknown_price_is_null_and_counted(simulate):
    """What nobody can price is never priced at zero."""
    caller = simulate()
    caller.openai(model="my-own-model")
    invoice = caller.invoice()
    assert (invoice["unpriced"], invoice["total_usd"]) == (1, "0.000000000")
    assert invoice["calls"][0]["cost_usd"] is None


def test_a_profile_can_price_a_model(simulate):
    """The profile's own price is used for the model it names."""
    price = {"input_usd": "2.5", "output_usd": "0"}
    caller = simulate(models={"my-own-model": {"price": price}})
    caller.openai("x" * 400, model="my-own-model")
    assert caller.invoice()["total_usd"] == "0.000250000"


def test_an_alias_is_billed_as_what_served_it(simulate):
    """The answer and the invoice name the dated model; the invoice remembers what was asked for."""
    caller = simulate(models={"claude-haiku-4-5": {"served_as": "claude-haiku-4-5-20251001"}})
    assert caller.anthropic().json()["model"] == "claude-haiku-4-5-20251001"
    (line,) = caller.invoice()["calls"]
    assert (line["requested_model"], line["model"]) == ("claude-haiku-4-5", "claude-haiku-4-5-20251001")
    assert line["cost_usd"] is not None


def test_reading_in_between_changes_nothing(simulate):
    """Calls are priced when somebody reads; reading often gives the same total as reading once."""
    caller = simulate()
    for count in range(1, 4):
        caller.anthropic()
        assert caller.invoice()["count"] == count
    once = {call["cost_usd"] for call in caller.invoice()["calls"]}
    assert len(once) == 1


def test_a_reset_starts_a_new_invoice(simulate):
    """After a reset nothing has been billed, seen or counted."""
    caller = simulate(requests_per_minute=1)
    caller.anthropic()
    assert caller.http.post("/_sim/reset").status_code == 200
    assert caller.invoice()["count"] == 0
    assert caller.http.get("/_sim/requests").json()["requests"] == []
    assert caller.anthropic().status_code == 200


def test_cached_tokens_are_billed_at_their_own_price():
    """600 fresh, 100 read at a tenth, 200 written at 1.25, 100 written for an hour at 2, and 5 out."""
    tokens = Tokens(input=1000, output=5, cache_read=100, cache_write=300, cache_write_1h=100)
    assert cost_of(billed(tokens)) == Decimal("0.001085000")


@pytest.mark.parametrize(
    ("price", "cost"),
    [
        (Price(input_usd=10, output_usd=100), "0.011000000"),
        (Price(input_usd=10, output_usd=100, cache_read_usd=1), "0.010100000"),
        (Price(input_usd=10, output_usd=100, cache_read_usd=1, cache_write_usd=20), "0.012100000"),
    ],
)
def test_own_prices_fall_back_to_fresh_input(price, cost):
    """Cached input costs as much as fresh input unless the profile says otherwise."""
    tokens = Tokens(input=1000, output=10, cache_read=100, cache_write=200)
    assert cost_of(billed(tokens, price)) == Decimal(cost)


@pytest.mark.parametrize(("tokens", "cost"), [(1, "0"), (3, "0.000000002"), (5, "0.000000002")])
def test_half_a_nano_dollar_is_rounded_to_even(tokens, cost):
    """0.5, 1.5 and 2.5 nano-dollars become 0, 2 and 2."""
    price = Price(input_usd="0.0005", output_usd=0)
    assert cost_of(billed(Tokens(input=tokens, output=0), price)) == Decimal(cost)
