"""Does the provider's account agree with ours, and is it said exactly where it does not?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from attune_worker.errors import AttuneError
from attune_worker.invoices import InvoiceError, InvoiceLine, lines_of, read_invoice
from attune_worker.ledger import Ledger
from attune_worker.ledger_record import LedgerRecord
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.reconcile import Reconciliation, reconcile
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from tests.conftest import API_KEY

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
TODAY = NOON.date()


def recorded(call_id: str = "call-1", cost_usd: str | None = "0.25", **fields: Any) -> LedgerRecord:
    whole: dict[str, Any] = {
        "call_id": call_id,
        "job_id": "job-1",
        "tenant": None,
        "workflow": "review",
        "stage": "summarize",
        "provider": "anthropic",
        "model_id": "haiku",
        "tier": "cheap",
        "mode": "api",
        "outcome": "succeeded",
        "error": None,
        "cost_usd": None if cost_usd is None else Decimal(cost_usd),
        "estimate_usd": Decimal(1),
        "input_tokens": 60,
        "output_tokens": 40,
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "latency_ms": 120,
        "status": None,
        "request_id": f"req-{call_id}",
        "time": NOON,
        "written": NOON,
    }
    return LedgerRecord(**{**whole, **fields})


def line(call_id: str | None = "call-1", cost_usd: str | None = "0.25", **fields: Any) -> InvoiceLine:
    return InvoiceLine("haiku", None if cost_usd is None else Decimal(cost_usd), call_id, **fields)


def kinds(result: Reconciliation) -> list[tuple[str, str | None]]:
    return [(one.kind, one.call_id) for one in result.differences]


@pytest.fixture
def executor(settings: Settings) -> Iterator[EmpathyLLMExecutor]:
    with EmpathyLLMExecutor(settings) as found:
        yield found


@pytest.mark.parametrize("how", ["memory", "json", "csv", "jsonl", "sums"])
def test_real_invoice_agrees(
    executor: EmpathyLLMExecutor, settings: Settings, redis: Redis, simulator: Simulator, tmp_path: Path, how: str
) -> None:
    """With failures, both wire formats and a crowd, in every form that can be read, to the nano-dollar."""
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "errors": {"overloaded": 0.2}, "seed": 7})

    def ask(number: int) -> None:
        try:
            executor.run("summarize", "word " * number + "?", model=("gpt-6-luna", "claude-haiku-5-5")[number % 2])
        except AttuneError:
            return

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(20)))
    report = simulator.invoice()
    result = reconcile(Ledger(settings, redis).records(), in_form(how, report, tmp_path))
    assert (result.differences, result.uncertain, result.agrees) == ((), (), True)
    assert result.billed_usd == result.recorded_usd == Decimal(report["total_usd"]) > 0
    assert (
        result.billed_calls == report["count"] < result.recorded_calls
    )  # refused calls are recorded, and cost nothing
    assert result.matched_calls == (0 if how == "sums" else report["count"])


def in_form(how: str, report: dict[str, Any], folder: Path) -> list[InvoiceLine]:
    """Return the lines of the simulator's invoice, by way of a file."""
    calls = report["calls"]
    if how == "memory":
        return lines_of(report)
    path = folder / f"invoice.{how}"
    if how == "json":
        path.write_text(json.dumps(report))
        return read_invoice(path)
    if how == "jsonl":
        rows = [{"request_id": one["request_id"], "model": one["model"], "cost_usd": one["cost_usd"]} for one in calls]
        path.write_text("\n".join(map(json.dumps, rows)))
        return read_invoice(path)
    if how == "csv":
        rows = [f"{one['client_request_id']},{one['model']},{one['cost_usd']},ignored" for one in calls]
        path.write_text("\ufeffcall,model,amount,note\r\n" + "\r\n".join(rows) + "\r\n")
        return read_invoice(path, {"client_request_id": "call", "cost_usd": "amount"})
    path = folder / "sums.csv"
    rows = []
    for model in sorted({one["model"] for one in calls}):
        of_model = [one for one in calls if one["model"] == model]
        day = datetime.fromtimestamp(of_model[0]["time"], UTC).date()
        rows.append(f"{day},{model},{sum(Decimal(one['cost_usd']) for one in of_model)},{len(of_model)}")
    path.write_text("day,model,cost_usd,calls\n" + "\n".join(rows))
    return read_invoice(path)


