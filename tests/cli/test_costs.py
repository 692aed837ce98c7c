import csv
import dataclasses
import json
import os
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import StringIO

import httpx
import pytest

from attune_worker.cli.costs import FIELDS
from attune_worker.invoices import COLUMNS
from attune_worker.ledger import DIMENSIONS, Comparison, Ledger
from attune_worker.models.executor import EmpathyLLMExecutor, ExecutionContext
from attune_worker.models.savings import Savings
from attune_worker.reconcile import Difference, Reconciliation, Uncertain
from attune_worker.store.keys import FleetKeys, part
from tests.examples.stack import ROOT

ROW = {
    "keys", "calls", "cost_usd", "unknown_calls", "unknown_usd", "orphaned_calls", "orphaned_usd", "unpriced_calls",
    "input_tokens", "output_tokens", "compared", "difference_percent",
}  # fmt: skip


SHOWN = (Reconciliation, Difference, Uncertain, Comparison, Savings)
"""What the JSON of these commands is made of."""


@pytest.fixture
def calls(settings):
    """Four calls to the simulator, of two workflows and two models, as the ledger has them."""
    executor = EmpathyLLMExecutor(settings)
    for number in range(3):
        context = ExecutionContext(workflow_name="nightly", step_name=f"s{number}", provider_hint="anthropic")
        executor.run("summarize", f"A text {number}.", context=context, model="claude-haiku-5-5")
    executor.run("final_review", "Another text.", context=ExecutionContext("daily", provider_hint="anthropic"))
    executor.close()
    with_ledger = Ledger(settings)
    records = list(with_ledger.records())
    with_ledger.close()
    assert len(records) == 4
    return records


@pytest.fixture
def uncertain(redis, settings):
    """A group of calls of today, of which not all costs are known."""
    group = ":".join(part(name) for name in ("acme\x1b[2J", "w", "anthropic", "claude-haiku-5-5", "cheap", "api"))
    counted = {
        "calls": 9, "cost_nano": 5_000_000, "unknown": 2, "unknown_nano": 7_000_000, "orphaned": 1,
        "orphaned_nano": 3_000_000, "unpriced": 1, "input": 12_345, "output": 678,
        "compared": 4, "expected_nano": 4_000_000, "compared_nano": 5_000_000, "off_nano": 2_000_000,
    }  # fmt: skip
    key = FleetKeys(settings.namespace).costs(f"{datetime.now(UTC):%Y%m%d}")
    redis.hset(key, mapping={f"{group}|{name}": count for name, count in counted.items()})


@pytest.fixture
def invoice(simulator, tmp_path, calls):  # noqa: ARG001  # pytest allows no usefixtures on fixtures
    """Return a function that writes the simulator's invoice to a file, after a change."""

    def write(change=list):
        report = httpx.get(f"{simulator.url}/_sim/invoice").json()
        change(report["calls"])
        file = tmp_path / "invoice.json"
        file.write_text(json.dumps(report))
        return str(file)

    return write


@pytest.mark.usefixtures("calls")
def test_the_report_adds_up_to_the_invoice(invoke, simulator):
    """Rows by what was asked for, and a total that is the provider's, to the nano-dollar."""
    told = json.loads(invoke("costs", "report", "--by", "workflow,model", "--json").stdout)
    assert (told["days"], told["by"]) == (7, ["workflow", "model"])
    assert [(one["keys"]["workflow"], one["calls"]) for one in told["rows"]] == [("daily", 1), ("nightly", 3)]
    assert all(set(one) == ROW for one in [*told["rows"], told["total"]])
    assert told["total"]["cost_usd"] == simulator.invoice(summary=True)["total_usd"]
    assert sum(Decimal(one["cost_usd"]) for one in told["rows"]) == Decimal(told["total"]["cost_usd"]) > 0
    shown = invoke("costs", "report", "--by", "workflow,model").stdout
    assert told["total"]["cost_usd"] in shown
    assert "nightly" in shown
    assert "unknown" not in shown
    assert "orphaned" not in shown


@pytest.mark.usefixtures("uncertain")
def test_what_is_not_known_stands_beside_the_sum(invoke):
    """Unknown and orphaned amounts are the most that may come on top, and in no sum."""
    shown = invoke("costs", "report", "--by", "tenant").stdout
    assert r"acme\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert shown.count("2: ≤ 0.007000000") == 2
    assert "broken off, or without a price: 2 calls, at most $0.007000000 more" in shown
    assert "orphaned, their workers lost: 1 call, at most $0.003000000 more" in shown
    assert "in neither amount: 1 call\n" in shown
    [row] = json.loads(invoke("costs", "report", "--json").stdout)["rows"]
    assert (row["cost_usd"], row["unknown_usd"], row["orphaned_usd"]) == ("0.005000000", "0.007000000", "0.003000000")


