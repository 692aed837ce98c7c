import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from attune_worker import AuthMode, AuthStrategy, ConfigurationError, ServiceUnavailableError, Settings
from attune_worker import get_auth_strategy as strategy_of
from attune_worker.jobs import MAX_COUNT
from attune_worker.models.auth_current import CurrentStrategy
from attune_worker.models.auth_store import auth_store
from attune_worker.models.learned_lines import ENOUGH_JOBS, HALF_LIFE_JOBS, LearnedLines
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import FleetKeys
from tests.conftest import PATIENCE_SECONDS, process_environ

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config" / "attune" / "auth.json"


@pytest.fixture
def in_file(environ, file):
    """Return settings that keep the strategy in this test's file."""
    return Settings.load(environ={**environ, "ATTUNE_AUTH__FILE": str(file)})


@pytest.fixture
def in_redis(environ):
    """Return settings that keep the strategy in this test's namespace."""
    return Settings.load(environ={**environ, "ATTUNE_AUTH__STORE": "redis"})


class Clock:
    """A clock that stands still until it is told otherwise."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def current(in_file, clock):
    """What a process goes by, with a clock of ours."""
    return CurrentStrategy(in_file, clock)


@pytest.fixture
def current_in_redis(in_redis, clock):
    return CurrentStrategy(in_redis, clock)


@pytest.mark.parametrize("kept_in", ["in_file", "in_redis"])
def test_what_is_saved_is_loaded(request, kept_in):
    """Every field, and the defaults where nothing was saved."""
    settings = request.getfixturevalue(kept_in)
    assert AuthStrategy.load(settings=settings) == AuthStrategy()
    strategy = AuthStrategy(
        subscription_tier="max",
        default_mode="api",
        small_module_threshold=1,
        medium_module_threshold=2,
        prefer_subscription=False,
        tokens_per_line=9.25,
        window_tokens=77,
    )
    strategy.save(settings=settings)
    assert AuthStrategy.load(settings=settings) == strategy


def test_saved_file_is_its_owners_alone(in_file, file):
    """Mode 0600 whatever the mask and whatever was there before; its folder is made, and no draft is left in it."""
    old = os.umask(0)
    try:
        AuthStrategy().save(settings=in_file)
        file.chmod(0o666)
        AuthStrategy(small_module_threshold=7).save(settings=in_file)
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_a_link_stays_a_link(in_file, file, tmp_path):
    """Who keeps their configuration elsewhere keeps it there."""
    file.parent.mkdir(parents=True)
    file.symlink_to(tmp_path / "elsewhere.json")
    AuthStrategy(small_module_threshold=7).save(settings=in_file)
    assert file.is_symlink()
    assert AuthStrategy.load(tmp_path / "elsewhere.json").small_module_threshold == 7


def test_a_file_of_ones_own_can_be_named(tmp_path):
    """``save`` and ``load`` take one, whatever the settings say."""
    AuthStrategy(small_module_threshold=7).save(tmp_path / "own.json")
    assert AuthStrategy.load(tmp_path / "own.json").small_module_threshold == 7


def test_default_file_is_in_the_users_configuration(environ, monkeypatch, tmp_path):
    """Where the reference says."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    AuthStrategy(small_module_threshold=7).save(settings=Settings.load(environ=environ))
    assert json.loads((tmp_path / "attune-worker/auth.json").read_text())["small_module_threshold"] == 7


SAVES_AGAIN = """
import sys
from attune_worker import AuthStrategy
small = int(sys.argv[1])
for _ in range(30):
    AuthStrategy(small_module_threshold=small, medium_module_threshold=10 * small).save(sys.argv[2])
"""


def test_readers_see_a_whole_file_while_two_processes_save(file):
    """One of the two strategies, never half of one or a mixture."""
    AuthStrategy(small_module_threshold=1, medium_module_threshold=10).save(file)
    command = [sys.executable, "-c", SAVES_AGAIN]
    writers = [subprocess.Popen([*command, small, str(file)], env=process_environ({})) for small in ("1", "111")]
    while any(writer.poll() is None for writer in writers):
        found = AuthStrategy.load(file)
        assert (found.small_module_threshold, found.medium_module_threshold) in {(1, 10), (111, 1110)}
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [one.name for one in file.parent.iterdir()] == [file.name]


