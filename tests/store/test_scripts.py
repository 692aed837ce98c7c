import pytest
from redis import Redis
from redis.exceptions import ResponseError

from attune_worker.store.due import DUE, LEAD, WAKE
from attune_worker.store.keys import JobKeys
from attune_worker.store.listing import COUNTS, NEWEST, RUNNING
from attune_worker.store.queued import QUEUED, RESEND
from attune_worker.store.records import ACCEPT, CANCEL, CLAIM, FINISH, PUT_BACK, RETRY, TAKE_OVER, WATCH
from attune_worker.store.scripts import Script
from tests.cluster import LocalCluster

SCRIPTS = [
    *(ACCEPT, CLAIM, PUT_BACK, FINISH, CANCEL, TAKE_OVER, RETRY, WATCH),
    *(LEAD, DUE, WAKE, QUEUED, RESEND, RUNNING, COUNTS, NEWEST),
]


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
    assert CANCEL(redis, keys.all, ("nobody", 60)) == b"unknown"
    redis.script_flush()
    assert CANCEL(redis, keys.all, ("nobody", 60)) == b"unknown"
    assert redis.evalsha(CANCEL.sha, len(keys.all), *keys.all, "nobody", 60) == b"unknown"


def test_forgotten_script_is_sent_again_within_a_batch(redis: Redis) -> None:
    """Each call of a batch gets its own answer, in order, although the first ones found no script."""
    redis.script_flush()
    calls = []
    for number in range(5):
        record = f"{{scripts}}:{number}"
        redis.hset(record, mapping={"state": f"state-{number}"})
        redis.expire(record, 60)
        calls.append(((record, f"{record}:waiters"), ("channel", 60, "state", "result")))
    assert [answer[0] for answer in WATCH.many(redis, calls)] == [f"state-{number}".encode() for number in range(5)]


def test_batch_survives_one_node_that_has_forgotten(cluster: LocalCluster) -> None:
    """Each node remembers scripts of its own, and a batch goes to all of them."""
    ids = [f"nobody-{number}" for number in range(32)]
    keys = [JobKeys.of("scripts", job_id) for job_id in ids]
    calls = [(each.all, (job_id, 60)) for job_id, each in zip(ids, keys, strict=True)]
    with cluster.client() as redis:
        for node in cluster.of_each_node():
            assert CANCEL.many(redis, calls) == [b"unknown"] * len(calls)
            with node:
                node.script_flush()
        assert CANCEL.many(redis, calls) == [b"unknown"] * len(calls)


def test_slot_that_moves_to_another_node_is_followed(cluster: LocalCluster) -> None:
    """ASK while it moves, MOVED when it has; the new node does not know the script yet."""
    keys = [f"{{moving}}:{number}" for number in range(4)]
    calls = [((key, f"{key}:waiters"), ("channel", 60, "state", "result")) for key in keys]
    with cluster.client() as redis, cluster.client() as batches:
        for key in keys:
            redis.hset(key, mapping={"state": "queued", "result": key})
            redis.expire(key, 60)
        WATCH.many(redis, calls)  # while a slot moves, a script whose keys are not all there is told TRYAGAIN
        for finish in (False, True):
            for client in (redis, batches):
                client.script_flush()
            cluster.move_slot("{moving}", finish=finish)
            assert [answer[1] for answer in WATCH.many(batches, calls)] == [key.encode() for key in keys]
            assert [WATCH(redis, *call)[1] for call in calls] == [key.encode() for key in keys]


def test_error_of_one_call_of_a_batch_is_raised(redis: Redis) -> None:
    """An answer must never be silently an exception."""
    redis.set("{scripts}:text", "not a hash", ex=60)
    calls = [(("{scripts}:text", "{scripts}:waiters"), ("channel", 60, "state", "result"))]
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        WATCH.many(redis, calls)
