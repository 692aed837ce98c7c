"""What does ``auth`` say of keys and subscriptions, and does a refused one come back? Real calls, a real provider."""

import json
import time

import pytest

from attune_worker import cmd_auth_reset, get_settings
from attune_worker.errors import CredentialError
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings
from attune_worker.simulator import Profile
from tests.conftest import API_KEY, PATIENCE_SECONDS

NOBODY = "redis://:s3cret-word@127.0.0.1:1/0"
SECOND, TOKEN = "sk-test-second-never-shown", "sk-test-token-never-shown"
CREDENTIALS = json.dumps(
    [
        {"name": "two", "secret": SECOND},
        {"name": "gone", "secret": "env:NOT_SET_ANYWHERE"},
        {"name": "team", "mode": "subscription", "secret": TOKEN, "keep_free": 0.1, "burst": 0.3},
    ]
)


@pytest.fixture
def auth(invoke, tmp_path):
    """Return a function that runs a subcommand of a fleet with several credentials."""

    def run(*arguments, code=0, **overrides):
        file = tmp_path / "auth.json"
        return invoke(
            "auth", *arguments, code=code, AUTH__FILE=file, PROVIDERS__ANTHROPIC__CREDENTIALS=CREDENTIALS, **overrides
        )

    return run


@pytest.fixture
def own_environ(environ, tmp_path):
    """The environment of that fleet."""
    more = {"ATTUNE_AUTH__FILE": str(tmp_path / "auth.json"), "ATTUNE_PROVIDERS__ANTHROPIC__CREDENTIALS": CREDENTIALS}
    return {**environ, **more}


@pytest.fixture
def told(auth):
    """Return a function that returns the credentials in the JSON of the status, by name."""

    def ask(**options):
        known = json.loads(auth("status", "--json", **options).stdout)
        return {f"{one['provider']}/{one['name']}": one for one in known["credentials"]}

    return ask


@pytest.fixture
def fleet(own_environ, simulator):
    """Let two calls be made: one that is refused, and one by a subscription of which 95 % is used then."""
    capacity = {"capacity_tokens": 100_000, "used": 0.95, "resets_in_seconds": 3600}
    simulator.profile = Profile.parse(
        {"api_keys": [API_KEY], "subscriptions": {TOKEN: {"name": "team", "windows": {"5h": capacity}}}}
    )
    with EmpathyLLMExecutor(Settings.load(environ=own_environ)) as executor:
        executor.run("summarize", "?", model="claude-haiku-5-5", auth_mode="subscription")
        until = time.monotonic() + PATIENCE_SECONDS
        while all(one.credential != "two" for one in attempts_of(executor)):
            assert time.monotonic() < until


def attempts_of(executor):
    """Make a call by a key, and return its attempts."""
    try:
        return executor.run("summarize", "?", model="claude-haiku-5-5", auth_mode="api").attempts
    except CredentialError as error:
        return error.attempts


@pytest.mark.usefixtures("fleet")
def test_status_shows_how_each_credential_stands(auth, told):
    """Refused since when, how and until when; windows as told, counted and paced; what is not there, and why."""
    found = told()
    assert set(found) == {
        "anthropic/default", "anthropic/two", "anthropic/gone", "anthropic/team", "google/default", "openai/default",
    }  # fmt: skip
    refused = found["anthropic/two"]
    assert (refused["mode"], refused["present"], refused["held"]["reason"]) == ("api", True, "credential_refused")
    assert (refused["refused"]["error"], refused["refused"]["status"]) == ("credential", 401)
    assert refused["refused"]["since"] < refused["refused"]["recheck_at"] == refused["held"]["until"]
    missing = found["anthropic/gone"]
    assert (missing["present"], missing["variable"], missing["refused"]) == (False, "NOT_SET_ANYWHERE", None)
    team = found["anthropic/team"]
    window = team["windows"]["5h"]
    assert (team["mode"], team["in_flight"], window["utilization"]) == ("subscription", 0, 0.95)
    assert 0.85 < window["pace"] <= 0.9  # four of five hours are over: 0.3 + 0.7 * 0.8
    assert team["held"] == {"reason": "quota_used_up", "until": window["resets_at"]}

    shown = auth("status").stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "refused (credential, 401)" in shown
    assert "quota used up" in shown
    assert "NOT_SET_ANYWHERE is empty" in lines["anthropic/gone"]
    assert "GEMINI_API_KEY is empty" in lines["google/default"]
    assert "95%" in lines["anthropic/team"]


