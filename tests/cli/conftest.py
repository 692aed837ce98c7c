"""How do tests run a command? In this process, with the settings of the test's fleet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from attune_worker.cli import attune
from attune_worker.settings import get_settings
from attune_worker.store.keys import JobKeys

Run = Callable[..., Result]


@pytest.fixture
def invoke(environ) -> Run:
    """Return a function that runs a command with the test's settings, and says how it ended."""

    def run(*arguments: str, code: int = 0, **overrides: object) -> Result:
        get_settings.cache_clear()
        try:
            changed = {f"ATTUNE_{name}": str(value) for name, value in overrides.items()}
            ran = CliRunner(env={**environ, **changed}).invoke(attune, list(arguments))
        finally:
            get_settings.cache_clear()
        assert ran.exit_code == code, ran.output + repr(ran.exception)
        return ran

    return run


@pytest.fixture
def keys(settings) -> Callable[[str], JobKeys]:
    """Return a function that names the keys of a job."""
    return lambda job_id: JobKeys.of(settings.namespace, job_id)
