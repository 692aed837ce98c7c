"""Do the parsers of what others write promise too much? Each is given nonsense near what it expects."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXAMPLES = 60

if str(BENCHMARKS) not in sys.path:  # scripts there import one another by their names
    sys.path.append(str(BENCHMARKS))
fuzz_targets = importlib.import_module("fuzz_targets")
fuzz_inputs = importlib.import_module("fuzz_inputs")
fuzz_crashes = importlib.import_module("fuzz_crashes")
TARGETS = fuzz_targets.TARGETS


@pytest.fixture(scope="module")
def http() -> Iterator[Any]:
    with fuzz_targets.http_target() as target:
        yield target


def search(target: Any) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fuzz_inputs.inputs(target))
    def run(data: bytes) -> None:
        target.run(data)

    run()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_but_its_typed_error_leaves_a_parser(target: Any) -> None:
    """What it reads is within bounds, and what it cannot read it refuses as it says."""
    search(target)


def test_nothing_but_a_typed_error_leaves_the_http_client(http: Any) -> None:
    """Whatever bytes a server sends."""
    search(http)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_search_begins_where_something_is_read(target: Any) -> None:
    """A search that begins with nonsense finds the first check of a parser and nothing behind it."""
    for seed in target.seeds:
        target.run(seed)


def test_crash_is_noted_with_its_place_and_shortest_input() -> None:
    """The same fault counts once, and the search goes on."""
    crashes = fuzz_crashes.Crashes()
    for data in (b"longer than that", b"short", b"not so short"):
        with crashes.noted(data):
            int("x")
    [(place, example)] = crashes.by_place.items()
    assert place.startswith("ValueError in test_parsers.py, line ")
    assert example == "b'short'"


def test_the_search_counts_what_it_tried(tmp_path: Path) -> None:
    """It prints the numbers that the documentation quotes, and says with its exit code whether all went well."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "fuzz.py"), "--seconds", "1", "--only", "rate limit headers"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=120, check=True)
    [target] = json.loads(out.read_text())["targets"]
    assert target["hypothesis"] > 0
    assert f"{target['hypothesis']:,}" in done.stdout
    assert target["crashes"] == {}
