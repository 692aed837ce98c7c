import json
import os
import pty
import subprocess
import sys

import pytest

from attune_worker import (
    AuthMode,
    AuthStrategy,
    count_lines_of_code,
)
from attune_worker.models.learned_lines import ENOUGH_JOBS, LearnedLines
from tests.conftest import process_environ

NOBODY = "redis://:s3cret-word@127.0.0.1:1/0"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "auth.json"


@pytest.fixture
def auth(invoke, file):
    """Return a function that runs a subcommand with the strategy in this test's file."""

    def run(*arguments, code=0, **overrides):
        return invoke("auth", *arguments, code=code, AUTH__FILE=file, **overrides)

    return run


def test_setup_saves_what_its_flags_say(auth, file):
    """All of them; what is not named stays, and the answer is what was saved."""
    said = auth("setup", "--tier", "max", "--small", "800", "--medium", "3000", "--no-prefer-subscription", "--json")
    known = json.loads(said.stdout)
    assert (known["store"], known["place"]) == ("file", str(file))
    assert known["strategy"] == AuthStrategy.load(file).model_dump(mode="json")
    auth("setup", "--mode", "api", "--tokens-per-line", "9.5", "--window-tokens", "50000")
    expected = AuthStrategy(
        subscription_tier="max",
        default_mode="api",
        small_module_threshold=800,
        medium_module_threshold=3000,
        prefer_subscription=False,
        tokens_per_line=9.5,
        window_tokens=50_000,
    )
    assert AuthStrategy.load(file) == expected
    shown = auth("setup", "--tokens-per-line", "learned", "--window-tokens", "assumed").stdout
    assert f"saved in {file}" in shown
    found = AuthStrategy.load(file)
    assert (found.tokens_per_line, found.window_tokens, found.default_mode) == (None, None, AuthMode.API)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--small", "3000"], "small_module_threshold: 3000 is more than medium_module_threshold, 2000"),
        (["--medium", "-1"], "medium_module_threshold"),
        (["--tier", "gold"], "'gold' is not one of"),
        (["--tokens-per-line", "many"], "tokens_per_line: 'many' is neither a number nor 'learned'"),
        (["--tokens-per-line", "nan"], "tokens_per_line: "),
        ([], "there is no terminal to ask at; say what to set"),
    ],
)
def test_setup_refuses_what_makes_no_sense(auth, file, arguments, said):
    """In one line, with exit code 2, and nothing is written."""
    assert said in auth("setup", *arguments, code=2).stderr
    assert not file.exists()


def test_status_shows_what_holds_and_who_says_so(auth, file, settings, redis):
    """Defaults before anything was set; then what was set; and what was learned, from how many jobs."""
    assert f"nothing is kept in {file}" in auth("status").stdout
    known = json.loads(auth("status", "--json").stdout)
    assert known["saved"] is False
    assert known["strategy"] == AuthStrategy().model_dump(mode="json")
    assert (known["tokens_per_line"]["source"], known["tokens_per_line"]["jobs"]) == ("default", 0)
    assert known["window_tokens"] == {"value": 19_000, "source": "assumed"}
    lines = LearnedLines(settings, redis)
    for _ in range(ENOUGH_JOBS):
        lines.learn(100, 850)
    auth("setup", "--tier", "enterprise")
    known = json.loads(auth("status", "--json").stdout)
    assert known["saved"] is True
    assert known["tokens_per_line"] == {
        "value": 8.5,
        "source": "learned",
        "learned": 8.5,
        "jobs": ENOUGH_JOBS,
        "jobs_needed": ENOUGH_JOBS,
        "error": None,
    }
    assert known["window_tokens"] == {"value": None, "source": "unknown"}
    shown = auth("status").stdout
    assert "tokens per line: 8.5 (learned from 20 jobs)" in shown
    assert "quota of five hours: not known" in shown


def test_status_needs_no_redis_for_a_file(auth):
    """The strategy is shown; that what was learned is not known now is shown with it, and is exit code 3."""
    shown = auth("status", REDIS_URL=NOBODY, code=3).stdout
    assert "what was learned is not known now: Redis at redis://:***@127.0.0.1:1/0 cannot be reached" in shown
    known = json.loads(auth("status", "--json", REDIS_URL=NOBODY, code=3).stdout)
    assert "cannot be reached" in known["tokens_per_line"]["error"]


@pytest.mark.parametrize("command", [["status"], ["setup", "--tier", "max"], ["recommend", "--lines", "5"], ["reset"]])
def test_strategy_in_redis_needs_redis(auth, command):
    """Exit code 3, the URL without its password, and what to do."""
    said = auth(*command, code=3, AUTH__STORE="redis", REDIS_URL=NOBODY).stderr
    assert "redis://:***@127.0.0.1:1/0 cannot be reached" in said
    assert "s3cret" not in said


def test_strategy_in_redis_is_set_shown_and_reset(auth, settings):
    """The same commands, for the whole fleet."""
    auth("setup", "--tier", "max", AUTH__STORE="redis")
    known = json.loads(auth("status", "--json", AUTH__STORE="redis").stdout)
    assert (known["store"], known["saved"], known["strategy"]["subscription_tier"]) == ("redis", True, "max")
    assert known["place"].startswith(f"{{{settings.namespace}}}:auth in Redis at ")
    auth("reset", "--confirm", AUTH__STORE="redis")
    assert json.loads(auth("status", "--json", AUTH__STORE="redis").stdout)["saved"] is False