def test_call_that_only_the_provider_knows() -> None:
    """Whoever made it, it was not a call of this fleet, or one that was lost."""
    result = reconcile([recorded()], [line(), line("stranger", "0.5", request_id="req-9")])
    [difference] = result.differences
    assert (difference.kind, difference.call_id, difference.request_id) == ("not in the ledger", "stranger", "req-9")
    assert (difference.billed_usd, difference.recorded_usd, result.agrees) == (Decimal("0.5"), None, False)


def test_call_that_only_we_know() -> None:
    """Said only where it cost something: a refused call stands on no invoice."""
    result = reconcile([recorded(), recorded("refused", "0", outcome="failed")], [])
    assert kinds(result) == [("not in the invoice", "call-1")]
    assert result.differences[0].recorded_usd == Decimal("0.25")


def test_cost_that_differs_is_named_with_both_numbers() -> None:
    """A nano-dollar is enough; so is a call that was billed twice, or one that was billed though it failed."""
    records = [recorded(), recorded("twice"), recorded("failed", "0", outcome="failed")]
    lines = [line(cost_usd="0.250000001"), line("twice"), line("twice"), line("failed", "0.1")]
    result = reconcile(records, lines)
    assert [(one.call_id, one.billed_usd, one.recorded_usd, one.detail) for one in result.differences] == [
        ("call-1", Decimal("0.250000001"), Decimal("0.25"), ""),
        ("twice", Decimal("0.5"), Decimal("0.25"), "billed 2 times"),
        ("failed", Decimal("0.1"), Decimal(0), ""),
    ]


@pytest.mark.parametrize(
    ("estimate", "billed", "within"),
    [("1", "1", True), ("1", "1.000000001", False), ("1", None, None), (None, "1", None)],
)
@pytest.mark.parametrize("outcome", ["orphaned", "failed"])
def test_uncertain_call_is_held_against_its_estimate(
    outcome: str, estimate: str | None, billed: str | None, within: bool | None
) -> None:
    """It is no difference, whether it was billed or not; more than budgets have counted, or could, is said."""
    record = recorded(cost_usd=None, outcome=outcome, estimate_usd=estimate and Decimal(estimate))
    result = reconcile([record], [] if billed is None else [line(cost_usd=billed)])
    [uncertain] = result.uncertain
    assert (uncertain.record, uncertain.within_estimate) == (record, within)
    assert uncertain.billed_usd == (billed and Decimal(billed))
    beyond_judging = estimate is None
    assert kinds(result) == ([("cannot be judged", "call-1")] if beyond_judging else [])
    assert result.agrees is (within is not False and not beyond_judging)


def by_tokens(call_id: str | None = "call-1", tokens: tuple[int, int] = (60, 40), **fields: Any) -> InvoiceLine:
    return line(call_id, None, input_tokens=tokens[0], output_tokens=tokens[1], **fields)


NEITHER = "billed with neither a price nor tokens"
MANY = (10**9, 10**9)
LOST = recorded(cost_usd=None, outcome="orphaned", input_tokens=None, output_tokens=None)


@pytest.mark.parametrize(
    ("lines", "kind", "detail"),
    [
        ([line(cost_usd="0.4"), line(cost_usd="0.4")], "billed more than once", "billed 2 times"),
        ([line(cost_usd="0.4"), by_tokens()], "billed more than once", "billed 2 times"),
        ([line(cost_usd="0.4", calls=2)], "the calls differ", "billed as 2 calls"),
        (
            [by_tokens(tokens=MANY)],
            "cannot be judged",
            f"billed {MANY[0]} in and {MANY[1]} out, recorded 0 in and 0 out",
        ),
        ([line(cost_usd=None)], "cannot be judged", NEITHER),
    ],
)
def test_uncertain_call_does_not_hide_what_cannot_be_its_bill(lines: list[InvoiceLine], kind: str, detail: str) -> None:
    """Each time it is charged may be within the estimate, and tokens have no estimate to be within."""
    result = reconcile([LOST], lines)
    assert [(one.kind, one.call_id, one.detail) for one in result.differences] == [(kind, "call-1", detail)]
    assert (len(result.uncertain), result.agrees) == (1, False)


