import json
import re
from importlib.metadata import PackageNotFoundError

import pytest
from redis import Redis

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.doctor import installation, state, versions
from attune_worker.doctor.providers import Reply, judged
from attune_worker.doctor.transport import redelivery
from attune_worker.errors import CredentialError, OverloadedError
from attune_worker.jobs import Job
from attune_worker.models.breaker import CircuitBreaker
from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings
from attune_worker.simulator import Profile
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.leases import Leases
from attune_worker.store.server import eviction_warning
from tests.conftest import API_KEY

CLOSED_PORT = 1
"""Nobody listens there; a free one could be somebody's by the time that it is asked."""


@pytest.fixture
def doctor(invoke):
    """Return a function that asks the doctor and returns the findings by what was looked at."""

    def ask(*options, code=0, **overrides):
        told = json.loads(invoke("doctor", "--json", *options, code=code, **overrides).stdout)
        return {one["check"]: (one["level"], one["text"], one["fix"]) for one in told["findings"]}

    return ask


@pytest.fixture
def own_server(tmp_path):
    """A Redis that a test may configure as it likes."""
    with EmbeddedRedis(tmp_path) as server, Redis.from_url(server.url) as client:
        yield server, client


def test_a_healthy_fleet_has_nothing_to_mend(doctor, settings, tmp_path):
    """Everything is looked at, and found well; a worker that holds a lease is named."""
    leases = Leases(settings)
    leases.beat("host:1:aaaa", 30, again=False)
    found = doctor(AUTH__FILE=tmp_path / "auth.json")
    leases.close()
    assert {level for check, (level, _, _) in found.items() if check != "latency"} == {"ok"}
    assert found["latency"][0] in {"ok", "warning"}  # as this machine is busy
    assert set(found) == {
        "python", "packages", "settings", "providers", "prices", "provider", "strategy", "redis", "version",
        "eviction", "durability", "latency", "clock", "jobs", "workers", "credentials", "circuits", "broker",
        "redelivery",
    }  # fmt: skip
    assert "host:1:aaaa" in found["workers"][1]
    assert "can be called from here: anthropic, openai" in found["providers"][1]


def test_what_the_doctor_says_holds_no_secret(invoke, environ):
    """Versions and settings are told with where they come from, keys and passwords are not."""
    secrets = {"PROVIDERS__ANTHROPIC__API_KEY": "sk-hush-hush", "USER_HASH_KEY": "pepper-hush"}
    ran = invoke("doctor", code=1, **secrets)
    told = invoke("doctor", "--json", code=1, **secrets)
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


def test_settings_of_a_table_in_the_environment_are_told_with_their_variable(invoke, tmp_path):
    """They stand over those of the file one by one; and a variable for one of them stands over the table."""
    file = tmp_path / "own.toml"
    file.write_text("[breaker]\nfailure_threshold = 3\nhalf_open_calls = 2\nrecovery_timeout_seconds = 30\n")
    table = '{"failure_threshold": 9, "recovery_timeout_seconds": 40}'
    told = invoke("doctor", "--json", CONFIG=file, BREAKER__RECOVERY_TIMEOUT_SECONDS=50, BREAKER=table)
    configured = {one["name"]: (one["value"], one["origin"]) for one in json.loads(told.stdout)["settings"]}
    assert {name: found for name, found in configured.items() if name.startswith("breaker")} == {
        "breaker.failure_threshold": ("9", "ATTUNE_BREAKER"),
        "breaker.half_open_calls": ("2", str(file)),
        "breaker.recovery_timeout_seconds": ("50.0", "ATTUNE_BREAKER__RECOVERY_TIMEOUT_SECONDS"),
    }


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
    client.replicaof("127.0.0.1", CLOSED_PORT)
    client.config_set("replica-read-only", "no")  # the broker's client would wait for it otherwise
    assert doctor(code=1, REDIS_URL=server.url)["role"][0] == "failed"


def test_a_redis_that_is_away_is_exit_code_3(invoke, doctor, redis_server):
    """What needs no Redis is told all the same, and so is the broker where it is another server."""
    away = f"redis://:hush@127.0.0.1:{CLOSED_PORT}/0"
    found = doctor(code=3, REDIS_URL=away, BROKER_URL=redis_server.url, RESULT_BACKEND=redis_server.url)
    assert found["redis"][0] == "unreachable"
    assert {found[check][0] for check in ("settings", "providers", "prices", "broker", "results")} == {"ok"}
    shown = invoke("doctor", code=3, REDIS_URL=away).output
    assert "cannot be reached" in shown
    assert "hush" not in shown


