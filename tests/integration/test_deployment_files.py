"""There is no container engine here: what can be said of the files without one is said here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from attune_worker import Settings
from tests.examples.stack import ROOT

COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
DOTENV = (ROOT / ".env.example").read_text()

REFERENCE = re.compile(r"\$\{(\w+)(?::?[-?][^}]*)?\}")
"""A variable that compose fills in from .env."""

UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(duration: str) -> int:
    """Return a compose duration such as ``90s`` or ``5m`` in seconds."""
    return int(duration[:-1]) * UNITS[duration[-1]]


@pytest.mark.parametrize("name", SERVICES)
class TestEveryService:
    """What holds for every service of docker-compose.yml."""

    def test_publishes_ports_on_loopback_only(self, name):
        """Nobody else on the network reaches Redis, Flower or the simulator."""
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))

    def test_says_whether_it_is_healthy(self, name):
        """Each service has a health check, with a limit on how long it may take."""
        check = SERVICES[name]["healthcheck"]
        assert check["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries"} <= check.keys()

    def test_comes_back_after_a_crash(self, name):
        """Only a stop by hand keeps a service stopped."""
        assert SERVICES[name]["restart"] == "unless-stopped"


def test_redis_keeps_accepted_jobs():
    """Redis writes every change to disk, in a volume, and refuses writes before it evicts a job."""
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


@pytest.mark.parametrize(("service", "variable"), [("redis", "REDIS_PASSWORD"), ("flower", "FLOWER_PASSWORD")])
def test_passwords_have_no_default(service, variable):
    """Compose stops with a message when a password is not set."""
    uses = re.findall(rf"\$\{{{variable}[^}}]*\}}", yaml.safe_dump(SERVICES[service], width=1000))
    assert uses
    assert all(use.startswith(f"${{{variable}:?") for use in uses)


def test_workers_are_given_time_to_finish_and_can_be_scaled():
    """A stopped worker has its grace time and some for handing back; no port or name keeps a second one out."""
    worker = SERVICES["worker"]
    assert seconds(worker["stop_grace_period"]) >= Settings().recovery.shutdown_grace_seconds + 20
    assert worker.keys().isdisjoint({"ports", "container_name", "hostname"})


def test_containers_get_settings_that_exist():
    """Every ATTUNE_ variable in docker-compose.yml is a setting."""
    environ = {name for service in SERVICES.values() for name in service.get("environment", {})}
    samples = {"ATTUNE_CONCURRENCY": "10", "ATTUNE_REDIS_URL": "redis://redis:6379/0"}
    values = {name: samples.get(name, "http://host/v1") for name in environ if name.startswith("ATTUNE_")}
    assert len(values) > 2
    Settings.load(environ=values)


def test_the_environment_example_explains_every_variable_and_holds_no_secret():
    """What compose and the Procfile read is in .env.example, and its passwords and keys are empty."""
    known = dict(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=(.*)$", DOTENV, flags=re.MULTILINE))
    assert set(REFERENCE.findall(COMPOSE + (ROOT / "Procfile").read_text())) <= known.keys()
    secrets = {name: value for name, value in known.items() if name.endswith(("_PASSWORD", "_KEY"))}
    assert set(secrets.values()) <= {"", "simulated"}
    assert "Settings" in repr(Settings.load(environ={k: v for k, v in known.items() if k.startswith("ATTUNE_")}))


def test_the_image_runs_as_an_ordinary_user_and_takes_only_what_it_needs():
    """The image's process is not root, and nothing of the folder is copied that is not named."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1:] == ["attune"]
    copied = {part for line in lines if line.startswith("COPY ") for part in line.split()[1:-1]}
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in allowed
    assert copied == {line[1:] for line in allowed if line.startswith("!")}
