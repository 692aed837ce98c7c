from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import ConfigurationError
from attune_worker.settings import DEFAULT_PROVIDERS, Settings, masked
from attune_worker.store.connection import connect

SECRET = "hunter2-never-shown"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(toml: str | bytes = "", environ: Mapping[str, str] | None = None) -> str:
    content = toml if isinstance(toml, bytes) else toml.encode()
    Path("attune.toml").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(environ=environ or {})
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_without_file_and_environment_there_are_defaults() -> None:
    """A user who configured nothing gets a working set."""
    settings = Settings.load(environ={})
    assert settings.broker == settings.backend == "redis://127.0.0.1:6379/0"
    assert settings.namespace == "attune"
    assert set(settings.providers) == set(DEFAULT_PROVIDERS)


def test_environment_wins_over_file_and_file_over_default() -> None:
    """Three sources, one order, down to single keys of a section."""
    Path("attune.toml").write_text('namespace = "file"\nqueue = "file"\n[retry]\nmax_attempts = 7\nbackoff_seconds = 3')
    settings = Settings.load(environ={"ATTUNE_NAMESPACE": "environ", "ATTUNE_RETRY__MAX_ATTEMPTS": "9"})
    assert (settings.namespace, settings.queue, settings.concurrency) == ("environ", "file", 500)
    assert (settings.retry.max_attempts, settings.retry.backoff_seconds) == (9, 3.0)
    assert settings.retry.backoff_cap_seconds == 8.0


def test_file_is_the_one_that_was_named(tmp_path: Path) -> None:
    """``ATTUNE_CONFIG`` names the file, and an argument wins over it."""
    Path("attune.toml").write_text('namespace = "here"')
    (tmp_path / "one.toml").write_text('namespace = "one"')
    (tmp_path / "two.toml").write_text('namespace = "two"')
    assert Settings.load(environ={}).namespace == "here"
    assert Settings.load(environ={"ATTUNE_CONFIG": "one.toml"}).namespace == "one"
    assert Settings.load("two.toml", environ={"ATTUNE_CONFIG": "one.toml"}).namespace == "two"


