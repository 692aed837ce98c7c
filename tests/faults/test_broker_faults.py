"""What Celery and Kombu do badly on Redis, provoked against our worker: no job is lost, and none runs twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from redis import Redis

from attune_worker.client import Client
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, Until, answer_now
from tests.faults.conftest import assert_each_ran_once, kill, process_id, submit

StartWorker = Callable[..., LocalWorker]


@pytest.fixture
def environ(make_environ: Environ, simulator: Simulator, own_server: EmbeddedRedis) -> dict[str, str]:
    return make_environ(simulator, REDIS_URL=own_server.url)


def messages(redis: Redis, settings: Settings) -> int:
    """Return how many messages stand in the queue, of whatever priority."""
    lists = [key for key in redis.scan_iter() if key.startswith(f"{settings.namespace}:celery:attune".encode())]
    return sum(int(redis.llen(key)) for key in lists)


def test_message_that_was_popped_for_a_worker_that_died_is_sent_again(
    redis: Redis,
    environ: dict[str, str],
    settings: Settings,
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """Redis gives it to a worker that stands still and is killed then: it is in no list, and yet the job runs."""
    victim = start_worker(environ)

    def stands_with_a_question_open() -> bool:
        os.kill(process_id(victim), signal.SIGSTOP)
        if asking := any("b" in one["flags"] and one["cmd"] == "brpop" for one in redis.client_list()):
            return asking
        os.kill(process_id(victim), signal.SIGCONT)
        return False

    until(stands_with_a_question_open)
    handles = submit(client, 1)
    assert messages(redis, settings) == 0
    assert handles[0].status() is JobStatus.QUEUED
    kill(victim)
    start_worker(environ)
    assert_each_ran_once(client, handles, simulator, until)


def test_cut_connections_under_load_lose_no_job_and_start_none_twice(
    redis: Redis,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """Redis closes all connections, thrice, while two workers have their hands full."""
    workers = [start_worker(environ, concurrency=10) for _ in range(2)]
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": 0.3})
    handles = submit(client, 100)
    for ran in (10, 40, 70):
        until(lambda ran=ran: simulator.invoice(summary=True)["count"] > ran)
        for kind in ("normal", "pubsub"):
            redis.client_kill_filter(_type=kind, skipme=True)
    assert_each_ran_once(client, handles, simulator, until)
    assert [worker.process and worker.process.poll() for worker in workers] == [None, None]


def test_worker_with_free_threads_survives_an_outage_of_its_broker(
    own_server: EmbeddedRedis,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """It tries again until Redis is back, ends what it ran meanwhile, and takes new jobs; the process is the same."""
    worker = start_worker(environ, concurrency=10)
    simulator.profile = Profile.parse({"api_keys": [API_KEY], "latency": PATIENCE_SECONDS})
    handles = submit(client, 3)
    until(lambda: simulator.requests()["in_flight"] == 3)
    own_server.stop()
    until(lambda: worker.log.read_text().count("Trying again in") > 1)
    simulator.profile = Profile.parse({"api_keys": [API_KEY]})
    answer_now(simulator)
    until(lambda: not simulator.requests()["in_flight"])
    own_server.start()
    handles += submit(client, 3)
    assert_each_ran_once(client, handles, simulator, until)
    assert worker.process is not None
    assert worker.process.poll() is None
    assert "Unrecoverable" not in worker.log.read_text()
