import json
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner

from attune_worker.cli import attune
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


def test_upgrade_answers_with_a_reason(routing):
    """Yes or no first, then why."""
    assert routing("upgrade", "w", "fix_bug").startswith("yes: 5 of the newest 20")
    said = json.loads(routing("upgrade", "w", "fix_bug", "--json"))
    assert said["upgrade"] is True
    assert "capable" in said["reason"]