def test_a_broker_and_a_result_backend_that_are_away_are_exit_code_3(doctor):
    """Jobs would be accepted, and run when the broker is back."""
    away = f"redis://:hush@127.0.0.1:{CLOSED_PORT}/0"
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


def test_circuits_that_are_not_closed_are_warnings(doctor, invoke, settings):
    """What an operator has tripped and forgotten is named, with who, why, and what lifts it."""
    assert doctor()["circuits"][0] == "ok"
    invoke("breaker", "trip", "anthropic", "premium", "--reason", "maintenance")
    level, text, fix = doctor()["circuits"]
    assert level == "warning"
    assert text.startswith("anthropic:premium is forced open until it is reset; maintenance; by ")
    assert "breaker reset anthropic premium" in fix
    invoke("breaker", "reset")
    breaker = CircuitBreaker(1, settings=settings)
    breaker.record_failure("anthropic", "cheap", OverloadedError("529"))
    breaker.close()
    level, text, fix = doctor()["circuits"]
    assert (level, "anthropic:cheap is open until 20" in text, fix[-15:]) == ("warning", True, "anthropic cheap")


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


@pytest.fixture
def asked(invoke):
    """Return a function that asks the doctor, and returns level and text of what it found of each provider."""

    def ask(*options, code=0, **overrides):
        told = json.loads(invoke("doctor", "--json", *options, code=code, **overrides).stdout)
        found = [one for one in told["findings"] if one["check"] == "provider"]
        return {one["text"].split()[0]: (one["level"], one["text"]) for one in found}

    return ask


def replying(head, body=b""):
    """Return what makes a ``RawServer`` give that answer."""
    return lambda connection: connection.sendall(
        f"HTTP/1.1 {head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    )


def test_a_provider_is_asked_for_its_models_and_nothing_else(asked, simulator):
    """That starts no call and costs nothing; each provider that has a key is asked, and no other."""
    found = asked()
    assert set(found) == {"anthropic", "openai"}
    for name, (level, text) in found.items():
        assert level == "ok"
        assert re.fullmatch(rf"{name} answers in \d+ ms and takes the key", text)
    assert simulator.requests()["requests"] == []


def test_offline_no_provider_is_contacted(asked, raw_server):
    """Keys and prices are told all the same."""
    server = raw_server(replying("200 OK", b"{}"))
    assert asked("--offline", PROVIDERS__ANTHROPIC__BASE_URL=server.url) == {}
    assert server.received == []


def test_a_key_that_is_refused_is_a_failure(asked, invoke):
    """Its calls would fail: exit code 1."""
    changed = {"PROVIDERS__OPENAI__API_KEY": "sk-wrong"}
    assert asked(code=1, **changed)["openai"] == ("failed", "openai refuses the key, so its calls fail (401)")
    assert "Renew the key" in invoke("doctor", code=1, **changed).output


OTHERS = [
    {"name": "two", "secret": "sk-second-hush"},
    {"name": "team", "mode": "subscription", "secret": "token-hush"},
]
SEVERAL = {"PROVIDERS__ANTHROPIC__CREDENTIALS": json.dumps(OTHERS)}


@pytest.fixture
def lacking(invoke):
    """Return a function that asks the doctor, and returns text and fix of each key that is not here."""

    def ask(*, credentials=(), code=0, **overrides):
        overrides["PROVIDERS__ANTHROPIC__CREDENTIALS"] = json.dumps(list(credentials))
        told = json.loads(invoke("doctor", "--json", "--offline", code=code, **overrides).stdout)
        found = [one for one in told["findings"] if one["check"] == "providers" and one["level"] == "warning"]
        return [(one["text"], one["fix"]) for one in found]

    return ask


EMPTY = {"name": "team", "mode": "subscription", "secret": "env:NOBODY_HAS_THIS"}


def test_a_configured_key_that_is_not_here_is_a_warning_while_others_are(lacking):
    """With its variable, and what calls do without it: without a subscription's token they cost money."""
    two = {"name": "two", "secret": "env:NOR_THIS"}
    [(subscription, fix), (key, _)] = lacking(credentials=[EMPTY, two])
    assert subscription == (
        "the subscription anthropic/team has no token here (NOBODY_HAS_THIS is empty): "
        "calls go by API keys and are paid by the token"
    )
    assert fix.startswith("Set NOBODY_HAS_THIS wherever workers run")
    assert key == "anthropic/two has no key here (NOR_THIS is empty): calls go by the others"
    both = [EMPTY, {"name": "spare", "mode": "subscription", "secret": "token"}]
    [(text, _)] = lacking(credentials=both)
    assert text.endswith("calls go by the others")
    [(text, fix)] = lacking(credentials=[{"name": "two", "secret": ""}])
    assert (text, "the secret of anthropic/two" in fix) == (
        "anthropic/two has no key here (its secret is empty): calls go by the others",
        True,
    )


def test_a_default_key_that_is_not_here_is_told_where_somebody_has_configured_it(lacking):
    """Providers come with one; whoever pays by a subscription alone has nothing to mend."""
    here = [{"name": "team", "mode": "subscription", "secret": "token"}]
    [(text, _)] = lacking(credentials=here, PROVIDERS__ANTHROPIC__API_KEY="env:NOBODY_HAS_THIS")
    assert text.startswith("anthropic/default has no key here (NOBODY_HAS_THIS is empty)")
    assert lacking(credentials=here, PROVIDERS__GOOGLE__CREDENTIALS=json.dumps(here)) == []


def test_a_provider_without_any_key_is_told_once(lacking):
    """By the finding that names all of them."""
    assert lacking(credentials=[EMPTY], PROVIDERS__ANTHROPIC__API_KEY="env:NOR_THIS") == []


def test_each_key_is_asked_and_the_refused_one_is_named(asked, invoke, simulator):
    """While others of its provider are taken its calls go by them: a warning; no quota is used."""
    window = {"capacity_tokens": 1000}
    team = {"token-hush": {"name": "team", "windows": {"5h": window}}}
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "subscriptions": team})
    found = asked(**SEVERAL)
    assert found["anthropic/two"] == (
        "warning",
        "anthropic/two refuses the key, so its calls fail (401); others go on",
    )
    assert [found[name][0] for name in ("anthropic/default", "anthropic/team", "openai")] == ["ok"] * 3
    [quota] = simulator.subscriptions().values()
    assert (quota["served"], quota["tokens"], simulator.requests()["requests"]) == (0, 0, [])
    assert "hush" not in invoke("doctor", **SEVERAL).output


