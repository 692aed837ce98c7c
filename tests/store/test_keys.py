import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from attune_worker.store.keys import (
    SHARDS,
    FleetKeys,
    JobKeys,
    idempotent_job_id,
    inbox,
    job_in,
    new_job_id,
    part,
    shard_of,
    shards,
)

odd_ids = ["}", "{", "{}", "a}b{c", ":job:", "queued", "07", "\ud800"]
job_ids = st.text(min_size=1, max_size=40) | st.sampled_from(odd_ids)
namespaces = st.text("abcXYZ019_.-", min_size=1, max_size=64)


def every_key(namespace: str, job_id: str) -> list[str]:
    return list(JobKeys.of(namespace, job_id).all)


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
    assert len(set(every_key(namespace, one))) == 7
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


def test_the_shards_are_those_of_all_jobs() -> None:
    """The sweeper looks at every index that a job can stand in, and at no other."""
    found = {JobKeys.of("ns", f"job-{number}").due for number in range(1000)}
    assert {shard.due for shard in shards("ns")} == found
    assert len(shards("ns")) == SHARDS


@given(namespaces, job_ids)
def test_entry_of_an_index_names_a_job_of_its_shard(namespace: str, job_id: str) -> None:
    """What somebody else wrote there, or a job of another shard, is none."""
    raw = job_id.encode(errors="surrogatepass")
    found = {shard.queued: job_in(shard, raw) for shard in shards(namespace)}
    assert found.pop(JobKeys.of(namespace, job_id).queued) == job_id
    assert set(found.values()) == {None}
    assert {job_in(shard, b"\xff\xfe") for shard in shards(namespace)} == {None}


odd_names = st.text(max_size=30) | st.sampled_from(
    [":", "{", "}", "*", "~", "%7E", "%", " ", "a:b", "\ud800", "x" * 10_000]
)


def fleet_keys(first: str, second: str, third: str) -> list[str]:
    keys = FleetKeys("ns")
    return [
        keys.circuits,
        keys.calls,
        keys.stages,
        keys.sweeper,
        keys.circuit(first, second),
        keys.circuit(first, None),
        keys.limits(first),
        keys.limits(first, second),
        keys.limits(first, second, third),
        keys.credential(first, second),
        keys.slots(first),
        keys.budget(first, second, third, "day"),
        keys.budget(None, second, third, "month"),
        keys.call(first),
        keys.stats(first, second, "20261123"),
        keys.evidence(),
        keys.evidence(first),
        keys.evidence(first, second),
    ]


@given(odd_names, odd_names, odd_names)
def test_what_the_fleet_knows_is_in_one_slot(first: str, second: str, third: str) -> None:
    """ADMIT and SETTLE touch many of them at once, on a Redis Cluster too."""
    assert {slot(key) for key in fleet_keys(first, second, third)} == {slot("{ns}")}


@given(st.tuples(odd_names, odd_names, odd_names), st.tuples(odd_names, odd_names, odd_names))
def test_no_two_names_share_a_key(mine: tuple[str, str, str], yours: tuple[str, str, str]) -> None:
    """Whatever colons and braces names hold, and however long they are."""
    assert (part(mine[0]) == part(yours[0])) == (mine[0] == yours[0])
    keys = fleet_keys(*mine)
    assert len(set(keys)) == len(keys)
    for one, other in zip(keys[4:], fleet_keys(*yours)[4:], strict=True):
        if one == other:
            assert mine[0] == yours[0] or one in {FleetKeys("ns").evidence(), keys[12]}


@given(odd_names)
def test_part_of_a_key_is_short_and_plain(name: str) -> None:
    """A key can be read and typed, and a name of 10 kB costs no more than another."""
    assert len(part(name)) <= 120
    assert part(name).isascii()
    assert not set(part(name)) & set(":{} *")


def test_no_name_is_no_name_at_all() -> None:
    """What is about every tier is not about a tier called star."""
    assert part(None) == "*"
    assert part("*") == "%2A"
    assert part("") == ""
