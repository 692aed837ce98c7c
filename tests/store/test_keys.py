import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from attune_worker.store.keys import SHARDS, JobKeys, idempotent_job_id, inbox, new_job_id, shard_of

odd_ids = ["}", "{", "{}", "a}b{c", ":job:", "queued", "07", "\ud800"]
job_ids = st.text(min_size=1, max_size=40) | st.sampled_from(odd_ids)
namespaces = st.text("abcXYZ019_.-", min_size=1, max_size=64)


def every_key(namespace: str, job_id: str) -> list[str]:
    keys = JobKeys.of(namespace, job_id)
    return [keys.record, keys.queued, keys.running, keys.waiters]


def slot(key: str) -> int:
    return int(key_slot(key.encode(errors="surrogatepass")))


@given(namespaces, job_ids)
def test_keys_of_a_job_are_in_one_slot(namespace: str, job_id: str) -> None:
    """A Redis Cluster runs a script only if all its keys are in one slot, whatever braces an id holds."""
    keys = every_key(namespace, job_id)
    assert len({slot(key) for key in keys}) == 1
    assert slot(keys[0]) == slot(f"{{{namespace}:{shard_of(job_id):02d}}}")


@given(namespaces, job_ids, job_ids)
def test_keys_of_different_kinds_never_collide(namespace: str, one: str, other: str) -> None:
    """No id, however odd, may name another job's record, its waiters, or an index."""
    assert len(set(every_key(namespace, one))) == 4
    if one != other:
        first, second = JobKeys.of(namespace, one), JobKeys.of(namespace, other)
        own, others = {first.record, first.waiters}, set(every_key(namespace, other))
        assert not own & others
        assert not {second.record, second.waiters} & set(every_key(namespace, one))


@given(namespaces, namespaces, job_ids)
def test_namespaces_share_no_key(one: str, other: str, job_id: str) -> None:
    """Two fleets on one Redis must not see each other's jobs."""
    if one != other:
        assert not set(every_key(one, job_id)) & set(every_key(other, job_id))
        assert inbox(one, "client") != inbox(other, "client")


def test_jobs_are_spread_over_all_shards() -> None:
    """One shard for all would put the load of a cluster on one node."""
    counts = [0] * SHARDS
    for number in range(1600):
        counts[shard_of(f"job-{number}")] += 1
    assert min(counts) > 50


@pytest.mark.parametrize(("job_id", "shard"), [("a", 3), ("job-1", 15), ("00000000-0000-0000-0000-000000000000", 9)])
def test_shard_of_an_id_never_changes(job_id: str, shard: int) -> None:
    """Another release must find the records that this one wrote."""
    assert shard_of(job_id) == shard


@given(st.none() | st.text(), st.text(), st.none() | st.text(), st.text())
def test_idempotency_key_stands_for_one_job_of_one_tenant(
    tenant: str | None, key: str, other_tenant: str | None, other_key: str
) -> None:
    """Same tenant and key, same id; and no way to write one pair so that it looks like another."""
    same = (tenant, key) == (other_tenant, other_key)
    assert (idempotent_job_id("ns", tenant, key) == idempotent_job_id("ns", other_tenant, other_key)) is same
    assert idempotent_job_id("ns", tenant, key) != idempotent_job_id("other", tenant, key)


def test_random_ids_differ() -> None:
    """Jobs without a key are different jobs."""
    assert len({new_job_id() for _ in range(1000)}) == 1000
