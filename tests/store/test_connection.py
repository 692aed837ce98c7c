import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from socket import socket
from typing import Any

import pytest
from redis import Redis, exceptions
from redis.cluster import RedisCluster

from attune_worker.errors import ConfigurationError, ServiceUnavailableError
from attune_worker.inbox import Inbox
from attune_worker.jobs import Job, JobResult, JobStatus
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, connect, node_urls, reaching
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import SHARDS, new_job_id, shard_of
from attune_worker.store.records import Claim, Records
from tests.cluster import LocalCluster

CELERY = {"ATTUNE_BROKER_URL": "redis://127.0.0.1:1", "ATTUNE_RESULT_BACKEND": "redis://127.0.0.1:1"}


def settings_for(url: str, **more: str) -> Settings:
    return Settings.load(environ={"ATTUNE_REDIS_URL": url, "ATTUNE_REDIS_TIMEOUT_SECONDS": "20", **CELERY, **more})


def some_jobs(count: int) -> list[tuple[str, Job, str]]:
    job = Job.parse({"task_type": "summarize", "prompt": "a prompt"})
    return [(new_job_id(), job, job.to_json()) for _ in range(count)]


def one_job_of_each_shard() -> list[tuple[str, Job, str]]:
    found: dict[int, tuple[str, Job, str]] = {}
    while len(found) < SHARDS:
        [job] = some_jobs(1)
        found[shard_of(job[0])] = job
    return list(found.values())


@pytest.fixture
def inbox(settings: Settings) -> Iterator[Inbox]:
    """Return an inbox, and see its thread off."""
    found = Inbox(settings)
    yield found
    found.close()
    if found._listener:
        found._listener._thread.join()


def finish(records: Records, job_id: str) -> None:
    claim = records.claim(job_id, "worker", "lease-1")
    assert isinstance(claim, Claim)
    records.finish(claim.fence, JobResult(job_id=job_id, status=JobStatus.SUCCEEDED))


def sockets_of(client: RedisClient) -> list[socket]:
    """Let a client connect, to each node of a cluster, and return its sockets."""
    nodes: Any = [client] if isinstance(client, Redis) else [node.redis_connection for node in client.get_nodes()]
    for node in nodes:
        node.ping()
    found = [connection._sock for node in nodes for connection in node.connection_pool._connections]
    assert len(found) >= len(nodes)
    return found


def test_client_that_is_dropped_leaves_no_connection_open(settings: Settings) -> None:
    """Also one in a cycle, where finalizers come in any order."""
    client: Any = connect(settings)
    sockets = sockets_of(client)
    kept = getattr(client, "connection_pool", None)  # of one server: then its connections close none themselves
    client.itself = client
    del client
    gc.collect()
    assert [one.fileno() for one in sockets] == [-1] * len(sockets)
    del kept


def test_client_that_is_closed_leaves_no_connection_open(settings: Settings) -> None:
    """redis-py's own client of a cluster does, when it was made from a URL."""
    with connect(settings) as client:
        sockets = sockets_of(client)
    assert [one.fileno() for one in sockets] == [-1] * len(sockets)


def test_closing_cuts_nobody_off(records: Records) -> None:
    """One thread gives connections back while others use them: each of their commands is answered."""
    stop = threading.Event()

    def use() -> int:
        used = 0
        while not stop.is_set():
            assert records.read(["no such job"])[0].status is JobStatus.UNKNOWN
            used += 1
        return used

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(4)]
        for _ in range(300):
            records.close()
            threading.Event().wait(0.001)
        stop.set()
        assert all(user.result() > 0 for user in users)


@pytest.mark.parametrize(
    ("url", "nodes"),
    [
        ("redis+cluster://a:1", ["redis://a:1"]),
        ("redis+cluster://a:1,b:2", ["redis://a:1", "redis://b:2"]),
        ("rediss+cluster://:p%40@a:1, b/0?x=1,2", ["rediss://:p%40@a:1/0?x=1,2", "rediss://:p%40@b/0?x=1,2"]),
        ("redis+cluster://u:p@[::1]:1,[::2]:2?x=/", ["redis://u:p@[::1]:1?x=/", "redis://u:p@[::2]:2?x=/"]),
    ],
)
def test_url_of_a_cluster_names_its_nodes(url: str, nodes: list[str]) -> None:
    """User, password and options are the same for all of them."""
    assert node_urls(url) == nodes


