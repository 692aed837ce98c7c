import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from attune_worker.cli.names import operator
from attune_worker.store.keys import FleetKeys

BUDGETS = json.dumps(
    [
        {"per": "day", "limit_usd": "50"},
        {"per": "month", "tenant": "*", "limit_usd": "100"},
        {"per": "month", "tenant": "*", "limit_usd": "80", "hard": False},
    ]
)


@pytest.fixture
def budget(invoke):
    """Return a function that runs a subcommand in a fleet with budgets."""
    return lambda *arguments, code=0: invoke("budget", *arguments, code=code, BUDGETS=BUDGETS).output


@pytest.fixture
def spent(redis, settings):
    """Return a function that writes what a tenant has spent this month."""
    keys, window = FleetKeys(settings.namespace), f"{datetime.now(UTC):%Y-%m}"

    def write(tenant, spent_usd, reserved_usd=0):
        nano = {f"{window}:spent": spent_usd * 10**9, f"{window}:reserved": reserved_usd * 10**9}
        redis.hset(keys.budget(tenant, None, None, "month"), mapping=nano)

    return write


def test_show_has_every_amount_of_each_budget(budget, spent):
    """Limit, spent, reserved, left, exactly; hard and soft apart; when it starts anew."""
    spent("acme", 81, 9)
    shown = json.loads(budget("show", "--json"))
    assert (shown["total"], shown["page"], shown["limit"]) == (3, 1, 100)
    day, hard, soft = shown["budgets"]
    assert (day["per"], day["tenant"], day["limit_usd"], day["left_usd"]) == (
        "day",
        None,
        "50.000000000",
        "50.000000000",
    )
    assert (hard["tenant"], hard["hard"], hard["spent_usd"], hard["reserved_usd"], hard["left_usd"]) == (
        "acme",
        True,
        "81.000000000",
        "9.000000000",
        "10.000000000",
    )
    assert (soft["hard"], soft["limit_usd"], soft["left_usd"]) == (False, "80.000000000", "-10.000000000")
    assert datetime.fromisoformat(hard["resets_at"]).day == 1
    table = budget("show")
    assert "10.000000000" in table
    assert "-10.000000000" in table


def test_show_of_thousands_of_tenants_comes_in_pages(budget, spent):
    """By name, or what is nearest to its limit first; the total is known."""
    for number in range(120):
        spent(f"tenant-{number:03}", number % 97)
    first = json.loads(budget("show", "--json", "--sort", "left", "--limit", "3"))
    assert first["total"] == 241
    assert [Decimal(row["left_usd"]) for row in first["budgets"]] == [-16, -15, -14]
    last = json.loads(budget("show", "--json", "--limit", "100", "--page", "3"))
    assert (len(last["budgets"]), last["budgets"][-1]["tenant"]) == (41, "tenant-119")
    assert json.loads(budget("show", "--json", "--page", "4"))["budgets"] == []
    assert "page 1 of 3; 241 budgets in all" in budget("show")


def test_show_of_a_tenant_that_has_spent_nothing(budget):
    """Its budget is what every name has; nobody else's is shown."""
    shown = json.loads(budget("show", "--tenant", "new", "--json"))
    assert [(row["tenant"], row["hard"]) for row in shown["budgets"]] == [("new", True), ("new", False)]


def test_show_without_budgets_says_so(invoke, budget):
    """Nothing configured, or nothing that fits, is told apart from an empty table."""
    assert invoke("budget", "show").output == "no budget is configured\n"
    assert "none of these" in budget("show", "--workflow", "w")


def test_set_changes_the_limit_until_the_window_ends(budget):
    """And says so, with who and why; --default takes it back."""
    set_to = json.loads(budget("set", "150", "--per", "month", "--tenant", "acme", "--reason", "Kim", "--json"))
    assert (set_to["limit_usd"], set_to["configured_usd"]) == ("150.000000000", "100.000000000")
    assert (set_to["set"]["by"], set_to["set"]["reason"]) == (operator(), "Kim")
    assert set_to["set"]["until"] == set_to["resets_at"]
    assert "150.000000000 instead of 100.000000000, until" in budget("show")
    back = budget("set", "--default", "--per", "month", "--tenant", "acme")
    assert "100.000000000" in back
    assert "instead of" not in back


def test_set_for_good_or_until_a_time(budget):
    """The soft limit too."""
    said = json.loads(budget("set", "60.5", "--per", "day", "--for-good", "--json"))
    assert (said["limit_usd"], said["set"]["until"]) == ("60.500000000", None)
    at = (datetime.now(UTC) + timedelta(hours=3)).replace(microsecond=0)
    told = budget("set", "20", "--per", "month", "--tenant", "acme", "--soft", "--until", at.isoformat(), "--json")
    said = json.loads(told)
    assert (said["hard"], datetime.fromisoformat(said["set"]["until"])) == (False, at)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["1", "--per", "day", "--tenant", "acme"],
            "configured: hard budget per day, hard budget per month of tenant *",
        ),
        (["1", "--per", "month", "--tenant", "*"], "'*' stands for each name: give one"),
        (["1"], "--per"),
        (["--per", "day"], "either an amount or --default"),
        (["1", "--per", "day", "--default"], "either an amount or --default"),
        (["1", "--per", "day", "--for-good", "--until", "2090-01-01"], "at most one of"),
        (["1,5", "--per", "day"], "is no amount"),
        (["nan", "--per", "day"], "is not allowed"),
        (["0.0000000001", "--per", "day"], "at most 9 decimal places"),
        (["--per", "day", "--", "-1"], "is not allowed"),
        (["1", "--per", "day", "--until", "2020-01-01"], "a time to come"),
        (["1", "--per", "day", "--until", "tomorrow"], "is no time"),
    ],
)
def test_set_refuses_what_makes_no_sense(budget, arguments, told):
    """With exit code 2, and what would make sense."""
    assert told in " ".join(budget("set", *arguments, code=2).split())
    assert "instead of" not in budget("show")
