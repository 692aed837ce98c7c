import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
from redis import Redis

from attune_worker.errors import ServiceUnavailableError
from attune_worker.inbox import Inbox
from attune_worker.jobs import Job, JobStatus
from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import new_job_id
from attune_worker.store.records import Claim, Records
from tests.cluster import local_cluster

Until = Callable[[Callable[[], Any]], Any]
JOB = Job.parse({"task_type": "summarize", "prompt": "a prompt"})


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """Run a Redis that a test may stop; what it has answered is on its disk."""
    with EmbeddedRedis(tmp_path, configuration="appendfsync always\n") as server:
        yield server


def settings_for(url: str, celery_url: str | None = None) -> Settings:
    celery = {"ATTUNE_BROKER_URL": celery_url, "ATTUNE_RESULT_BACKEND": celery_url} if celery_url else {}
    return Settings.load(environ={"ATTUNE_REDIS_URL": url, "ATTUNE_REDIS_TIMEOUT_SECONDS": "20", **celery})


class Crowd:
    """Threads that accept and claim jobs until they are stopped, and note what was answered."""

    def __init__(self, records: Records, size: int = 6) -> None:
        self.claimed: list[str] = []
        self.away: list[ServiceUnavailableError] = []
        self.other: list[Exception] = []
        self._records = records
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(size)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._stop.wait(0.002):
            job_id = new_job_id()
            try:
                self._records.accept([(job_id, JOB, JOB.to_json())])
                if isinstance(self._records.claim(job_id, "worker", "lease-1"), Claim):
                    self.claimed.append(job_id)
            except ServiceUnavailableError as error:
                self.away.append(error)
            except Exception as error:  # noqa: BLE001  # that there is none is what the test is about
                self.other.append(error)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_restart_in_the_middle_loses_nothing(own_server: EmbeddedRedis, until: Until, how: signal.Signals) -> None:
    """Every call succeeds or says that Redis is away, and what succeeded is there afterwards."""
    records = Records(settings_for(own_server.url))
    with Crowd(records) as crowd:
        until(lambda: len(crowd.claimed) > 30)
        own_server.stop(how)
        until(lambda: len(crowd.away) > 3)
        own_server.start()
        before = len(crowd.claimed)
        until(lambda: len(crowd.claimed) > before + 30)
    assert crowd.other == []
    assert {record.status for record in records.read(crowd.claimed)} == {JobStatus.RUNNING}
    records.close()


def test_replica_and_full_server_refuse_with_a_hint(own_server: EmbeddedRedis) -> None:
    """After a failover the URL may name what has become a replica; and memory ends some day."""
    records = Records(settings_for(own_server.url))
    job_id = new_job_id()
    with Redis.from_url(own_server.url) as redis:
        redis.replicaof("127.0.0.1", "1")
        with pytest.raises(ServiceUnavailableError, match="it is a replica; redis_url should name the primary"):
            records.accept([(job_id, JOB, JOB.to_json())])
        redis.replicaof("NO", "ONE")
        redis.config_set("maxmemory", "1")
        with pytest.raises(ServiceUnavailableError, match="its memory is full; raise maxmemory"):
            records.accept([(job_id, JOB, JOB.to_json())])
        redis.config_set("maxmemory", "0")
    assert records.accept([(job_id, JOB, JOB.to_json())])[0].wake
    records.close()


def test_node_of_a_cluster_that_goes_and_comes_back(redis_server: EmbeddedRedis, tmp_path: Path, until: Until) -> None:
    """The others answer on, its keys are back when it is, and whoever listened there listens elsewhere."""
    with local_cluster(tmp_path) as cluster:
        settings = settings_for(cluster.url, redis_server.url)
        records, inbox = Records(settings), Inbox(settings)
        inbox.ready()
        assert inbox._listener is not None

        def port_of_inbox() -> int:
            pubsub = inbox._listener._pubsub
            return int(pubsub.connection.port) if pubsub.connection else 0

        gone = next(node for node in cluster.nodes if node.port == port_of_inbox())
        with Crowd(records) as crowd:
            until(lambda: len(crowd.claimed) > 30)
            gone.stop(signal.SIGKILL)
            until(lambda: crowd.away and port_of_inbox() not in {0, gone.port})
            before = len(crowd.claimed)
            until(lambda: len(crowd.claimed) > before + 10)
            gone.start()
            until(lambda: all_shards_answer(records))
        assert crowd.other == []
        assert inbox._listener.alive
        inbox.close()
        inbox._listener._thread.join()
        records.close()


def all_shards_answer(records: Records) -> bool:
    with suppress(ServiceUnavailableError):
        jobs = [(new_job_id(), JOB, JOB.to_json()) for _ in range(100)]
        return all(answer.wake for answer in records.accept(jobs))
    return False