@pytest.mark.usefixtures("uncertain")
def test_what_was_expected_stands_beside_what_it_cost(invoke):
    """Of the calls that can be compared: the sums, by how many percent they differ, and how far off a call was."""
    shown = invoke("costs", "report").stdout
    assert "expected of 4 calls: $0.004000000; they cost $0.005000000, +25.0%; off by $0.000500000 a call" in shown
    told = json.loads(invoke("costs", "report", "--json").stdout)
    compared = {"calls": 4, "expected_usd": "0.004000000", "actual_usd": "0.005000000", "off_usd": "0.002000000"}
    assert [(one["compared"], one["difference_percent"]) for one in told["rows"]] == [(compared, 25.0)]


@pytest.mark.usefixtures("calls")
def test_savings_are_held_against_the_preferred_premium_model(invoke):
    """What the calls cost is part of it; the dearest of them is that model's own."""
    told = json.loads(invoke("costs", "report", "--json").stdout)
    saved = told["savings"]
    assert (saved["provider"], saved["model_id"], saved["calls"]) == ("anthropic", "claude-opus-5-5", 4)
    assert saved["cost_usd"] == told["total"]["cost_usd"]
    assert Decimal(saved["premium_usd"]) - Decimal(saved["cost_usd"]) == Decimal(saved["saved_usd"]) > 0
    assert f"instead of ${saved['cost_usd']}; saved ${saved['saved_usd']}" in invoke("costs", "report").stdout


def test_a_report_of_nothing_says_so(invoke):
    """No empty table; wrong names are answered with the right ones."""
    assert invoke("costs", "report", "--days", "3").stdout == "no calls in the last 3 days\n"
    assert json.loads(invoke("costs", "report", "--json").stdout)["rows"] == []
    assert "allowed: day, tenant" in invoke("costs", "report", "--by", "colour", code=2).output


@pytest.mark.usefixtures("calls")
def test_a_report_without_groups_is_the_total(invoke):
    """``--by ''`` asks for one row."""
    told = json.loads(invoke("costs", "report", "--by", "", "--json").stdout)
    assert told["rows"] == [told["total"]]
    assert "4" in invoke("costs", "report", "--by", "").stdout


def test_the_export_has_every_call_in_both_formats(invoke, calls, tmp_path):
    """CSV and JSON lines hold the same, money exact; the file is there when it is complete."""
    file = tmp_path / "calls.jsonl"
    assert invoke("costs", "export", "--format", "jsonl", "-o", str(file)).stderr == "4 records\n"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(tuple(line) == FIELDS for line in lines)
    assert [line["call_id"] for line in lines] == [record.call_id for record in calls]
    assert sum(Decimal(line["cost_usd"]) for line in lines) == sum(record.cost_usd for record in calls)
    rows = list(csv.DictReader(StringIO(invoke("costs", "export").stdout)))
    assert [row["cost_usd"] for row in rows] == [line["cost_usd"] for line in lines]
    assert [row["time"] for row in rows] == [line["time"] for line in lines]
    assert {row["corrects_orphan"] for row in rows} == {"false"}
    assert list(tmp_path.glob("*.new")) == []


@pytest.mark.usefixtures("calls")
def test_the_export_is_of_a_span_of_time(invoke):
    """``--since`` is included, ``--until`` is not; a time that is none is refused."""
    now = datetime.now(UTC)
    before, after = (now - timedelta(hours=1)).isoformat(), (now + timedelta(hours=1)).isoformat()
    assert len(invoke("costs", "export", "--since", before, "--until", after).stdout.splitlines()) == 5
    assert len(invoke("costs", "export", "--until", before).stdout.splitlines()) == 1
    assert "is no time" in invoke("costs", "export", "--since", "yesterday", code=2).output


def test_no_cell_of_the_export_is_a_formula(invoke, settings):
    """A tenant's name comes from outside, and a spreadsheet would run it."""
    executor = EmpathyLLMExecutor(settings)
    executor.run("summarize", "A text.", context=ExecutionContext(workflow_name="=1+1\x1b[2J"))
    executor.close()
    [row] = csv.DictReader(StringIO(invoke("costs", "export").stdout))
    assert row["workflow"] == r"'=1+1\x1b[2J"
    assert json.loads(invoke("costs", "export", "--format", "jsonl").stdout)["workflow"] == "=1+1\x1b[2J"


def test_an_export_that_cannot_be_written_says_so(invoke, tmp_path):
    """One line and exit code 2."""
    assert "cannot be written" in invoke("costs", "export", "-o", str(tmp_path / "no" / "x.csv"), code=2).output
    assert "it is empty" in invoke("costs", "export", "-o", "", code=2).output
    assert "it is empty" in invoke("costs", "reconcile", "--invoice", "", code=2).output


