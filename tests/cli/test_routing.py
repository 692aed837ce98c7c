import json
from datetime import UTC, datetime
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console

from attune_worker.cli import attune
from attune_worker.cli.routing import NO_KEY, _print_explained
from attune_worker.jobs import Candidate, Decision
from attune_worker.models.adaptive import AdaptiveModelRouter
from attune_worker.settings import get_settings
from attune_worker.store.keys import FleetKeys


@pytest.fixture
def routing(environ, redis, settings):
    """Return a function that runs a subcommand, in a fleet with a history in one stage."""
    keys = FleetKeys(settings.namespace)
    for key in (keys.evidence("w", "fix_bug"), keys.evidence("w"), keys.evidence()):
        good, bad = '[300,3,650,303,0,0,"11111111111111111111"]', '[100,200,650,300,0,0,"00000000000000011111"]'
        redis.hset(key, mapping={"n": 650, "anthropic/claude-sonnet-5-5": good, "openai/gpt-6.1-terra": bad})
    day = f"{datetime.now(UTC):%Y%m%d}"
    counted = {
        "calls": 10,
        "succeeded": 8,
        "failed": 2,
        "cost_nano": 10_000_000,
        "input": 900,
        "output": 900,
        "latency_ms": 1600,
        "h6": 8,
    }
    names = {f"anthropic/claude-sonnet-5-5|{name}": count for name, count in counted.items()}
    redis.hset(keys.stats("w", "fix_bug", day), mapping=names)
    redis.zadd(keys.stages, {json.dumps(["w", "fix_bug"]): 1})

    def run(*arguments, code=0):
        get_settings.cache_clear()
        try:
            ran = CliRunner(env=environ).invoke(attune, ["routing", *arguments])
        finally:
            get_settings.cache_clear()
        assert ran.exit_code == code, ran.output
        return ran.output

    return run


def test_best_prints_a_model_that_scripts_can_use(routing):
    """One word on stdout; with --json what is known of it."""
    assert routing("best", "w", "fix_bug").split() == ["claude-sonnet-5-5"]
    said = json.loads(routing("best", "w", "fix_bug", "--json"))
    assert (said["model_id"], said["provider"], said["calls"]) == ("claude-sonnet-5-5", "anthropic", 303)
    assert (said["rule"], said["best_effort"]) == ("adaptive", False)


def test_best_says_when_nobody_meets_the_wishes(routing):
    """The closest model, and a line on stderr."""
    assert "best effort" in routing("best", "w", "fix_bug", "--max-cost", "0")


def test_explain_shows_every_model_and_its_verdict(routing):
    """The numbers behind the choice, with their uncertainty, for a reader and for a program."""
    shown = routing("explain", "w", "fix_bug")
    assert "anthropic/claude-sonnet-5-5" in shown
    assert "openai/gpt-6.1-terra" in shown
    assert "303" in shown
    assert "adaptive choice, success of at least 80%" in shown
    said = json.loads(routing("explain", "w", "fix_bug", "--min-success-rate", "0.5", "--json"))
    assert said["floor"] == 0.5
    assert said["candidates"][said.get("chosen", 0)]["model_id"] == "claude-sonnet-5-5"
    assert all(one["verdict"] for one in said["candidates"])


def test_explain_works_before_anything_is_known(routing):
    """A new stage has a static choice."""
    assert "static choice" in routing("explain", "v", "summarize")


def test_stats_are_the_workflows_or_one_stages(routing):
    """A table, the same numbers as JSON with exact money, and a plain sentence when there is nothing."""
    shown = routing("stats", "w")
    assert "claude-sonnet-5-5" in shown
    assert "80.0%" in shown
    assert "0.001000" in shown
    said = json.loads(routing("stats", "w", "fix_bug", "--days", "1", "--json"))
    assert (said["total_calls"], said["avg_cost"], said["stage"]) == (10, "0.001000000", "fix_bug")
    assert "no calls of w/other in the last 7 days" in routing("stats", "w", "other")
    assert "36" in routing("stats", "w", "--days", "36", code=2)