def test_one_node_is_enough_to_find_the_others(cluster: LocalCluster) -> None:
    """Nodes come and go; the URL need not name all, and those that it names need not all be there."""
    only = f"redis+cluster://:{cluster.password}@127.0.0.1:1,127.0.0.1:{cluster.nodes[1].port}"
    with connect(settings_for(only)) as redis:
        assert isinstance(redis, RedisCluster)
        assert {node.port for node in redis.get_nodes()} == {node.port for node in cluster.nodes}


@pytest.mark.parametrize("missing", [("BROKER_URL",), ("RESULT_BACKEND",), ("BROKER_URL", "RESULT_BACKEND")])
def test_cluster_needs_a_broker_beside_it(missing: tuple[str, ...]) -> None:
    """Celery cannot use a cluster; that is said at the start, with what to set."""
    environ = {"ATTUNE_REDIS_URL": "redis+cluster://:hunter2@h:1", **CELERY}
    for name in missing:
        del environ[f"ATTUNE_{name}"]
    with pytest.raises(ConfigurationError) as refused:
        Settings.load(environ=environ)
    said = str(refused.value)
    assert f"set {' and '.join(missing).lower()}, because redis_url is a Redis Cluster" in said.replace("AND", "and")
    assert "\n" not in said
    assert "hunter2" not in said


@pytest.mark.parametrize("name", ["BROKER_URL", "RESULT_BACKEND"])
def test_cluster_is_refused_as_broker_and_backend(name: str) -> None:
    """Better than a stack trace of Celery's."""
    with pytest.raises(ConfigurationError, match=rf"ATTUNE_{name}: the URL should start with redis://"):
        Settings.load(environ={f"ATTUNE_{name}": "redis+cluster://h:1"})


@pytest.mark.parametrize("url", ["redis+cluster://:hunter2@h:1/3", "redis+cluster://:hunter2@h:port"])
def test_url_that_no_cluster_can_have_is_a_configuration_error(url: str) -> None:
    """A cluster has one database, and ports are numbers; the password is not quoted."""
    with pytest.raises(ConfigurationError, match=r"^redis_url: ") as refused:
        connect(settings_for(url))
    assert "hunter2" not in str(refused.value)


def test_cluster_that_is_away_is_a_typed_error_without_the_password() -> None:
    """The message names all the nodes that were tried."""
    with pytest.raises(ServiceUnavailableError) as away:
        connect(settings_for("redis+cluster://:hunter2@127.0.0.1:1,127.0.0.1:2"))
    assert "redis+cluster://:***@127.0.0.1:1,127.0.0.1:2 cannot be reached (ConnectionError)" in str(away.value)
    assert away.value.url == "redis+cluster://:***@127.0.0.1:1,127.0.0.1:2"


def test_wrong_password_of_a_cluster_is_named_as_such(cluster: LocalCluster) -> None:
    """Restarting its nodes would not help."""
    with pytest.raises(ServiceUnavailableError, match="refused the user or password") as refused:
        connect(settings_for(f"redis+cluster://:hunter2@127.0.0.1:{cluster.nodes[0].port}"))
    assert "hunter2" not in str(refused.value)