@pytest.mark.usefixtures("fleet")
def test_no_secret_is_shown(auth):
    """Not in tables, JSON or errors."""
    ran = [auth("status"), auth("status", "--json"), auth("status", code=3, REDIS_URL=NOBODY)]
    ran.append(auth("reset", "--key", "anthropic/nobody", code=2))
    for one in ran:
        assert not any(secret in one.output for secret in (API_KEY, SECOND, TOKEN, "s3cret-word"))


def test_status_without_redis_says_what_is_known(auth, told):
    """Strategy and keys; that the rest is not known is said, and is exit code 3."""
    found = told(code=3, REDIS_URL=NOBODY)
    assert [found[name]["present"] for name in ("anthropic/default", "anthropic/gone")] == [True, False]
    unknown = ("refused", "held", "windows", "in_flight", "reserved_tokens", "tells_no_quota")
    assert {found["anthropic/team"][name] for name in unknown} == {None}
    known = json.loads(auth("status", "--json", code=3, REDIS_URL=NOBODY).stdout)
    assert known["strategy"]["subscription_tier"] == "pro"
    assert known["credentials_error"].startswith("Redis at redis://:***@127.0.0.1:1/0 cannot be reached")
    shown = auth("status", code=3, REDIS_URL=NOBODY).stdout
    assert "small_module_threshold" in shown
    assert "NOT_SET_ANYWHERE is empty" in shown
    assert "which keys are refused, and what is left of quotas, is not known now: Redis at redis://:***@" in shown


@pytest.mark.usefixtures("fleet")
def test_a_refused_key_is_tried_again_when_it_is_told(auth, told):
    """Without --confirm, as nothing is lost; the strategy stays as it is."""
    auth("setup", "--tier", "max")
    key = ("reset", "--key", "anthropic/two")
    assert "anthropic/two: the refusal is forgotten: the next call tries it" in auth(*key).stdout
    assert told()["anthropic/two"]["refused"] is None
    assert "it was not refused" in auth(*key).stdout
    assert json.loads(auth(*key, "--json").stdout) == {"reset": False, "key": "anthropic/two"}
    assert json.loads(auth("status", "--json").stdout)["strategy"]["subscription_tier"] == "max"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("anthropic/thre", "anthropic has no credential 'thre'; configured: default, two, gone, team"),
        ("antropic/two", "'antropic' is not a provider; configured: "),
        ("two", "'two' is not a provider"),
        ("", "'' is not a provider"),
    ],
)
def test_a_key_that_there_is_not_is_refused_with_those_there_are(auth, key, said):
    """Exit code 2, one line."""
    assert said in auth("reset", "--key", key, code=2).stderr


def test_a_reset_of_a_key_needs_redis(auth):
    """Exit code 3."""
    assert "cannot be reached" in auth("reset", "--key", "anthropic/two", code=3, REDIS_URL=NOBODY).stderr


def test_the_function_does_what_the_command_does(own_environ, monkeypatch, capsys):
    """A provider alone means its default key."""
    for name, value in own_environ.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    assert cmd_auth_reset(key="openai", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"reset": False, "key": "openai/default"}
    assert cmd_auth_reset(key="openai/x") == 2
    get_settings.cache_clear()


def test_recommend_says_when_there_is_no_subscription_to_go_by(invoke, auth, tmp_path):
    """What the plan recommends is not what workers do where no provider has a subscription."""
    said = "no provider has a subscription in these settings"
    assert said in invoke("auth", "recommend", "--lines", "5", AUTH__FILE=str(tmp_path / "auth.json")).stdout
    assert said not in auth("recommend", "--lines", "5").stdout
