"""A profile is checked before anything runs, and can be changed while it runs."""

import json

import pytest
from pydantic import ValidationError

from attune_worker.errors import ConfigurationError
from attune_worker.simulator import LognormalLatency, Profile, Simulator

TOML = """
seed = 7
requests_per_minute = 60

[latency]
kind = "lognormal"
median_seconds = 1.5
sigma = 0.5

[errors]
rate_limited = 0.1

[models."claude-haiku-4-5"]
errors.overloaded = 1.0
price = { input_usd = 0.1, output_usd = 0.2 }
"""


def test_toml_and_json_say_the_same(tmp_path):
    """Either form of file gives the same profile."""
    toml, as_json = tmp_path / "p.toml", tmp_path / "p.json"
    toml.write_text(TOML)
    profile = Profile.load(toml)
    as_json.write_text(profile.model_dump_json(exclude_unset=True))
    assert profile.latency == LognormalLatency(median_seconds=1.5, sigma=0.5)
    assert Profile.load(as_json) == profile


def test_a_model_takes_the_rest_from_the_profile(tmp_path):
    """What a model's table leaves out is as for all models; what it names is replaced whole."""
    path = tmp_path / "p.toml"
    path.write_text(TOML)
    behaviour = Profile.load(path).behaviour("claude-haiku-4-5")
    assert behaviour.requests_per_minute == 60
    assert (behaviour.errors.overloaded, behaviour.errors.rate_limited) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"latencyy": 1}, "latencyy"),
        ({"errors": {"overload": 1}}, "errors.overload"),
        ({"errors": {"overloaded": 1.5}}, "errors.overloaded"),
        ({"errors": {"overloaded": 0.7, "hang": 0.7}}, "1.4"),
        ({"latency": -1}, "latency"),
        ({"models": {"m": {"requests_per_minute": 0}}}, "models.m.requests_per_minute"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(fields, words):
    """The message names the field that is wrong."""
    with pytest.raises(ConfigurationError, match=words):
        Profile.parse(fields)


@pytest.mark.parametrize(
    ("name", "text"), [("p.toml", "seed = "), ("p.json", "{"), ("p.yaml", "seed: 1"), ("q.toml", None)]
)
def test_an_unreadable_file_is_refused_by_name(tmp_path, name, text):
    """A missing, broken or unknown kind of file is named in the error."""
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=name):
        Profile.load(path)


def test_a_profile_can_be_changed_over_http(simulate):
    """An outage begins and ends while callers are connected."""
    caller = simulate()
    assert caller.anthropic().status_code == 200
    assert caller.http.put("/_sim/profile", json={"errors": {"overloaded": 1}}).status_code == 200
    assert caller.anthropic().status_code == 529
    caller.simulator.profile = Profile()
    assert caller.anthropic().status_code == 200


@pytest.mark.parametrize("content", ['{"errors": {"overloaded": 2}}', "[]", "{"])
def test_a_wrong_change_is_refused_and_changes_nothing(simulate, content):
    """The reason comes back, and the old profile stays."""
    caller = simulate(errors={"overloaded": 1})
    response = caller.http.put("/_sim/profile", content=content)
    assert response.status_code == 400
    assert response.json()["error"]
    assert caller.anthropic().status_code == 529


def test_a_profile_can_be_read_changed_and_sent_back(simulate):
    """What is shown is a valid profile; keys are not shown, and stay in force."""
    fields = {"seed": 3, "latency": 0, "api_keys": ["sk-1"], "models": {"m": {"errors": {}, "context_window": 5}}}
    caller = simulate(**fields)
    before = caller.simulator.profile
    shown = caller.http.get("/_sim/profile")
    assert "sk-1" not in shown.text
    assert caller.http.put("/_sim/profile", json={**shown.json(), "seed": 4}).status_code == 200
    after = caller.simulator.profile
    assert after.seed == 4
    assert after.api_keys == ("sk-1",)
    assert after.behaviour("m") == before.behaviour("m")


def test_a_latency_made_in_python_can_be_sent_back():
    """Its kind is shown although nobody wrote it down."""
    profile = Profile(latency=LognormalLatency(median_seconds=1, sigma=0.5))
    assert Profile.parse(json.loads(profile.model_dump_json(exclude_unset=True))) == profile


def test_a_changed_copy_behaves_as_changed():
    """Nothing that was worked out for the original survives in the copy, and the change is checked."""
    profile = Profile.parse({"errors": {"overloaded": 1}, "models": {"m": {"context_window": 5}}})
    assert profile.behaviour("m").errors.overloaded == 1
    calm = profile.model_copy(update={"errors": profile.errors.model_copy(update={"overloaded": 0})})
    assert calm.behaviour("m").errors.at(0.5) is None
    with pytest.raises(ValidationError):
        profile.errors.model_copy(update={"overloaded": 2})


def test_a_taken_port_is_a_configuration_error(simulate):
    """The message names the address."""
    port = simulate().simulator.port
    with pytest.raises(ConfigurationError, match=str(port)):
        Simulator(port=port)