@pytest.mark.parametrize("own_id", ["call-1", None])
@pytest.mark.parametrize(
    ("billed", "kind"), [("100", "the cost differs"), ("0.2", "the cost differs"), ("0.25", "cannot be judged")]
)
def test_line_without_a_price_does_not_hide_the_cost_of_another(own_id: str | None, billed: str, kind: str) -> None:
    """What is known is added up and compared; what the rest costs, nobody can say."""
    lines = [line(own_id, billed, day=TODAY), by_tokens(own_id, (1, 1), day=TODAY)]
    result = reconcile([recorded()], lines)
    [difference] = result.differences
    assert (difference.kind, difference.billed_usd, difference.recorded_usd) == (kind, Decimal(billed), Decimal("0.25"))
    assert "1 of 2 lines without a price" in difference.detail
    assert not result.agrees


def test_uncertain_call_that_is_partly_priced_is_not_called_within_its_estimate() -> None:
    """The lines without a price can only add to it; what is beyond without them stays beyond."""
    for billed, within in (("0.5", None), ("1.5", False)):
        [uncertain] = reconcile([LOST], [line(cost_usd=billed), by_tokens()]).uncertain
        assert (uncertain.billed_usd, uncertain.within_estimate) == (Decimal(billed), within)


@pytest.mark.parametrize(
    ("tokens", "agrees"),
    [((60, 40), True), ((60_000_000, 40), False)],
)
def test_call_without_a_price_on_both_sides_is_compared_by_its_tokens(tokens: tuple[int, int], agrees: bool) -> None:
    """Its answer came and was counted; only the price of it is not known."""
    result = reconcile([recorded(cost_usd=None, estimate_usd=None)], [by_tokens(tokens=tokens)])
    assert kinds(result) == ([] if agrees else [("the tokens differ", "call-1")])
    assert result.agrees is agrees


@pytest.mark.parametrize(
    ("ours", "theirs", "agrees"),
    [
        ("haiku", "haiku", True),
        ("haiku", "haiku-20261001", True),
        ("haiku-latest", "haiku@20261001", True),
        ("haiku-2026-10-01", "haiku", True),
        ("haiku-20261001", "haiku-20261101", False),
        ("haiku", "haiku-dear", False),
        ("claude-haiku-5-5", "claude-haiku-5-5-20261001", True),
        ("claude-haiku-5-5", "claude-opus-5", False),
    ],
)
def test_same_tokens_of_another_model_are_a_difference(ours: str, theirs: str, agrees: bool) -> None:
    """Published prices say whether it costs the same, else the name without its version."""
    result = reconcile([recorded(model_id=ours)], [replace(by_tokens(), model_id=theirs)])
    assert [(one.kind, one.detail) for one in result.differences] == (
        [] if agrees else [("the model differs", f"billed as {theirs}")]
    )
    assert result.agrees is agrees


def test_dated_model_at_another_published_price_is_a_difference() -> None:
    """The first version of this model costs twice what its undated name costs today."""
    record = recorded(provider="openai", model_id="gpt-4o")
    first, today = (replace(by_tokens(), model_id=f"gpt-4o-{day}") for day in ("2024-05-13", "2024-08-06"))
    assert kinds(reconcile([record], [first])) == [("the model differs", "call-1")]
    assert reconcile([record], [today]).agrees


def test_same_cost_under_another_name_agrees() -> None:
    """Where both amounts are known they are what is compared."""
    assert reconcile([recorded()], [replace(line(), model_id="an-alias")]).agrees


def test_orphan_that_was_settled_counts_once() -> None:
    """By its settlement; one that turned out never to have been made counts not at all."""
    orphan = recorded(cost_usd=None, outcome="orphaned")
    never = replace(orphan, call_id="never")
    records = [orphan, never, recorded(corrects_orphan=True), replace(never, outcome="released", cost_usd=Decimal(0))]
    result = reconcile(records, [line()])
    assert (result.recorded_calls, result.uncertain, result.agrees) == (1, (), True)


def test_request_id_is_used_where_ours_is_not_known() -> None:
    """Some exports have only the provider's own; a strange id beside it does no harm."""
    lines = [line(None, request_id="req-call-1"), line("other", request_id="req-call-2")]
    result = reconcile([recorded(), recorded("call-2")], lines)
    assert (result.matched_calls, result.agrees) == (2, True)


