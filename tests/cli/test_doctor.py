import json
import re
import socket

import pytest
from redis import Redis

from attune_worker.client import Client
from attune_worker.doctor import versions
from attune_worker.jobs import Job
from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.leases import Leases
from attune_worker.store.server import eviction_warning
from tests.conftest import API_KEY


@pytest.fixture
def doctor(invoke):
    """Return a function that asks the doctor and returns the findings by what was looked at."""

    def ask(code=0, **overrides):
        told = json.loads(invoke("doctor", "--json", code=code, **overrides).stdout)
        return {one["check"]: (one["level"], one["text"], one["fix"]) for one in told["findings"]}

    return ask


@pytest.fixture
def own_server(tmp_path):
    """A Redis that a test may configure as it likes."""
    with EmbeddedRedis(tmp_path) as server, Redis.from_url(server.url) as client:
        yield server, client


def closed_port():
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_healthy_fleet_has_nothing_to_mend(doctor, settings):
    """Everything is looked at, and found well; a worker that holds a lease is named."""
    leases = Leases(settings)
    leases.beat("host:1:aaaa", 30, again=False)
    found = doctor()
    leases.close()
    assert {level for level, _, _ in found.values()} == {"ok"}
    assert set(found) == {
        "settings", "providers", "prices", "redis", "version", "eviction", "durability", "latency", "clock", "jobs",
        "workers", "broker",
    }  # fmt: skip
    assert "host:1:aaaa" in found["workers"][1]
    assert "can be called from here: anthropic, openai" in found["providers"][1]


def test_what_the_doctor_says_holds_no_secret(invoke, environ):
    """Versions and settings are told with where they come from, keys and passwords are not."""
    ran = invoke("doctor", PROVIDERS__ANTHROPIC__API_KEY="sk-hush-hush", USER_HASH_KEY="pepper-hush")
    told = invoke("doctor", "--json", PROVIDERS__ANTHROPIC__API_KEY="sk-hush-hush", USER_HASH_KEY="pepper-hush")
    password = environ["ATTUNE_REDIS_URL"].split(":")[2].split("@")[0]
    for text in (ran.output, told.output):
        assert not any(secret in text for secret in (API_KEY, password, "hush"))
    configured = {one["name"]: one for one in json.loads(told.stdout)["settings"]}
    assert configured["namespace"]["origin"] == "ATTUNE_NAMESPACE"
    assert configured["broker_url"] == {"name": "broker_url", "value": "as redis_url", "origin": "default"}
    assert configured["providers.anthropic.api_key"]["value"] == "***"
    assert configured["retry.backoff_seconds"]["value"] == "0.01"
    assert json.loads(told.stdout)["versions"] == versions()
    assert f"celery {versions()['celery']}" in ran.stdout


def test_settings_of_a_file_are_told_with_their_file(invoke, tmp_path):
    """A variable of the environment stands over the file, and the origin says so."""
    file = tmp_path / "own.toml"
    file.write_text('provider_order = ["openai"]\nconcurrency = 7\n[retry]\nmax_attempts = 2\n[[budgets]]\n')
    file.write_text(file.read_text() + 'per = "day"\nlimit_usd = 5\n')
    told = invoke("doctor", "--json", CONFIG=file, CONCURRENCY=9)
    configured = {one["name"]: (one["value"], one["origin"]) for one in json.loads(told.stdout)["settings"]}
    assert configured["provider_order"] == ("openai", str(file))
    assert configured["retry.max_attempts"] == ("2", str(file))
    assert configured["concurrency"] == ("9", "ATTUNE_CONCURRENCY")
    assert configured["budgets"] == ("1 in all", str(file))


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_drops_keys_is_a_failure(doctor, own_server, make_environ, simulator, policy):
    """Accepted jobs would vanish: exit code 1, with what to set; workers are warned at their start."""
    server, client = own_server
    client.config_set("maxmemory-policy", policy)
    level, text, fix = doctor(code=1, REDIS_URL=server.url)["eviction"]
    assert level == "failed"
    assert policy in text
    assert "noeviction" in fix
    own = Settings.load(environ=make_environ(simulator, REDIS_URL=server.url))
    assert policy in eviction_warning(own)
    client.config_set("maxmemory-policy", "noeviction")
    assert eviction_warning(own) is None


def test_a_redis_without_an_append_only_file_is_a_warning(doctor, own_server):
    """It works, and a crash of Redis can lose jobs: exit code 0."""
    server, client = own_server
    client.config_set("appendfsync", "no")
    assert doctor(REDIS_URL=server.url)["durability"][0] == "warning"
    client.config_set("appendonly", "no")
    level, text, fix = doctor(REDIS_URL=server.url)["durability"]
    assert (level, "may be lost" in text, "appendonly yes" in fix) == ("warning", True, True)