def test_an_export_goes_into_a_pipe_or_device_and_leaves_it_what_it_is(invoke, tmp_path):
    """To put a file in its place would take /dev/null from the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ours = os.open(pipe, os.O_RDWR)
    invoke("costs", "export", "-o", str(pipe))
    assert os.read(ours, 65536).decode().splitlines() == [",".join(FIELDS)]
    assert pipe.is_fifo()
    os.close(ours)


def test_an_export_goes_where_a_link_points_and_leaves_the_link(invoke, tmp_path):
    """/dev/stdout is one, and may point to a file."""
    file, link = tmp_path / "file.csv", tmp_path / "latest.csv"
    file.write_text("older, and longer than what comes\n" * 100)
    link.symlink_to(file)
    invoke("costs", "export", "-o", str(link))
    assert link.is_symlink()
    assert file.read_text().splitlines() == [",".join(FIELDS)]


def test_the_invoice_of_the_simulator_agrees(invoke, invoice):
    """The same calls at the same cost on both sides: exit code 0, no differences."""
    told = json.loads(invoke("costs", "reconcile", "--invoice", invoice(), "--json").stdout)
    assert (told["agrees"], told["differences"], told["uncertain"]) == (True, [], [])
    assert (told["matched_calls"], told["billed_calls"]) == (4, 4)
    assert told["billed_usd"] == told["recorded_usd"]
    assert "They agree." in invoke("costs", "reconcile", "--invoice", invoice()).stdout


def test_every_difference_is_listed_and_is_exit_code_1(invoke, invoice, calls):
    """A call billed at another cost, one that was not billed, and one that nobody here made."""
    changed, missing, strange = calls[0].call_id, calls[1].call_id, "nobody\x1b[2J"

    def change(lines):
        by_id = {line["client_request_id"]: line for line in lines}
        by_id[changed]["cost_usd"] = "9.500000000"
        lines.remove(by_id[missing])
        lines.append({**by_id[changed], "client_request_id": strange, "request_id": "req_nobody"})

    told = json.loads(invoke("costs", "reconcile", "--invoice", invoice(change), "--json", code=1).stdout)
    assert {(one["kind"], one["call_id"]) for one in told["differences"]} == {
        ("the cost differs", changed), ("not in the invoice", missing), ("not in the ledger", strange),
    }  # fmt: skip
    shown = invoke("costs", "reconcile", "--invoice", invoice(change), code=1).stdout
    assert "3 differences" in shown
    assert all(text in shown for text in (changed, missing, r"nobody\x1b[2J", "9.500000000", "They do not agree."))
    assert "\x1b[2J" not in shown


def test_what_cannot_be_judged_is_shown_and_is_exit_code_1(invoke, calls, tmp_path):
    """Half of a call's lines have no price; the amount that is known agrees, and that is not enough."""
    file = tmp_path / "usage.csv"
    rows = [f"{record.request_id},{record.model_id},{record.cost_usd},," for record in calls]
    rows.append(f"{calls[0].request_id},{calls[0].model_id},,9,9")
    file.write_text("\n".join(["request_id,model,cost_usd,input_tokens,output_tokens", *rows]))
    shown = invoke("costs", "reconcile", "--invoice", str(file), code=1).stdout
    assert all(text in shown for text in ("1 difference", "cannot be judged", calls[0].call_id, "They do not agree."))


def test_an_export_with_columns_of_its_own_can_be_read(invoke, calls, tmp_path):
    """``--column`` says what a provider calls them; a provider's invoice is held against its calls alone."""
    file = tmp_path / "usage.csv"
    rows = [f"{record.request_id},{record.model_id},{record.cost_usd}" for record in calls]
    file.write_text("\n".join(["Request,Model,Amount", *rows]))
    columns = [text for name in ("request_id=Request", "model=Model", "cost_usd=Amount") for text in ("--column", name)]
    asked = ("costs", "reconcile", "--invoice", str(file), *columns)
    assert "4 of them matched" in invoke(*asked, "--provider", "anthropic").stdout
    assert "4 differences" in invoke(*asked, "--provider", "openai", code=1).stdout
    assert "like cost_usd=Amount" in invoke(*asked, "--column", "price=Amount", code=2).output


def test_a_file_that_is_no_invoice_is_refused(invoke, tmp_path):
    """The line and the column are named, and the exit code is 2: it is not a difference."""
    file = tmp_path / "usage.csv"
    file.write_text("request_id,model,cost_usd\nreq_1,claude-haiku-5-5,cheap\n")
    assert "line 2, column 'cost_usd'" in invoke("costs", "reconcile", "--invoice", str(file), code=2).output
    assert "cannot be read" in invoke("costs", "reconcile", "--invoice", str(tmp_path / "no.csv"), code=2).output


def test_the_fields_of_the_json_are_documented():
    """Whoever reads them in a program finds each in the page, as do those who write an invoice's columns."""
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs/howto/reconcile-costs.md").read_text()))
    fields = {one.name for value in SHOWN for one in dataclasses.fields(value)}
    assert {*ROW, *COLUMNS, *DIMENSIONS, *fields, "agrees", "days", "by", "rows", "total", "savings"} <= named


@pytest.mark.parametrize("arguments", [["report"], ["export"]], ids=" ".join)
def test_without_redis_every_command_says_so(invoke, arguments):
    """Exit code 3, one line, no traceback."""
    ran = invoke("costs", *arguments, code=3, REDIS_URL="redis://:hush@127.0.0.1:1/0")
    assert "cannot be reached" in ran.output
    assert "hush" not in ran.output