def test_wrong_scheme_is_explained(cluster: LocalCluster, redis_server: EmbeddedRedis) -> None:
    """A cluster that is taken for one server, and one server that is taken for a cluster."""
    records = Records(settings_for(cluster.nodes[0].url))
    with pytest.raises(ServiceUnavailableError, match=r"should begin with redis\+cluster://"):
        records.accept(one_job_of_each_shard())
    records.close()
    with pytest.raises(ServiceUnavailableError, match="cluster support disabled"):
        connect(settings_for(redis_server.url.replace("redis://", "redis+cluster://")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (exceptions.AuthenticationError("WRONGPASS"), "refused the user or password"),
        (exceptions.BusyLoadingError("LOADING"), "still loading its data; try again"),
        (exceptions.ConnectionError("lost"), r"cannot be reached \(ConnectionError\)"),
        (exceptions.TimeoutError("late"), r"cannot be reached \(TimeoutError\)"),
        (ConnectionResetError(), r"cannot be reached \(ConnectionResetError\)"),
        (exceptions.ClusterDownError("The cluster is down"), r"no node now \(ClusterDownError\)"),
        (exceptions.SlotNotCoveredError("7"), r"no node now \(SlotNotCoveredError\)"),
        (exceptions.ClusterError("TTL exhausted."), r"no node now \(ClusterError\)"),
        (exceptions.OutOfMemoryError("used memory > 'maxmemory'"), "OOM: its memory is full; raise maxmemory"),
        (exceptions.ResponseError("in script: -OOM command not allowed"), "OOM: its memory is full"),
        (exceptions.ReadOnlyError("You can't write"), "it is a replica; redis_url should name the primary"),
        (exceptions.ResponseError("MISCONF Errors writing to the AOF file"), "it cannot write to its disk"),
        (exceptions.NoPermissionError("no permissions for 'evalsha'"), "refused a command: no permissions"),
    ],
)
def test_every_error_of_redis_becomes_ours_with_a_hint(error: Exception, said: str) -> None:
    """Callers know one class; the operator reads what to do."""
    with pytest.raises(ServiceUnavailableError, match=said) as away, reaching(settings_for("redis://:hunter2@h:1")):
        raise error
    assert "redis://:***@h:1" in str(away.value)
    assert away.value.retryable


def test_crowd_of_threads_shares_few_connections(settings: Settings) -> None:
    """Batches go to all nodes; two connections to each must do for forty threads, without waiting for each other."""
    records = Records(settings, connect(settings, max_connections=2))
    wrong: list[object] = []

    def work() -> None:
        for _ in range(3):
            jobs = some_jobs(8)
            answers = records.accept(jobs)
            read = records.watch([job_id for job_id, _, _ in jobs], "channel")
            if not all(answer.wake for answer in answers) or {each.status for each in read} != {JobStatus.QUEUED}:
                wrong.append((answers, read))

    threads = [threading.Thread(target=work) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records.close()
    assert wrong == []


def test_batch_after_the_connections_were_cut(records: Records, redis: Redis) -> None:
    """Firewalls and failovers cut idle connections; the next batch must not notice."""
    jobs = one_job_of_each_shard()
    records.accept(jobs)
    redis.client_kill_filter(_type="normal", skipme=True)
    assert {each.status for each in records.watch([job_id for job_id, _, _ in jobs], "channel")} == {JobStatus.QUEUED}


def test_inbox_hears_of_jobs_wherever_they_live(inbox: Inbox, records: Records) -> None:
    """A job's end is published by the node that has its record; the client listens at one node."""
    jobs = one_job_of_each_shard()
    told = {job_id: threading.Event() for job_id, _, _ in jobs}
    for job_id, event in told.items():
        inbox.add(job_id, event.set)
    channel = inbox.ready()
    records.accept(jobs)
    records.watch(list(told), channel)
    for job_id in told:
        finish(records, job_id)
    assert all(event.wait(60) for event in told.values())


def test_inbox_listens_again_after_a_cut(
    inbox: Inbox, records: Records, redis: Redis, until: Callable[[Callable[[], Any]], Any]
) -> None:
    """Whoever waits is told to look again, for news may have been lost, and hears later ones on the same channel."""
    [job] = some_jobs(1)
    looked: list[float] = []
    inbox.add(job[0], lambda: looked.append(1))
    channel = inbox.ready()
    redis.client_kill_filter(_type="pubsub")
    until(lambda: looked)
    assert inbox.ready() == channel
    records.accept([job])
    records.watch([job[0]], channel)
    before = len(looked)
    finish(records, job[0])
    until(lambda: len(looked) > before)
