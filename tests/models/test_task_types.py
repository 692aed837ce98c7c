"""A task type decides the tier as long as nothing has been learned."""

import logging

import pytest

from attune_worker.jobs import ModelTier
from attune_worker.models.task_types import TaskType, get_tier_for_task, is_known_task, normalize_task_type

PUBLISHED = {
    ModelTier.CHEAP: "summarize classify triage match_pattern extract_topics lint_check format_code "
    "simple_qa categorize",
    ModelTier.CAPABLE: "generate_code fix_bug review_security analyze_performance write_tests refactor explain_code "
    "document_code analyze_error suggest_fix",
    ModelTier.PREMIUM: "coordinate synthesize_results architectural_decision novel_problem final_review "
    "complex_reasoning multi_step_planning critical_decision",
}


@pytest.mark.parametrize("name", ["Fix-Bug", "fix bug", " FIX_BUG ", "fix_bug", "fix - bug", TaskType.FIX_BUG])
def test_every_spelling_of_a_task_type_is_the_same_task(name: str) -> None:
    """Case, spaces, hyphens and surrounding blanks make no difference."""
    assert normalize_task_type(name) == "fix_bug"
    assert is_known_task(name)
    assert get_tier_for_task(name) is ModelTier.CAPABLE


@pytest.mark.parametrize(("tier", "names"), PUBLISHED.items())
def test_published_task_types_keep_their_tier(tier: ModelTier, names: str) -> None:
    """Users rely on the published table of task types and tiers."""
    assert {get_tier_for_task(name) for name in names.split()} == {tier}


def test_there_are_no_task_types_beyond_the_published_ones() -> None:
    """The table names all of them, each once."""
    assert sorted(TaskType) == sorted(" ".join(PUBLISHED.values()).split())


def test_unknown_task_is_capable_and_said_once_however_it_is_spelt(caplog: pytest.LogCaptureFixture) -> None:
    """A typo is visible in the log, and a million jobs with it do not flood the log."""
    with caplog.at_level(logging.WARNING):
        tiers = {get_tier_for_task(name) for name in ("Water-Plants", "water plants", "water_plants")}
    assert tiers == {ModelTier.CAPABLE}
    assert not is_known_task("water_plants")
    assert [record.getMessage().count("water_plants") for record in caplog.records] == [1]


def test_unknown_task_name_cannot_break_the_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """A name from outside is quoted and cut, so it can neither start a line of its own nor fill the disk."""
    with caplog.at_level(logging.WARNING):
        get_tier_for_task("x\x1b[31m" + "y" * 10_000)
    message = caplog.records[-1].getMessage()
    assert "\x1b" not in message
    assert len(message) < 300
