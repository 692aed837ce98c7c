"""What do tests of the store run on? On one server and on a cluster of three, each test on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis import Redis
from redis.cluster import RedisCluster

from attune_worker.simulator import Simulator
from attune_worker.store.embedded import EmbeddedRedis
from tests.cluster import LocalCluster, local_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Run a private cluster, from the first test that wants it on."""
    with local_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(params=["single", "cluster"])
def local_cluster_or_none(request: pytest.FixtureRequest) -> LocalCluster | None:
    """Return the cluster that this test runs on, or None: it runs on one server."""
    found: LocalCluster | None = request.getfixturevalue("cluster") if request.param == "cluster" else None
    return found


@pytest.fixture
def environ(
    make_environ: Callable[..., dict[str, str]],
    simulator: Simulator,
    redis_server: EmbeddedRedis,
    local_cluster_or_none: LocalCluster | None,
) -> dict[str, str]:
    """Return the environment of this test's fleet, and so decide what ``settings`` and ``records`` are."""
    if local_cluster_or_none is None:
        return make_environ(simulator)
    celery = {"BROKER_URL": redis_server.url, "RESULT_BACKEND": redis_server.url}
    return make_environ(simulator, REDIS_URL=local_cluster_or_none.url, **celery)


@pytest.fixture
def redis(redis_server: EmbeddedRedis, local_cluster_or_none: LocalCluster | None) -> Iterator[Redis | RedisCluster]:
    """Connect to what this test runs on, to look at what was written there."""
    client = local_cluster_or_none.client() if local_cluster_or_none else Redis.from_url(redis_server.url)
    with client:
        yield client