def test_named_file_must_exist() -> None:
    """Falling back to defaults would run with the wrong Redis."""
    with pytest.raises(ConfigurationError, match=r"^gone\.toml: there is no such file"):
        Settings.load(environ={"ATTUNE_CONFIG": "gone.toml"})


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("namespace = ", ["attune.toml", "not valid TOML"]),
        (b"namespace = '\xff'", ["attune.toml", "not valid TOML"]),
        ("namespase = 'x'", ["attune.toml", "namespase", "did you mean 'namespace'"]),
        ("zzz = 1", ["attune.toml", "zzz", "allowed: redis_url"]),
        ("[retry]\nmax_attemts = 3", ["attune.toml", "retry.max_attemts", "did you mean 'max_attempts'"]),
        ("[retry]\nmax_attempts = 99", ["attune.toml", "retry.max_attempts", "less than or equal to 20"]),
        ("concurrency = 'many'", ["attune.toml", "concurrency", "valid integer"]),
        ("namespace = 'a:b'", ["attune.toml", "namespace", "pattern"]),
        ("retention_seconds = 100_000_000_000_000_000_000", ["attune.toml", "retention_seconds", "less than"]),
        ("[http]\nrequest_timeout_seconds = inf", ["attune.toml", "http.request_timeout_seconds", "finite"]),
        (
            "[providers.x]\nkind = 'grpc'\nbase_url = 'http://h'",
            ["attune.toml", "providers.x.kind", "'grpc' is not allowed; allowed: anthropic, openai"],
        ),
        (
            "[providers.x]\nkind = 'openai'\nbase_url = 'ftp://h'",
            ["attune.toml", "providers.x.base_url", "starts with http:// or https://"],
        ),
        (
            "[providers.x]\nkind = 'openai'\nbase_url = 'http://h:99999'",
            ["attune.toml", "providers.x.base_url", "ort"],
        ),
        ("[providers.x]\nkind = 'openai'", ["attune.toml", "providers.x.base_url", "required"]),
        ("[[models]]\nid = 'm'\nprovider = 'nope'", ["models.0.provider", "'nope' is not a provider; configured: ant"]),
        (
            "[[models]]\nid = 'm'\nprovider = 'openai'\ntier = 'gold'",
            ["attune.toml", "models.0.tier", "'cheap', 'capable' or 'premium'"],
        ),
        (
            "[[models]]\nid = 'm'\nprovider = 'openai'\ninput_cost_per_million = 1",
            ["attune.toml", "models.0", "go together"],
        ),
        (
            "[[budgets]]\nper = 'day'\nlimit_usd = 1\nprovider = 'antropic'",
            ["attune.toml: budgets.0.provider: 'antropic' is not a provider; configured: anthropic, google, openai"],
        ),
        ("[breaker]\nslow_call_seconds = 5", ["attune.toml: breaker:", "slow_call_rate_threshold go together"]),
        ("[breaker]\nslow_call_rate_threshold = 0.5", ["attune.toml: breaker:", "slow_call_seconds and"]),
        ("[budgets]\nper = 'day'", ["attune.toml: budgets: it should be a list of tables: [[budgets]]"]),
        ("[models]\nid = 'm'", ["attune.toml: models: it should be a list of tables: [[models]]"]),
        ("provider_order = 'openai'", ["attune.toml: provider_order: it should be a list"]),
        (
            "[[budgets]]\nper = 'day'\nlimit_used = 1",
            ["attune.toml: budgets.0.limit_used: unknown key; did you mean 'limit_usd'?"],
        ),
        ("providers = 5", ["attune.toml", "providers", "valid dictionary"]),
    ],
)
def test_bad_file_is_one_line_naming_file_key_and_what_is_allowed(toml: str | bytes, words: list[str]) -> None:
    """The reader of the message can go and change that line."""
    message = refused(toml)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"ATTUNE_NAMESPASE": "x"}, ["ATTUNE_NAMESPASE", "did you mean ATTUNE_NAMESPACE?"]),
        ({"ATTUNE_ZZZ": "x"}, ["ATTUNE_ZZZ", "allowed: ATTUNE_REDIS_URL"]),
        ({"ATTUNE_CONCURRENCY": "many"}, ["ATTUNE_CONCURRENCY", "valid integer"]),
        ({"ATTUNE_CONCURRENCY": "0"}, ["ATTUNE_CONCURRENCY", "greater than or equal to 1"]),
        ({"ATTUNE_RETRY__MAX_ATTEMPTS": "99"}, ["ATTUNE_RETRY__MAX_ATTEMPTS", "less than or equal to 20"]),
        ({"ATTUNE_RETRY__MAX_ATTEMTS": "3"}, ["ATTUNE_RETRY__MAX_ATTEMTS", "did you mean"]),
        ({"ATTUNE_PROVIDERS__X__KIND": "grpc"}, ["ATTUNE_PROVIDERS__X__KIND", "allowed: anthropic, openai"]),
        ({"ATTUNE_MODELS": '[{"id": "m", "provider": "nope"}]'}, ["environment ATTUNE_MODELS", "'nope'"]),
        ({"ATTUNE_MODELS": "[not json", "ATTUNE_QUEUE": "q"}, ["environment ATTUNE_MODELS:", "JSON"]),
        ({"ATTUNE_PROVIDERS": "[not json", "ATTUNE_QUEUE": "q"}, ["environment ATTUNE_PROVIDERS:", "JSON"]),
        ({"ATTUNE_BUDGETS": '{"per": "day"}'}, ["ATTUNE_BUDGETS: it should be a list of tables: [[budgets]]"]),
        ({"ATTUNE_PROVIDER_ORDER": "anthropic"}, ["environment ATTUNE_PROVIDER_ORDER:", "JSON"]),
    ],
)
def test_bad_environment_is_one_line_naming_the_variable(environ: dict[str, str], words: list[str]) -> None:
    """A value from the environment must not be looked for in the file."""
    message = refused(environ=environ)
    assert message.startswith("environment ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("provider", ["", "provider = '*'", "provider = 'openai'", "provider = 'local'"])
def test_budget_may_be_for_any_configured_provider(provider: str) -> None:
    """For all together, for each by itself, or for one, be it there by default or by the file."""
    local = "[providers.local]\nkind = 'openai'\nbase_url = 'http://h'"
    Path("attune.toml").write_text(f"[[budgets]]\nper = 'day'\nlimit_usd = 1\n{provider}\n{local}")
    assert len(Settings.load(environ={}).budgets) == 1


def test_names_of_variables_may_be_lower_case_in_sections() -> None:
    """Provider names in variables are what the file calls them, in lower case."""
    settings = Settings.load(
        environ={
            "ATTUNE_PROVIDERS__LOCAL__KIND": "openai",
            "ATTUNE_PROVIDERS__LOCAL__BASE_URL": "http://127.0.0.1:1/v1/",
        }
    )
    assert settings.providers["local"].base_url == "http://127.0.0.1:1/v1"
    assert settings.providers["local"].usable({})


def test_settings_do_not_change() -> None:
    """Every part of a process sees the same values for as long as it runs."""
    settings = Settings.load(environ={})
    with pytest.raises(ValueError, match="frozen"):
        settings.namespace = "other"


def with_secrets() -> Settings:
    return Settings.load(
        environ={
            "ATTUNE_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:6379/0",
            "ATTUNE_BROKER_URL": f"redis://user:{SECRET}@127.0.0.1:6379/1",
            "ATTUNE_RESULT_BACKEND": f"redis://:{SECRET}@127.0.0.1:6379/2",
            "ATTUNE_PROVIDERS__ANTHROPIC__API_KEY": SECRET,
        }
    )


@pytest.mark.parametrize(
    "show", [repr, str, lambda settings: settings.model_dump_json(), lambda s: str(s.model_dump())]
)
def test_settings_never_print_a_secret(show: Any) -> None:
    """Settings end up in logs and tracebacks."""
    settings = with_secrets()
    assert SECRET not in show(settings)
    assert SECRET in settings.broker
    assert settings.providers["anthropic"].key({}) == SECRET


@pytest.mark.parametrize(
    "environ",
    [
        {"ATTUNE_PROVIDERS__ANTHROPIC__API_KEY": SECRET, "ATTUNE_PROVIDERS__ANTHROPIC__KIND": "grpc"},
        {"ATTUNE_PROVIDERS": f'{{"anthropic": {{"api_key": "{SECRET}", }}}}'},
        {"ATTUNE_PROVIDERS": f'{{"anthropic": {{"api_key": ["{SECRET}"]}}}}'},
        {"ATTUNE_PROVIDERS__ANTHROPIC": SECRET},
        {"ATTUNE_REDIS_URL": f"redis://:{SECRET}@h", "ATTUNE_QUEUE": "a b"},
    ],
)
def test_errors_never_show_a_secret(environ: dict[str, str]) -> None:
    """The error about a section must not repeat the key that stands in it."""
    assert SECRET not in refused(environ=environ)


def test_key_is_read_from_the_variable_that_the_file_names() -> None:
    """``env:NAME`` keeps keys out of files; an unset or empty variable is no key."""
    Path("attune.toml").write_text(
        '[providers.x]\nkind = "openai"\nbase_url = "http://h"\napi_key = "env:X_KEY"\n'
        '[providers.open]\nkind = "openai"\nbase_url = "http://h"'
    )
    settings = Settings.load(environ={})
    provider = settings.providers["x"]
    assert provider.key({"X_KEY": SECRET}) == SECRET
    assert provider.key({"X_KEY": f"{SECRET}\n"}) == SECRET
    assert (provider.key({"X_KEY": ""}), provider.key({})) == (None, None)
    assert (provider.usable({"X_KEY": SECRET}), provider.usable({})) == (True, False)
    assert settings.providers["open"].usable({})


CREDENTIAL = '[[providers.anthropic.credentials]]\nname = "a"\nsecret = "s"\n'


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        (CREDENTIAL.replace('"a"', '"default"'), ["credentials.0.name", "is the name of the key in api_key"]),
        (CREDENTIAL.replace('"a"', '"a b"'), ["credentials.0.name", "pattern"]),
        (CREDENTIAL + CREDENTIAL, ["credentials", "two of them are named 'a'"]),
        (CREDENTIAL + "burst = 0.5", ["credentials.0", 'need mode = "subscription"']),
        (CREDENTIAL + "keep_free = 0.5", ["credentials.0", 'need mode = "subscription"']),
        (CREDENTIAL + 'mode = "subscription"\nkeep_free = 0.86', ["credentials.0.keep_free", "or equal to 0.85"]),
        (CREDENTIAL + 'mode = "subscription"\nburst = 0', ["credentials.0.burst", "greater than 0"]),
        (CREDENTIAL + 'mode = "auto"', ["credentials.0.mode", "'api' or 'subscription'"]),
        (CREDENTIAL + "keep_fre = 0.1", ["credentials.0.keep_fre", "did you mean 'keep_free'"]),
        ("".join(CREDENTIAL.replace('"a"', f'"a{n}"') for n in range(17)), ["credentials", "at most 16"]),
        (CREDENTIAL.replace('"s"', '"s\\u0007"'), ["credentials.a.secret", "no HTTP header can carry"]),
    ],
)
def test_bad_credential_is_one_line_that_says_why(tmp_path: Path, toml: str, words: list[str]) -> None:
    """Which one, what is wrong with it, and nothing of its secret."""
    file = tmp_path / "attune.toml"
    file.write_text(toml)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(file, {})
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_credentials_come_from_file_and_environment(tmp_path: Path) -> None:
    """Their secrets are read from the variables that they name, and are never shown."""
    file = tmp_path / "attune.toml"
    file.write_text(CREDENTIAL.replace('"s"', '"env:TEAM_TOKEN"') + 'mode = "subscription"\nkeep_free = 0.2\n')
    provider = Settings.load(file, {}).providers["anthropic"]
    assert provider.keys({"TEAM_TOKEN": f"{SECRET}\n", "ANTHROPIC_API_KEY": "k"}) == {"default": "k", "a": SECRET}
    assert not provider.usable({})
    environ = {"ATTUNE_PROVIDERS__OPENAI__CREDENTIALS": f'[{{"name": "b", "secret": "{SECRET}"}}]'}
    settings = Settings.load(file, environ)
    assert settings.providers["openai"].keys({}) == {"b": SECRET}
    assert SECRET not in repr(settings)
    assert Settings.model_validate(settings.model_dump()) == settings