def test_a_provider_that_takes_none_of_its_keys_is_a_failure(asked, simulator):
    """Exit code 1, though another provider goes on."""
    simulator.profile = Profile.parse({"api_keys": ["another"]})
    found = asked(code=1, **SEVERAL, PROVIDERS__OPENAI__API_KEY="another")
    of_anthropic = {found[f"anthropic/{name}"][0] for name in ("default", "two", "team")}
    assert (of_anthropic, found["openai"][0]) == ({"failed"}, "ok")


def test_a_provider_with_several_keys_that_is_away_is_told_once(invoke):
    """Its keys have nothing to do with it."""
    away = f"http://127.0.0.1:{CLOSED_PORT}"
    told = json.loads(invoke("doctor", "--json", **SEVERAL, PROVIDERS__ANTHROPIC__BASE_URL=away).stdout)
    texts = [one["text"] for one in told["findings"] if one["check"] == "provider"]
    assert len([text for text in texts if "does not answer" in text]) == 1


@pytest.fixture
def with_keys(environ, simulator):
    """Return a function that calls by keys until each of them was refused, and returns nothing."""

    def call(*models, **overrides):
        simulator.profile = Profile.parse({"api_keys": ["another"]})
        own = {**environ, **{f"ATTUNE_{name}": value for name, value in overrides.items()}}
        with EmpathyLLMExecutor(Settings.load(environ=own)) as executor:
            for model in models:
                with pytest.raises(CredentialError):
                    executor.run("summarize", "?", model=model)
        simulator.profile = Profile.parse({"api_keys": [API_KEY]})

    return call


def test_a_key_that_calls_were_refused_by_is_a_finding(doctor, with_keys):
    """With since when, when it is tried again, and what to do; exit code 1 once all keys of all providers are out."""
    with_keys("claude-haiku-5-5")
    level, text, fix = doctor("--offline")["credentials"]
    assert (level, text.startswith("anthropic/default is refused since ")) == ("warning", True)
    assert "(credential, 401); one call tries it again at " in text
    assert fix.endswith("attune-worker auth reset --key anthropic/default")
    with_keys("gpt-6-luna")
    level, text, _ = doctor("--offline", code=1)["credentials"]
    assert (level, text.endswith("; no other key is left")) == ("failed", True)