BROKEN = [
    ("", 1, "not valid JSON"),
    ('{\n  "prefer_subscription": true\n  "default_mode": "api"\n}', 3, "not valid JSON: Expecting ',' delimiter"),
    ('{\n\n  "default_mode": "cash"\n}', 3, "default_mode: it should be 'subscription', 'api' or 'auto'"),
    ('{"window_tokens": 5,\n "small_module_threshold": -5}', 2, "small_module_threshold: it should be greater"),
    ('{\n "medium_module_threshold": 400}', 1, "small_module_threshold: 500 is more than medium_module_threshold, 400"),
    ('{\n "small_module_threshold": 3000}', 2, "3000 is more than medium_module_threshold, 2000"),
    ('{\n "small_module_threshold": "3"}', 2, "small_module_threshold: it should be a valid integer"),
    ('{\n\n\n "tokens_per_line": NaN}', 4, "tokens_per_line: it should be"),
    ('{"default_mode": "api",\n "default_mode": "auto"}', 2, "default_mode is given twice"),
    ('{\n "prefer_subscriptions": true}', 2, "unknown key; did you mean 'prefer_subscription'"),
    ('{\n "colour": "red"}', 2, "unknown key; allowed: subscription_tier"),
    ("[]", 1, "it should be a JSON object"),
    ("[" * 60_000, 1, "not valid JSON"),
    ('{"window_tokens": ' + "9" * 6000 + "}", 1, "not valid JSON"),
    (b'{\n\n"default_mode": "\xff"}', 3, "not valid UTF-8"),
]