@pytest.mark.parametrize(
    ("tokens", "detail"),
    [((60, 40), None), ((61, 40), "billed 61 in and 40 out, recorded 60 in and 40 out"), ((None, 40), NEITHER)],
)
@pytest.mark.parametrize("own_id", ["call-1", None])
def test_line_without_a_price_is_compared_by_its_tokens(
    own_id: str | None, tokens: tuple[int | None, int], detail: str | None
) -> None:
    """Call by call and in sums alike; what the provider did not count cannot be judged."""
    priceless = line(own_id, None, input_tokens=tokens[0], output_tokens=tokens[1], day=TODAY)
    result = reconcile([recorded()], [priceless])
    assert [one.detail for one in result.differences] == ([] if detail is None else [detail])
    assert result.unpriced_lines == 1


@pytest.mark.parametrize(
    ("billed", "agrees"),
    [("0.249999999", False), ("0.25", True), ("1.25", True), ("1.250000001", False)],
)
def test_sums_of_a_day_leave_room_for_uncertain_calls(billed: str, agrees: bool) -> None:
    """Between what is known and what the uncertain ones may have cost besides, nobody can say more."""
    records = [recorded(), recorded("lost", None, outcome="orphaned")]
    result = reconcile(records, [line(None, billed, day=TODAY, calls=2)])
    assert result.agrees is agrees
    assert [(one.kind, one.day) for one in result.differences] == ([] if agrees else [("the cost differs", TODAY)])
    assert len(result.uncertain) == 1


def test_sum_beyond_the_estimates_is_not_excused_by_a_call_without_a_price() -> None:
    """It may be that call's, and nobody can say how much is too much."""
    records = [recorded(), recorded("lost", None), recorded("unpriced", None, estimate_usd=None)]
    for billed, expected in (("1.25", []), ("1000000", ["cannot be judged"]), ("0.1", ["the cost differs"])):
        result = reconcile(records, [line(None, billed, day=TODAY)])
        assert [one.kind for one in result.differences] == expected
        assert result.agrees is (not expected)


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [((60, 40), None), ((60, 41), "cannot be judged"), ((59, 41), "the tokens differ")],
)
def test_sum_of_tokens_says_what_an_uncertain_call_may_have_added(tokens: tuple[int, int], kind: str | None) -> None:
    """Refused calls count no tokens; fewer than are recorded is wrong in any case."""
    refused = recorded("refused", "0", outcome="failed", input_tokens=None, output_tokens=None)
    result = reconcile([recorded(), refused, replace(LOST, call_id="lost")], [by_tokens(None, tokens, day=TODAY)])
    assert [one.kind for one in result.differences] == ([] if kind is None else [kind])


@pytest.mark.parametrize(
    ("calls", "agrees"), [(1000, False), (3, False), (2, True), (1, True), (0, False), (None, True)]
)
@pytest.mark.parametrize("priced", [True, False])
def test_number_of_calls_is_compared_in_sums(calls: int | None, agrees: bool, priced: bool) -> None:
    """Every call with a cost is one of them, and a refused one may be; a line may say nothing of it."""
    records = [recorded(), recorded("refused", "0", outcome="failed", input_tokens=None, output_tokens=None)]
    whole = line(None, day=TODAY) if priced else by_tokens(None, day=TODAY)
    result = reconcile(records, [replace(whole, calls=calls)])
    assert [one.kind for one in result.differences] == ([] if agrees else ["the calls differ"])
    assert result.agrees is agrees


def test_sums_are_by_day_and_model() -> None:
    """A line for another day, or another model, stands for none of today's calls."""
    lines = [line(None, day=date(2026, 11, 22)), replace(line(None, day=TODAY), model_id="opus")]
    result = reconcile([recorded()], lines)
    assert [(one.kind, one.model_id, one.day) for one in result.differences] == [
        ("not in the invoice", "haiku", TODAY),
        ("not in the ledger", "haiku", date(2026, 11, 22)),
        ("not in the ledger", "opus", TODAY),
    ]


