import pytest
from redis import Redis
from redis.exceptions import ResponseError

from attune_worker.store.keys import JobKeys
from attune_worker.store.records import ACCEPT, CANCEL, CLAIM, FINISH, WATCH
from attune_worker.store.scripts import Script

SCRIPTS = [ACCEPT, CLAIM, FINISH, CANCEL, WATCH]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_digest_is_the_one_that_redis_computes(redis: Redis, script: Script) -> None:
    """A wrong digest would send the whole script with every call."""
    assert redis.script_load(script.text) == script.sha


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_says_what_it_takes_and_returns(script: Script) -> None:
    """Whoever debugs Redis reads the script there, so it must explain itself."""
    own = script.text[script.text.index(f"-- {script.name.upper()}: ") :]
    head = "\n".join(line for line in own.splitlines() if line.startswith("--"))
    for part in ("KEYS  1 ", "ARGV  1 ", "Returns "):
        assert part in head


def test_forgotten_script_is_sent_again(redis: Redis) -> None:
    """Redis forgets scripts at a restart, a failover, or on command."""
    keys = JobKeys.of("scripts", "nobody")
    assert CANCEL(redis, (keys.record, keys.queued, keys.waiters), ("nobody", 60)) == b"unknown"
    redis.script_flush()
    assert CANCEL(redis, (keys.record, keys.queued, keys.waiters), ("nobody", 60)) == b"unknown"
    assert redis.script_exists(CANCEL.sha) == [True]


def test_forgotten_script_is_sent_again_within_a_batch(redis: Redis) -> None:
    """Each call of a batch gets its own answer, in order, although the first ones found no script."""
    redis.script_flush()
    shout = Script("watch")
    calls = []
    for number in range(5):
        record = f"{{scripts}}:{number}"
        redis.hset(record, mapping={"state": f"state-{number}"})
        redis.expire(record, 60)
        calls.append(((record, f"{record}:waiters"), ("channel", 60)))
    assert [answer[0] for answer in shout.many(redis, calls)] == [f"state-{number}".encode() for number in range(5)]


def test_error_of_one_call_of_a_batch_is_raised(redis: Redis) -> None:
    """An answer must never be silently an exception."""
    redis.set("{scripts}:text", "not a hash", ex=60)
    calls = [(("{scripts}:text", "{scripts}:waiters"), ("channel", 60))]
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        WATCH.many(redis, calls)