@pytest.mark.parametrize(("text", "line", "problem"), BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("kept_in", ["in_file", "in_redis"])
def test_what_is_broken_is_told_with_its_line(request, redis, file, kept_in, text, line, problem):
    """The file or key, the line, and what is wrong there; never the defaults as if nothing had been said."""
    settings = request.getfixturevalue(kept_in)
    raw = text.encode() if isinstance(text, str) else text
    if kept_in == "in_file":
        file.parent.mkdir(parents=True)
        file.write_bytes(raw)
        place = str(file)
    else:
        redis.set(FleetKeys(settings.namespace).auth, raw)
        place = f"{FleetKeys(settings.namespace).auth} in Redis at redis://"
    for ask in (lambda: AuthStrategy.load(settings=settings), lambda: strategy_of(settings)):
        with pytest.raises(ConfigurationError) as refused:
            ask()
        assert refused.value.message.startswith(place)
        assert f", line {line}: " in refused.value.message
        assert problem in refused.value.message


def test_files_that_cannot_be_used_are_named(tmp_path):
    """A folder, a file where a folder should be, and a folder that cannot be made."""
    (tmp_path / "plain").touch()
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        AuthStrategy.load(tmp_path)
    for act in (AuthStrategy.load, AuthStrategy().save):
        with pytest.raises(ConfigurationError, match=r"plain/auth\.json: cannot be (read|written): "):
            act(tmp_path / "plain" / "auth.json")


def test_process_has_one_strategy_until_it_changes(in_file, file, current, clock):
    """The same object; what another process saves holds within a second, and so does that it was deleted."""
    first = current.get()
    assert current.get() is first
    AuthStrategy(default_mode="api").save(settings=in_file)
    assert current.get() is first
    clock.now += 1.01
    second = current.get()
    assert second.default_mode is AuthMode.API
    clock.now += 1.01
    assert current.get() is second
    file.unlink()
    clock.now += 1.01
    assert current.get().default_mode is AuthMode.AUTO


def test_file_of_the_same_size_and_time_is_noticed(in_file, file, current, clock):
    """Clocks of file systems are coarse: a new file is told by its inode, too."""
    AuthStrategy(small_module_threshold=111).save(settings=in_file)
    before = file.stat()
    assert current.get().small_module_threshold == 111
    AuthStrategy(small_module_threshold=222).save(settings=in_file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now += 1.01
    assert current.get().small_module_threshold == 222


def test_broken_file_is_an_error_until_it_is_mended(in_file, file, current, clock):
    """To every caller; and then it holds again, also where it is the old one that has come back."""
    AuthStrategy(default_mode="api").save(settings=in_file)
    current.get()
    file.rename(file.with_name("aside"))
    file.mkdir()
    clock.now += 1.01
    with pytest.raises(ConfigurationError, match="cannot be read"):
        current.get()
    file.rmdir()
    file.with_name("aside").rename(file)
    clock.now += 1.01
    assert current.get().default_mode is AuthMode.API
    file.write_text('{\n"default_mode": 3}')
    for _ in range(3):
        clock.now += 1.01
        with pytest.raises(ConfigurationError, match="line 2: default_mode"):
            current.get()
    AuthStrategy().save(settings=in_file)
    clock.now += 1.01
    assert current.get().default_mode is AuthMode.AUTO


def test_threads_share_one_strategy(in_file):
    """Also when all of them ask first."""
    barrier = threading.Barrier(20)

    def ask(_):
        barrier.wait()
        return strategy_of(in_file)

    with ThreadPoolExecutor(20) as pool:
        assert len({id(found) for found in pool.map(ask, range(20))}) == 1


FORKS = """
import os
from attune_worker import AuthMode, AuthStrategy, get_auth_strategy
from attune_worker.models import auth_current
assert get_auth_strategy().default_mode is AuthMode.AUTO
AuthStrategy(default_mode="api").save()
with auth_current._keeping:
    child = os.fork()
    if not child:
        os._exit(get_auth_strategy().default_mode is not AuthMode.API)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_child_process_asks_for_itself(environ, file):
    """After a fork it is held up by no lock of its parent's threads, and sees what was saved."""
    there = process_environ({**environ, "ATTUNE_AUTH__FILE": str(file)})
    subprocess.run([sys.executable, "-c", FORKS], env=there, check=True, timeout=PATIENCE_SECONDS)


ASKS = "from attune_worker import get_auth_strategy; print(get_auth_strategy().get_recommended_mode(10).value)"
SAVES = "from attune_worker import *; AuthStrategy(default_mode='api').save()"


def test_processes_share_what_is_in_redis(environ, in_redis, current_in_redis, redis, clock):
    """Saved by one process, it holds in another, and here when five seconds have passed. The key has no TTL."""
    there = process_environ({**environ, "ATTUNE_AUTH__STORE": "redis"})

    def run(script):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], env=there, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert current_in_redis.get().get_recommended_mode(10) is AuthMode.SUBSCRIPTION
    assert run(ASKS) == "subscription"
    run(SAVES)
    assert run(ASKS) == "api"
    clock.now += 4.9
    assert current_in_redis.get().get_recommended_mode(10) is AuthMode.SUBSCRIPTION
    clock.now += 0.2
    assert current_in_redis.get().get_recommended_mode(10) is AuthMode.API
    assert redis.ttl(FleetKeys(in_redis.namespace).auth) == -1


def test_last_known_strategy_holds_while_redis_is_away(environ, tmp_path, clock, caplog):
    """Said once; when Redis is back, what it holds then does."""
    server = EmbeddedRedis(tmp_path / "redis")
    with server:
        settings = Settings.load(environ={**environ, "ATTUNE_REDIS_URL": server.url, "ATTUNE_AUTH__STORE": "redis"})
        current = CurrentStrategy(settings, clock)
        AuthStrategy(default_mode="api").save(settings=settings)
        assert current.get().default_mode is AuthMode.API
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now += 5.1
            assert current.get().default_mode is AuthMode.API
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the auth strategy that was known last holds"
    ]
    with server:
        AuthStrategy(small_module_threshold=7).save(settings=settings)
        clock.now += 31
        assert current.get().small_module_threshold == 7


def test_unknown_strategy_is_an_error_while_redis_is_away(environ, clock):
    """Nobody knows what the operator has decided, so nothing is assumed, until somebody knows."""
    settings = Settings.load(environ={**environ, "ATTUNE_REDIS_URL": NOBODY, "ATTUNE_AUTH__STORE": "redis"})
    current = CurrentStrategy(settings, clock)
    for seconds in (0, 0.1, 5.1, 5.1):
        clock.now += seconds
        with pytest.raises(ServiceUnavailableError, match="cannot be reached") as away:
            current.get()
        assert away.value.url == NOBODY
    with pytest.raises(ServiceUnavailableError):
        AuthStrategy().save(settings=settings)


