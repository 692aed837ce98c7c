"""What do tests of the store run on? On one server and on a cluster of three, each test on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis import Redis
from redis.cluster import RedisCluster

from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import JobKeys
from tests.cluster import LocalCluster, local_cluster
from tests.conftest import PATIENCE_SECONDS


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


@pytest.fixture
def keys(settings: Settings) -> Callable[[str], JobKeys]:
    """Return a function that names the keys of a job."""
    return lambda job_id: JobKeys.of(settings.namespace, job_id)


@pytest.fixture
def heard(settings: Settings, redis: Redis) -> Iterator[Callable[[], list[bytes]]]:
    """Listen on a channel, the namespace, and return a function that reads what was said there so far."""
    with redis.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(settings.namespace)
        assert listener.get_message(timeout=PATIENCE_SECONDS) is None

        def read() -> list[bytes]:
            redis.publish(settings.namespace, "end of what was said")
            messages: list[bytes] = []
            while b"end of what was said" not in messages:
                if message := listener.get_message(timeout=PATIENCE_SECONDS):
                    messages.append(message["data"])
            return messages[:-1]

        yield read
