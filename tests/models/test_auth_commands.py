"""The FAQ's ``cmd_auth_*``: functions that do what the command line does."""

import json

import pytest

from attune_worker import (
    AuthMode,
    AuthStrategy,
    cmd_auth_recommend,
    cmd_auth_reset,
    cmd_auth_setup,
    cmd_auth_status,
    get_settings,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "auth.json"


@pytest.fixture
def here(environ, file, monkeypatch):
    """Make this process's settings those of the test, for functions that take none."""
    for name, value in {**environ, "ATTUNE_AUTH__FILE": str(file)}.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.mark.usefixtures("here")
def test_commands_are_functions_that_return_an_exit_code(file, capsys):
    """Callable without arguments; what the command line says goes to the same places."""
    assert cmd_auth_status() == 0
    assert "nothing is kept" in capsys.readouterr().out
    assert cmd_auth_setup() == 2
    assert "Error: auth setup: there is no terminal to ask at" in capsys.readouterr().err
    assert cmd_auth_recommend() == 2
    assert cmd_auth_setup(tier="max", mode=AuthMode.API, tokens_per_line=8) == 0
    assert AuthStrategy.load(file).tokens_per_line == 8
    assert cmd_auth_recommend(lines=7) == 0
    assert cmd_auth_recommend(__file__) == 0
    capsys.readouterr()
    assert cmd_auth_reset() == 2
    assert cmd_auth_reset(confirm=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reset"] is True
    assert cmd_auth_reset() == 0
