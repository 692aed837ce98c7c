"""Is everything that the FAQ names there, and is it tried by what ``pytest -k models`` selects?"""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import attune_worker

ROOT = Path(__file__).resolve().parents[2]

METHODS = {
    "AdaptiveModelRouter": ["get_best_model", "get_routing_stats", "recommend_tier_upgrade", "explain"],
    "AuthStrategy": ["get_recommended_mode", "estimate_cost", "get_pros_cons", "save", "load"],
    "CircuitBreaker": ["is_available", "record_success", "record_failure", "get_status", "reset", "trip"],
    "EmpathyLLMExecutor": ["run", "arun", "get_model_for_task", "estimate_cost"],
}
NAMES = [
    "AuthMode",
    "ExecutionContext",
    "LLMResponse",
    "ModelInfo",
    "ModelTier",
    "SubscriptionTier",
    "TaskType",
    "cmd_auth_recommend",
    "cmd_auth_reset",
    "cmd_auth_setup",
    "cmd_auth_status",
    "count_lines_of_code",
    "get_all_models",
    "get_auth_strategy",
    "get_model",
    "get_pricing_for_model",
    "get_tier_for_task",
    "is_known_task",
]
FEATURE = [*METHODS, *NAMES]


@pytest.fixture(scope="module")
def selected() -> set[str]:
    """Every name that is used in the files here whose tests ``pytest -k models`` selects."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "models", "--collect-only", "-q", "tests/models"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    files = {line.partition("::")[0] for line in listed.stdout.splitlines() if "::" in line}
    assert files == {str(file.relative_to(ROOT)) for file in Path(__file__).parent.glob("test_*.py")}
    others = [ROOT / file for file in files if Path(file).name != Path(__file__).name]
    nodes = [node for file in others for node in ast.walk(ast.parse(file.read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return imported | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", FEATURE)
def test_name_of_the_faq_is_public_and_tested(name: str, selected: set[str]) -> None:
    """It is imported from the package itself, and says what it is for."""
    found = getattr(attune_worker, name)
    assert name in attune_worker.__all__
    assert inspect.getdoc(found)
    assert name in selected


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in METHODS.items() for name in names])
def test_method_of_the_faq_is_there_and_tested(owner: str, name: str, selected: set[str]) -> None:
    """Each has a docstring of its own, and a test that calls it."""
    assert inspect.getdoc(getattr(getattr(attune_worker, owner), name))
    assert name in selected