def test_a_quota_that_is_used_up_is_a_finding(doctor, environ, simulator):
    """With when it is back, and that nothing is paid for instead."""
    window = {"capacity_tokens": 1000, "used": 0.98, "resets_in_seconds": 600}
    team = {"token-hush": {"name": "team", "windows": {"5h": window}}}
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "subscriptions": team})
    own = {**environ, **{f"ATTUNE_{name}": value for name, value in SEVERAL.items()}}
    with EmpathyLLMExecutor(Settings.load(environ=own)) as executor:
        executor.run("match_pattern", "?", model="claude-haiku-5-5", auth_mode="subscription", max_tokens=10)
    level, text, fix = doctor("--offline", **SEVERAL)["credentials"]
    assert (level, text.startswith("anthropic/team has no quota left (5h at 9")) == ("warning", True)
    assert "jobs that are to go by it wait" in text
    assert "spill_to_api" in fix


def test_a_strategy_is_told_with_where_it_is_kept(doctor, invoke, tmp_path):
    """In its file or in Redis; without one the defaults hold."""
    kept = {"AUTH__FILE": tmp_path / "auth.json"}
    nothing = ("ok", f"the defaults hold: nothing is kept in {tmp_path / 'auth.json'}", "")
    assert doctor("--offline", **kept)["strategy"] == nothing
    invoke("auth", "setup", "--tier", "max", **kept)
    assert doctor("--offline", **kept)["strategy"] == ("ok", f"kept in {tmp_path / 'auth.json'}", "")
    invoke("auth", "setup", "--tier", "max", AUTH__STORE="redis")
    level, text, _ = doctor("--offline", AUTH__STORE="redis")["strategy"]
    assert (level, ":auth in Redis at redis://" in text) == ("ok", True)


def test_a_strategy_that_cannot_be_read_fails_where_a_subscription_makes_jobs_wait_for_it(doctor, tmp_path):
    """With its file, the line, what that does to jobs, and what to do; without a subscription nobody reads it."""
    file = tmp_path / "auth.json"
    file.write_text('{\n  "default_mode": "auto",\n  "small_module_threshold": "many"\n}\n')
    level, text, fix = doctor("--offline", code=1, AUTH__FILE=file, **SEVERAL)["strategy"]
    assert (level, text.startswith(f"{file}, line 3: small_module_threshold: ")) == ("failed", True)
    assert text.endswith("; jobs that do not say auth_mode themselves wait until it can be read")
    assert "attune-worker auth reset --confirm" in fix
    level, text, _ = doctor("--offline", AUTH__FILE=file)["strategy"]
    assert (level, "no job waits for it" in text) == ("warning", True)
    team = json.dumps([{"name": "team", "mode": "subscription", "secret": "env:NOBODY_HAS_THIS"}])
    elsewhere = doctor("--offline", AUTH__FILE=file, PROVIDERS__ANTHROPIC__CREDENTIALS=team)
    assert elsewhere["strategy"][0] == "warning"


def test_a_strategy_in_a_redis_that_is_away_is_told_by_the_redis_finding(doctor):
    """Once; where it is kept in a file it is told all the same."""
    away = {"REDIS_URL": f"redis://127.0.0.1:{CLOSED_PORT}/0", "REDIS_TIMEOUT_SECONDS": 1}
    found = doctor("--offline", code=3, AUTH__STORE="redis", **away)
    assert (found["redis"][0], "strategy" in found) == ("unreachable", False)
    assert doctor("--offline", code=3, **away)["strategy"][0] == "ok"


def test_a_provider_that_is_away_is_a_warning_while_another_answers(asked):
    """Jobs go to the other; without any the exit code is 3."""
    away = f"http://127.0.0.1:{CLOSED_PORT}"
    level, text = asked(PROVIDERS__OPENAI__BASE_URL=f"{away}/v1")["openai"]
    assert (level, text.startswith(f"openai does not answer at {away}/v1: no connection")) == ("warning", True)
    found = asked(code=3, PROVIDERS__OPENAI__BASE_URL=away, PROVIDERS__ANTHROPIC__BASE_URL=away)
    assert {level for level, _ in found.values()} == {"unreachable"}


def test_a_provider_that_never_answers_is_given_up(asked, raw_server, until):
    """The doctor waits for a few seconds, and says so."""
    open_ends = []
    deaf = raw_server(lambda connection: open_ends.append(connection.dup()))
    found = asked(code=3, PROVIDERS__OPENAI__BASE_URL=deaf.url, PROVIDERS__ANTHROPIC__BASE_URL=deaf.url)
    assert {text.partition(": ")[2] for _, text in found.values()} == {"no complete answer in time (ReadTimeout)"}
    until(lambda: len(open_ends) == 2)
    for end in open_ends:
        end.close()


