"""How strong a model does a kind of task need, before anything has been learned about it?"""

from __future__ import annotations

import logging
import re
from enum import StrEnum
from functools import lru_cache

from attune_worker.jobs import ModelTier

logger = logging.getLogger(__name__)


class TaskType(StrEnum):
    """The kinds of task that come with a tier; any other name is allowed and counts as capable."""

    SUMMARIZE = "summarize"
    CLASSIFY = "classify"
    TRIAGE = "triage"
    MATCH_PATTERN = "match_pattern"
    EXTRACT_TOPICS = "extract_topics"
    LINT_CHECK = "lint_check"
    FORMAT_CODE = "format_code"
    SIMPLE_QA = "simple_qa"
    CATEGORIZE = "categorize"

    GENERATE_CODE = "generate_code"
    FIX_BUG = "fix_bug"
    REVIEW_SECURITY = "review_security"
    ANALYZE_PERFORMANCE = "analyze_performance"
    WRITE_TESTS = "write_tests"
    REFACTOR = "refactor"
    EXPLAIN_CODE = "explain_code"
    DOCUMENT_CODE = "document_code"
    ANALYZE_ERROR = "analyze_error"
    SUGGEST_FIX = "suggest_fix"

    COORDINATE = "coordinate"
    SYNTHESIZE_RESULTS = "synthesize_results"
    ARCHITECTURAL_DECISION = "architectural_decision"
    NOVEL_PROBLEM = "novel_problem"
    FINAL_REVIEW = "final_review"
    COMPLEX_REASONING = "complex_reasoning"
    MULTI_STEP_PLANNING = "multi_step_planning"
    CRITICAL_DECISION = "critical_decision"


_CHEAP = {
    TaskType.SUMMARIZE,
    TaskType.CLASSIFY,
    TaskType.TRIAGE,
    TaskType.MATCH_PATTERN,
    TaskType.EXTRACT_TOPICS,
    TaskType.LINT_CHECK,
    TaskType.FORMAT_CODE,
    TaskType.SIMPLE_QA,
    TaskType.CATEGORIZE,
}
_PREMIUM = {
    TaskType.COORDINATE,
    TaskType.SYNTHESIZE_RESULTS,
    TaskType.ARCHITECTURAL_DECISION,
    TaskType.NOVEL_PROBLEM,
    TaskType.FINAL_REVIEW,
    TaskType.COMPLEX_REASONING,
    TaskType.MULTI_STEP_PLANNING,
    TaskType.CRITICAL_DECISION,
}
_TIERS: dict[str, ModelTier] = {
    **dict.fromkeys(TaskType, ModelTier.CAPABLE),
    **dict.fromkeys(_CHEAP, ModelTier.CHEAP),
    **dict.fromkeys(_PREMIUM, ModelTier.PREMIUM),
}
_SEPARATORS = re.compile(r"[\s_-]+")


def normalize_task_type(name: str) -> str:
    """Return the one spelling of a task type: ``Fix-Bug``, ``fix bug`` and `` FIX_BUG `` are all ``fix_bug``."""
    return _SEPARATORS.sub("_", name.strip()).lower()


def is_known_task(name: str) -> bool:
    """Whether the task type, in any spelling, is one of ``TaskType``."""
    return normalize_task_type(name) in _TIERS


def get_tier_for_task(task_type: str) -> ModelTier:
    """Return the tier a task of this type is served by while nothing has been learned about it.

    A name that is not a ``TaskType`` is served by the capable tier, which is logged once per name.
    """
    name = normalize_task_type(task_type)
    tier = _TIERS.get(name)
    if tier is None:
        _say_unknown(name[:80])
        return ModelTier.CAPABLE
    return tier


@lru_cache(maxsize=1024)  # remembers what was said: names come from callers, so what is kept has a bound
def _say_unknown(name: str) -> None:
    logger.warning("task type %r is not known and is served by the capable tier", name)