@pytest.mark.parametrize(
    ("name", "text", "where", "what"),
    [
        ("a.csv", "model,cost_usd,request_id\nhaiku,$1,r\n", (2, "cost_usd"), "'\\$1' is not an amount in USD"),
        ("a.csv", "model,cost_usd,request_id\nhaiku,NaN,r\n", (2, "cost_usd"), "'NaN' is not an amount"),
        (
            "a.csv",
            "model,cost_usd,request_id\nhaiku,1,r\nhaiku,-1,r\n",
            (3, "cost_usd"),
            "'-1' is not an amount .* 0 or",
        ),
        ("a.csv", "model,cost_usd,request_id\nhaiku,-1e-12,r\n", (2, "cost_usd"), "is not an amount"),
        ("a.csv", "model,cost_usd,day,calls\nh,1,2026-11-23,-2\n", (2, "calls"), "'-2' is not a whole number"),
        ("a.jsonl", '{"model":"h","cost_usd":-0.5,"request_id":"r"}', (1, "cost_usd"), "'-0.5' is not an amount"),
        ("a.csv", "model,cost_usd,request_id\nhaiku,,r\n", (2, "cost_usd"), "is missing, and so are tokens"),
        ("a.csv", "model,cost_usd,request_id\nhaiku,1,r\n,1,r\n", (3, "model"), "is missing"),
        ("a.csv", "model,cost_usd\nhaiku,1\n", (2, "client_request_id"), "so are request_id and day"),
        ("a.csv", "model,cost_usd,day\nhaiku,1,23.11.2026\n", (2, "day"), "is not a date or a time"),
        ("a.csv", "model,cost_usd,day\nhaiku,1,2026-11-23,5\n", (2, None), "more values than the header"),
        ("a.csv", 'model,cost_usd,day\n"haiku"x,1,2\n', (2, None), "is not CSV"),
        ("a.csv", "model,input_tokens,output_tokens,day\nh,-1,2,2026-11-23\n", (2, "input_tokens"), "whole number"),
        ("a.jsonl", '{"model":"h","cost_usd":1,"request_id":"r"}\n{\n', (2, None), "is not JSON"),
        ("a.jsonl", "[1]\n", (1, None), "is no object"),
        ("a.jsonl", '{"model":5,"cost_usd":1,"request_id":"r"}', (1, "model"), "'5' is not a model's id"),
        ("a.jsonl", '{"model":"h","cost_usd":true,"request_id":"r"}', (1, "cost_usd"), "is not an amount"),
        ("a.json", '{"count": 1}', (None, None), "holds no list of calls"),
        ("a.json", "[" * 100_000, (None, None), "is not JSON"),
        ("a.txt", "", (None, None), "an invoice is one of .csv, .jsonl, .json"),
        ("a.csv", b"model\n\xff", (None, None), "is not UTF-8 text"),
        ("a.csv", None, (None, None), "cannot be read: No such file"),
    ],
)
def test_unreadable_file_is_refused_with_line_and_column(
    tmp_path: Path, name: str, text: str | bytes | None, where: tuple[int | None, str | None], what: str
) -> None:
    """Whoever wrote the file finds the place."""
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvoiceError, match=what) as caught:
        read_invoice(path)
    assert (caught.value.line, caught.value.column, caught.value.exit_code) == (*where, 2)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["cost_usd", "input_tokens", "output_tokens", "calls"])
def test_line_below_zero_cannot_be_made(name: str) -> None:
    """A credit would hide what another line of the same call charges."""
    below: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match="no amount and no count is negative"):
        replace(line(), **below)


def test_unknown_column_names_are_refused(tmp_path: Path) -> None:
    """A misspelt mapping would read nothing."""
    with pytest.raises(InvoiceError, match="no such columns: price; known: client_request_id"):
        read_invoice(tmp_path / "a.csv", {"price": "amount"})


def test_amounts_are_read_exactly(tmp_path: Path) -> None:
    """JSON's numbers do not become floats; what is finer than a nano-dollar is rounded half to even."""
    path = tmp_path / "a.jsonl"
    row = '{"model": "h", "cost_usd": %s, "day": "2026-11-24T01:30:00+02:00"}'
    path.write_text("\n".join(row % amount for amount in ("0.1", "12345678.123456789", "0.0000000025", '"7"', "3")))
    lines = read_invoice(path)
    amounts = [Decimal(text) for text in ("0.1", "12345678.123456789", "0.000000002", "7", "3")]
    assert [one.cost_usd for one in lines] == amounts
    assert {one.day for one in lines} == {TODAY}  # by UTC