def test_stores_say_where_they_are_without_a_password(environ):
    """An error names its place, and no error shows a secret."""
    url = "redis://user:s3cret-word@127.0.0.1:1/0"
    settings = Settings.load(environ={**environ, "ATTUNE_REDIS_URL": url, "ATTUNE_AUTH__STORE": "redis"})
    assert "s3cret" not in auth_store(settings).place


@pytest.fixture
def lines(settings, redis):
    return LearnedLines(settings, redis)


def test_multiplier_is_learned_from_what_jobs_used(in_file, redis):
    """From enough jobs on; what is set by hand wins over it."""
    lines = LearnedLines(in_file, redis)
    strategy = AuthStrategy().bound(in_file, lines)
    assert strategy.multiplier() == (12.0, "default", 0)
    for _ in range(ENOUGH_JOBS):
        assert lines.learn(100, 800)
    fresh = LearnedLines(in_file, redis)
    assert AuthStrategy().bound(in_file, fresh).multiplier() == (pytest.approx(8), "learned", ENOUGH_JOBS)
    assert AuthStrategy().bound(in_file, fresh).estimate_cost(1000)["input_tokens"] == 8000
    assert AuthStrategy(tokens_per_line=3).bound(in_file, fresh).multiplier()[:2] == (3, "set")
    assert strategy_of(in_file).multiplier().source == "learned"


def test_few_jobs_say_nothing(lines):
    """One odd prompt is not what a line is."""
    for _ in range(ENOUGH_JOBS - 1):
        lines.learn(1, 900)
    assert lines.read() == (pytest.approx(900), ENOUGH_JOBS - 1)
    assert lines.latest() is None


def test_old_jobs_fade(lines):
    """After ``HALF_LIFE_JOBS`` others a job counts half."""
    lines.learn(1000, 20_000)
    for _ in range(HALF_LIFE_JOBS):
        lines.learn(1, 10)
    fading = 0.5 ** (1 / HALF_LIFE_JOBS)
    others = sum(fading**age for age in range(HALF_LIFE_JOBS))
    assert lines.read().tokens_per_line == pytest.approx((20_000 / 2 + 10 * others) / (1000 / 2 + others))


@pytest.mark.parametrize(
    ("module_lines", "tokens"), [(None, 5), (0, 5), (-3, 5), (5, None), (5, 0), (1, 1001), (6, 5), (MAX_COUNT, 500)]
)
def test_pairs_that_mean_nothing_are_not_learned(lines, module_lines, tokens):
    """A job that names no size or an absurd one, a call whose use is unknown, three lines under a long instruction."""
    assert not lines.learn(module_lines, tokens)
    assert lines.read() is None


@pytest.mark.parametrize(
    "fields",
    [
        {"lines": "x", "tokens": 5, "jobs": 30},
        {"lines": 5},
        {"lines": 1e9, "tokens": 5, "jobs": 30},
        {"lines": "nan", "tokens": "inf", "jobs": 30},
        None,
    ],
)
def test_garbled_sums_count_as_missing(lines, settings, redis, fields):
    """What somebody else wrote there is neither believed nor in the way."""
    key = FleetKeys(settings.namespace).auth_lines
    if fields is not None:
        redis.hset(key, mapping=fields)
        assert lines.read() is None
    else:
        redis.set(key, "foreign")
    assert lines.learn(10, 100)
    assert lines.read() == (pytest.approx(10), 1)
    assert 0 < redis.ttl(key) <= 35 * 86_400


def test_learning_stops_nobody_while_redis_is_away(environ, caplog):
    """The job goes on, the estimate has the default, and it is said once."""
    settings = Settings.load(environ={**environ, "ATTUNE_REDIS_URL": NOBODY})
    lines = LearnedLines(settings)
    assert [lines.learn(10, 100) for _ in range(50)] == [False] * 50
    assert AuthStrategy().bound(settings, lines).multiplier().source == "default"
    assert len(caplog.records) == 1