def test_recommend_counts_a_file(auth, tmp_path):
    """Mode, reason and both estimates, of its lines of code."""
    source = tmp_path / "module.py"
    source.write_text("# comment\n\n" + "x = 1\n" * 600)
    known = json.loads(auth("recommend", str(source), "--json").stdout)
    assert (known["file"], known["module_lines"]) == (str(source), count_lines_of_code(source))
    assert (known["recommendation"], known["reason"]) == tuple(AuthStrategy().recommend(600))
    assert known["subscription"]["cost"]["monetary_cost"] == "0"
    assert float(known["api"]["cost"]["monetary_cost"]) > 0
    assert known["api"]["cost"]["tokens_used"] == 600 * 12 + 600 * 3
    shown = auth("recommend", str(source)).stdout
    assert shown.startswith("subscription: ")
    assert "600 lines: it is below medium_module_threshold (2000), and prefer_subscription is on" in shown
    assert known["api"]["cost"]["monetary_cost"] in shown


def test_recommend_takes_a_number_of_lines_and_a_model(auth):
    """What was set decides."""
    auth("setup", "--tier", "api_only")
    shown = auth("recommend", "--lines", "1", "--model", "claude-haiku-5-5").stdout
    assert shown.startswith("api: 1 line: the plan api_only has no subscription")
    assert "with anthropic/claude-haiku-5-5, 12 tokens a line (default)" in shown
    assert "the plan has no subscription" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either a file or --lines N"),
        (["x.py", "--lines", "3"], "give either a file or --lines N"),
        (["gone.py"], "gone.py: there is no such file"),
        (["--lines", "-1"], "'module_lines': -1 is not allowed"),
        (["--lines", "5", "--model", "claude-hiku-5-5"], "did you mean 'claude-haiku-5-5'"),
    ],
)
def test_recommend_says_what_is_wrong(auth, arguments, said):
    """Exit code 2 and one line."""
    assert said in auth("recommend", *arguments, code=2).stderr


def test_reset_wants_to_be_confirmed(auth, file):
    """Without a terminal and --confirm it only says what would be lost, with exit code 2."""
    assert "nothing is kept" in auth("reset").stdout
    assert json.loads(auth("reset", "--json").stdout) == {"reset": False, "lost": None}
    auth("setup", "--tier", "max", "--small", "800")
    assert "would be lost: subscription_tier = max, small_module_threshold = 800" in auth("reset", code=2).stdout
    lost = {"subscription_tier": "max", "small_module_threshold": 800}
    assert json.loads(auth("reset", "--json", code=2).stdout) == {"reset": False, "lost": lost}
    assert file.exists()
    assert json.loads(auth("reset", "--json", "--confirm").stdout) == {"reset": True, "lost": lost}
    assert not file.exists()
    auth("setup", "--mode", "api")
    assert "forgotten: default_mode = api; the defaults hold" in auth("reset", "--confirm").stdout


def test_broken_file_is_told_and_can_be_reset(auth, file):
    """Each command names file and line; only reset goes on."""
    file.write_text('{\n  "default_mode": "cash"\n}')
    said = f"{file}, line 2: default_mode: it should be"
    for command in ["status"], ["status", "--json"], ["setup", "--tier", "max"], ["recommend", "--lines", "5"]:
        assert said in auth(*command, code=2).stderr
    assert said in auth("reset", code=2).stdout
    auth("reset", "--confirm")
    assert "nothing is kept" in auth("status").stdout


@pytest.mark.parametrize("command", ["setup", "status", "recommend", "reset"])
def test_help_has_an_example(auth, command):
    """Who looks there wants to type something."""
    assert f"Example: attune-worker auth {command}" in auth(command, "--help").stdout


@pytest.fixture
def at_terminal(environ, file):
    """Return a function that runs a command at a terminal, types lines there, and returns exit code and screen."""

    def run(*arguments, typed):
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "attune_worker", "auth", *arguments],
            env=process_environ({**environ, "ATTUNE_AUTH__FILE": str(file)}),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            os.write(ours, "".join(f"{line}\n" for line in typed).encode())
            screen = b""
            try:
                while part := os.read(ours, 4096):
                    screen += part
            except OSError:  # the other side is closed
                pass
            os.close(ours)
        return process.returncode, screen.decode()

    return run


def test_setup_asks_at_a_terminal(at_terminal, file):
    """What is left empty stays as it is."""
    code, screen = at_terminal("setup", typed=["max", "", "700", "", "n"])
    assert code == 0, screen
    assert "Plan" in screen
    assert AuthStrategy.load(file) == AuthStrategy(
        subscription_tier="max", small_module_threshold=700, prefer_subscription=False
    )


def test_reset_asks_at_a_terminal(at_terminal, auth, file):
    """No is the default, and a yes is enough."""
    auth("setup", "--tier", "max")
    assert at_terminal("reset", typed=[""])[0] == 2
    assert file.exists()
    code, screen = at_terminal("reset", typed=["y"])
    assert (code, "subscription_tier = max" in screen) == (0, True)
    assert not file.exists()