def test_a_redis_that_is_nearly_full_is_a_warning(doctor, own_server):
    """With noeviction, a full one refuses jobs."""
    server, client = own_server
    client.setrange("much", 50_000_000, b"0")  # beside which connections take next to nothing
    used = client.info("memory")["used_memory"]
    client.config_set("maxmemory", used * 2)
    assert doctor(REDIS_URL=server.url)["memory"][0] == "ok"
    client.config_set("maxmemory", int(used / 0.93))
    level, text, _ = doctor(REDIS_URL=server.url)["memory"]
    assert (level, "refuses new jobs" in text) == ("warning", True)


def test_what_redis_does_not_tell_is_unknown_and_not_fine(doctor, own_server):
    """Managed services refuse CONFIG, and an ACL may refuse INFO too."""
    server, client = own_server
    client.config_set("maxmemory-policy", "allkeys-lru")
    port = server.port
    client.acl_setuser(
        "few", enabled=True, passwords=["+pw"], keys=["*"], channels=["*"], commands=["+@all", "-config"]
    )
    level, text, _ = doctor(code=1, REDIS_URL=f"redis://few:pw@127.0.0.1:{port}/0")["durability"]
    assert (level, "it does not say" in text) == ("unknown", True)
    client.acl_setuser(
        "fewer", enabled=True, passwords=["+pw"], keys=["*"], channels=["*"], commands=["+@all", "-config", "-info"]
    )
    found = doctor(REDIS_URL=f"redis://fewer:pw@127.0.0.1:{port}/0")
    assert {found[check][0] for check in ("version", "eviction", "durability")} == {"unknown"}


def test_a_replica_is_a_failure(doctor, own_server):
    """It can be read, and takes no job."""
    server, client = own_server
    client.replicaof("127.0.0.1", closed_port())
    client.config_set("replica-read-only", "no")  # the broker's client would wait for it otherwise
    assert doctor(code=1, REDIS_URL=server.url)["role"][0] == "failed"


def test_a_redis_that_is_away_is_exit_code_3(invoke, doctor, redis_server):
    """What needs no Redis is told all the same, and so is the broker where it is another server."""
    away = f"redis://:hush@127.0.0.1:{closed_port()}/0"
    found = doctor(code=3, REDIS_URL=away, BROKER_URL=redis_server.url, RESULT_BACKEND=redis_server.url)
    assert found["redis"][0] == "unreachable"
    assert {found[check][0] for check in ("settings", "providers", "prices", "broker", "results")} == {"ok"}
    shown = invoke("doctor", code=3, REDIS_URL=away).output
    assert "cannot be reached" in shown
    assert "hush" not in shown


def test_a_broker_and_a_result_backend_that_are_away_are_exit_code_3(doctor):
    """Jobs would be accepted, and run when the broker is back."""
    away = f"redis://:hush@127.0.0.1:{closed_port()}/0"
    found = doctor(code=3, BROKER_URL=away, RESULT_BACKEND=away)
    assert [found[check][0] for check in ("redis", "broker", "results")] == ["ok", "unreachable", "unreachable"]


def test_jobs_and_messages_are_counted(doctor, settings):
    """Queued jobs stand beside the messages that are to wake workers for them."""
    with Client(settings) as client:
        client.submit_many([{"task_type": "summarize", "prompt": f"Text {number}."} for number in range(3)])
    found = doctor()
    assert found["jobs"][1] == "3 queued, 0 running, 0 waiting"
    assert re.search(r"; 3 messages in queue attune for 3 queued jobs$", found["broker"][1])
    assert found["workers"][0] == "warning"


def test_wake_ups_that_are_missing_are_told(doctor, records):
    """A job that was accepted without its message will be sent again."""
    job = Job(task_type="summarize", prompt="A text.")
    records.accept([("lost", job, job.to_json())])
    assert "workers send the 1 missing ones again" in doctor()["broker"][1]


def test_dead_jobs_are_a_warning(doctor, records, settings):
    """Somebody should look at them."""
    job = Job(task_type="summarize", prompt="A text.")
    records.accept([("poison", job, job.to_json())])
    for number in range(settings.recovery.max_crashes):
        records.claim("poison", f"owner-{number}", f"lease-{number}")
        records.take_over("poison", f"lease-{number}", (), "it was lost")
    level, text, fix = doctor()["dead"]
    assert (level, text[-2:], "jobs dead" in fix) == ("warning", " 1", True)


def test_providers_without_keys_and_models_without_prices_are_warnings(doctor, tmp_path):
    """Nothing could be called, or nobody would know what it cost."""
    file = tmp_path / "attune.toml"
    file.write_text(
        '[providers.own]\nkind = "openai"\nbase_url = "http://127.0.0.1:1/v1"\n'
        '[[models]]\nid = "mine"\nprovider = "own"\ntier = "cheap"\n'
    )
    found = doctor(CONFIG=file)
    assert (found["prices"][0], "own/mine" in found["prices"][1]) == ("warning", True)
    nobody = {f"PROVIDERS__{name}__API_KEY": "env:NOBODY_HAS_THIS" for name in ("ANTHROPIC", "OPENAI")}
    level, text, fix = doctor(**nobody)["providers"]
    assert (level, "ANTHROPIC_API_KEY" in fix) == ("warning", True)
    assert text == "can be called from here: none; without a key: anthropic, google, openai"
