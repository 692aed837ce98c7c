import pytest
from redis import Redis

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.store.connection import connect
from attune_worker.store.server import Server, eviction_warning, look_at


@pytest.fixture
def servers(redis_server, local_cluster_or_none):
    """Connect to each server of what this test runs on."""
    found = local_cluster_or_none.of_each_node() if local_cluster_or_none else [Redis.from_url(redis_server.url)]
    yield found
    for client in found:
        client.config_set("maxmemory-policy", "noeviction")
        client.close()


def test_every_server_says_what_it_is(settings, servers):
    """Version, policy, memory and file, of one server or of all primaries of a cluster."""
    redis = connect(settings)
    found = look_at(redis, settings)
    redis.close()
    assert len({server.place for server in found}) == len(servers)
    for server in found:
        assert (server.eviction, server.append_only, server.replica) == ("noeviction", True, False)
        assert server.fsync == "everysec"
        assert server.used_memory > 0
        assert server.memory_used is None  # no limit
        assert not server.too_old
        assert not server.evicts


def test_one_server_that_may_drop_keys_is_warned_of(settings, servers):
    """The warning names the server and what to set; without one there is none."""
    assert eviction_warning(settings) is None
    servers[-1].config_set("maxmemory-policy", "allkeys-lru")
    warning = eviction_warning(settings)
    port = servers[-1].connection_pool.connection_kwargs["port"]
    assert f":{port} drops keys" in warning
    assert "set maxmemory-policy noeviction" in warning


def test_a_redis_that_is_away_is_no_reason_to_warn(environ):
    """Whoever needs it says so; a look at it raises."""
    away = Settings.load(environ={**environ, "ATTUNE_REDIS_URL": "redis://127.0.0.1:1/0"})
    assert eviction_warning(away) is None
    with pytest.raises(ServiceUnavailableError):
        look_at(connect(away), away)


@pytest.mark.parametrize(
    ("version", "too_old"),
    [
        ("6.0.16", True),
        ("5.0", True),
        ("6.2.0", False),
        ("7.2.4", False),
        ("10.0", False),
        ("odd", False),
        (None, False),
    ],
)
def test_versions_are_compared_as_numbers(version, too_old):
    """What is not known is not called old."""
    assert Server("here", version).too_old is too_old