def test_default_providers_keep_what_was_not_replaced() -> None:
    """Changing one key of a known provider does not mean repeating the others, nor losing the other providers."""
    Path("attune.toml").write_text("[providers.anthropic]\nrequests_per_minute = 10")
    settings = Settings.load(environ={"ATTUNE_PROVIDERS__ANTHROPIC__BASE_URL": "http://127.0.0.1:9"})
    anthropic = settings.providers["anthropic"]
    assert (anthropic.kind, anthropic.base_url, anthropic.requests_per_minute) == (
        "anthropic",
        "http://127.0.0.1:9",
        10,
    )
    assert anthropic.key({"ANTHROPIC_API_KEY": "k"}) == "k"
    assert set(settings.providers) == set(DEFAULT_PROVIDERS)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        (f"redis://:{SECRET}@h:6379/0", "redis://:***@h:6379/0"),
        (f"rediss://user:{SECRET}@h/0", "rediss://user:***@h/0"),
        (f"amqp://user:{SECRET}@h:5672//", "amqp://user:***@h:5672//"),
        ("redis://user@h/0", "redis://user@h/0"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
    ],
)
def test_masked_url_keeps_all_but_the_password(url: str, shown: str) -> None:
    """The message must still say which server is meant."""
    assert masked(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}/with/slashes@h:6379/0",
        f"redis://:with/slash{SECRET}@h:6379/0",
        f"redis://:with#hash{SECRET}@h:6379/0",
        f"redis://:with?{SECRET}@h:6379/0",
        f"redis://:with@at{SECRET}@h:6379/0",
        f"redis://:[{SECRET}@h:6379/0",
        f"redis://h:6379/0?password={SECRET}",
        f"unix:///tmp/redis.sock?db=1&password={SECRET}",
        f"sentinel://:{SECRET}@a:26379;sentinel://:{SECRET}@b:26379",
        f"sentinel://a:26379;sentinel://:{SECRET}@b:26379",
    ],
)
def test_masked_url_hides_passwords_in_odd_urls_too(url: str) -> None:
    """Passwords hold any character, and URLs with several servers or parameters are in use."""
    assert SECRET not in masked(url)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6).map(lambda word: f"S{word}T"))
def test_no_password_survives_masking(password: str) -> None:
    """Whatever characters it is made of, and although many of them should have been escaped."""
    assert password not in masked(f"redis://:{password}@h:6379/0")


@pytest.mark.parametrize("url", [f"redis://:{SECRET}/x@h:6379/0", f"http://:{SECRET}@h", f"redis://:{SECRET}@h:port/0"])
def test_redis_url_that_is_none_is_a_configuration_error_without_the_password(url: str) -> None:
    """redis-py quotes parts of a URL that it cannot read, and the password may be among them."""
    with pytest.raises(ConfigurationError, match=r"redis_url: |ATTUNE_REDIS_URL: ") as caught:
        connect(Settings.load(environ={"ATTUNE_REDIS_URL": url}))
    assert SECRET not in str(caught.value)