def test_the_key_goes_to_the_base_url_and_nowhere_else(asked, raw_server):
    """A redirect is not followed, and told."""
    other = raw_server(replying("200 OK", b"{}"))
    first = raw_server(replying(f"302 Found\r\nlocation: {other.url}/v1/models"))
    level, text = asked(PROVIDERS__ANTHROPIC__BASE_URL=first.url)["anthropic"]
    assert (level, text) == ("warning", "anthropic points elsewhere (302), and calls follow nobody")
    assert b"GET /v1/models HTTP/1.1" in first.received[0]
    assert API_KEY.encode() in first.received[0]
    assert other.received == []


def test_what_a_provider_says_is_not_shown(asked, invoke, raw_server):
    """Some repeat the key in their answer."""
    parrot = raw_server(replying("500 Oops", f"you sent {API_KEY}".encode()))
    changed = {"PROVIDERS__ANTHROPIC__BASE_URL": parrot.url}
    assert asked(**changed)["anthropic"] == ("warning", "anthropic answers with an error (500)")
    assert API_KEY not in invoke("doctor", **changed).output


def test_the_proxy_is_honoured(asked, raw_server):
    """Providers are asked through it, as in calls, and its password is not told."""
    proxy = raw_server(replying("407 Proxy Authentication Required"))
    found = asked(HTTP__PROXY=proxy.url.replace("://", "://me:hush@"), PROVIDERS__OPENAI__BASE_URL="http://o.test/v1")
    assert found["openai"] == ("warning", "openai is behind a proxy that wants a password (407)")
    assert any(request.startswith(b"GET http://o.test/v1/models HTTP/1.1") for request in proxy.received)
    away = f"http://me:hush@127.0.0.1:{CLOSED_PORT}"
    _, text = asked(code=3, HTTP__PROXY=away)["openai"]
    assert "me:***@" in text
    assert "hush" not in text


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"status": 200, "key_sent": False}, "ok", "answers in 12 ms"),
        ({"status": 401, "key_sent": False}, "failed", "wants a key"),
        ({"status": 402}, "failed", "wants to be paid"),
        ({"status": 403}, "warning", "may be allowed"),
        ({"status": 404}, "warning", "no list of models"),
        ({"status": 429}, "warning", "limit is used up"),
        ({"status": 503}, "warning", "answers with an error (503)"),
        ({"status": 404, "key_sent": False, "lists_models": False}, "ok", "no way to try the key"),
    ],
)
def test_each_answer_of_a_provider_has_its_meaning(changes, level, words):
    """Each that asks for something says what to do."""
    reply = {"provider": "own", "place": "http://own.test", "key_sent": True, "lists_models": True, "ms": 12.3}
    [found] = judged([Reply(**reply | changes)])
    assert (found.level, words in found.text, bool(found.fix)) == (level, True, level != "ok")


def test_a_clock_that_is_off_is_a_warning_from_a_minute_on():
    """It does no harm to jobs; logs mislead."""
    assert [state.clock(ahead).level for ahead in (0.0, -59.9, 59.9)] == ["ok"] * 3
    late = state.clock(-3600.5)
    assert (late.level, late.text.startswith("this machine is 3600.500 s behind Redis")) == ("warning", True)
    assert "no job suffers" in late.text


def test_no_visibility_timeout_bears_on_a_job(settings):
    """Messages are acknowledged early; were they not, a timeout shorter than a job would send it twice."""
    with make_app(settings) as app:
        assert redelivery(app, 10_000.0).level == "ok"
        app.conf.task_acks_late = True
        assert redelivery(app, 300.0).level == "ok"
        assert "it would be sent twice" in redelivery(app, 3600.0).text
        app.conf.broker_transport_options = {"visibility_timeout": 60}
        assert redelivery(app, 300.0).level == "warning"


def test_an_installation_that_does_not_fit_is_a_warning():
    """A Python that nobody tried, and packages that are missing, too old or too new."""
    assert installation.python("3.12.4", ["3.11", "3.12"]).level == "ok"
    assert installation.python("3.19.0", ["3.11", "3.12"]).fix == "Run it with Python 3.12."

    def installed(name):
        if name == "gone":
            raise PackageNotFoundError(name)
        return "5.8.0"

    needs = ["celery[redis]<5.8,>=5.7", "gone>=1", "click>=5,<6", 'mypy>=9; extra == "dev"']
    found = installation.packages(needs, installed)
    assert found.level == "warning"
    assert found.text == "celery is 5.8.0 and should be <5.8,>=5.7; gone is missing"