@pytest.mark.parametrize("days", [-1, 0, 36])
def test_stats_of_days_that_are_not_kept_are_refused(settings, days):
    """Fewer days than were asked for would be a wrong answer."""
    router = AdaptiveModelRouter(settings)
    with pytest.raises(ValueError, match=f"days: {days} is not allowed; it should be 1 to 35"):
        router.get_routing_stats("w", days=days)
    router.close()


@pytest.mark.parametrize("command", ["best", "explain"])
@pytest.mark.parametrize("option", ["--max-cost", "--min-success-rate"])
def test_wishes_must_be_numbers(routing, command, option):
    """No bound holds nan off, and no comparison with it is true."""
    assert "is not a number" in routing(command, "w", "fix_bug", option, "nan", code=2)


@pytest.fixture
def printed():
    """Return a function that gives the lines of a decision on a terminal of some width."""

    def lines(width, candidates, floor=0.8):
        decision = Decision(rule="adaptive", workflow="w", stage="s", floor=floor, candidates=candidates)
        console = Console(width=width, height=25, force_terminal=True, color_system=None, file=StringIO())
        _print_explained(console, decision)
        return [line.strip() for line in console.file.getvalue().splitlines()]

    return lines


def candidate(model_id, success=None, verdict="chosen"):
    known = {} if success is None else {"lower": 0.1, "upper": 1.0, "expected_cost_usd": 0.000272, "calls": 1200}
    return Candidate(
        model_id=model_id, provider="anthropic", tier="capable", expected_success=success, verdict=verdict, **known
    )


@pytest.mark.parametrize("width", [20, 80, 130, 150])
def test_explain_cuts_nothing_on_any_terminal(printed, width):
    """Where the table is too wide, the verdicts have lines of their own."""
    long, verdict = "claude-sonnet-4-5-20250929", "dearer than anthropic/claude-haiku-5-5"
    lines = printed(width, [candidate("claude-haiku-5-5", 0.9), candidate(long, 0.95, verdict)])
    assert sum(f"anthropic/{long} " in line for line in lines) == 1
    assert not any("…" in line for line in lines)
    assert any(line.endswith(verdict) for line in lines)
    assert (f"anthropic/{long}: {verdict}" in lines) == (width < 130)
    assert any("10% to 100%" in line for line in lines) == (width == 150)
    assert width < 80 or max(map(len, lines)) <= width


def test_explain_tells_how_many_models_have_no_key_once(printed):
    """A row for each of them would hide those that may serve."""
    lines = printed(140, [candidate("a", 0.9), candidate("b", verdict=NO_KEY), candidate("c", verdict=NO_KEY)])
    assert [line for line in lines if "key" in line] == ["2 more have no API key"]
    assert not any("anthropic/b" in line for line in lines)
    assert not any("key" in line for line in printed(140, [candidate("a", 0.9)]))


def test_explain_never_prints_a_rate_below_the_floor_as_the_floor(printed):
    """It would look like a wrong decision."""
    lines = printed(140, [candidate("a", 0.7996), candidate("b", 0.7996, "explored"), candidate("c", 0.8, "explored")])
    a, b, c = (line for line in lines if line.startswith("anthropic/"))
    assert "79.96%" in a
    assert b.endswith("explored; below the floor")
    assert "80.0%" in c
    assert c.endswith("explored")
    assert "success of at least 87.5%" in printed(140, [candidate("a", 0.9)], floor=0.875)[0]


def test_upgrade_answers_with_a_reason(routing):
    """Yes or no first, then why."""
    assert routing("upgrade", "w", "fix_bug").startswith("yes: 5 of the newest 20")
    said = json.loads(routing("upgrade", "w", "fix_bug", "--json"))
    assert said["upgrade"] is True
    assert "capable" in said["reason"]
