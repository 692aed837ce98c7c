"""Does Celery's result backend, as our workers and clients use it, know of every end, and leave nothing open?"""

import gc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.jobs import JobResult, JobStatus
from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from attune_worker.store.keys import JobKeys
from attune_worker.store.records import Claim, Finish
from attune_worker.worker.backend import SharedRedisBackend
from attune_worker.worker.summary import Summary
from tests.conftest import PATIENCE_SECONDS, Environ

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's own


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture
def app(settings: Settings) -> Iterator[Celery]:
    with make_app(settings) as app:
        yield app


def finish(client: Client, job_id: str) -> JobResult:
    """Do what a worker does at last, and then no more: Celery is not told."""
    claim = client.records.claim(job_id, "worker", "lease-1")
    assert isinstance(claim, Claim)
    result = JobResult(job_id=job_id, status=JobStatus.SUCCEEDED, content="secret", model_id="m", latency_ms=7)
    assert client.records.finish(claim.fence, result) is Finish.WRITTEN
    return result


def test_end_of_which_celery_was_not_told_is_read_by_the_record(client: Client, app: Celery) -> None:
    """As the worker would have stored it; when it does so after all, that is neither hindered nor another end."""
    handle = client.submit("summarize", "?")
    assert app.AsyncResult(handle.id).state == "PENDING"
    result = finish(client, handle.id)
    found = app.AsyncResult(handle.id)
    assert (found.state, found.get(timeout=PATIENCE_SECONDS)) == ("SUCCESS", Summary(result).to_json())
    assert "secret" not in str(found.info)
    assert abs(found.date_done - datetime.now(UTC)) < timedelta(seconds=PATIENCE_SECONDS)
    by_record = app.backend.get_task_meta(handle.id)
    app.backend.mark_as_done(handle.id, Summary(result))
    stored = app.backend._get_task_meta_for(handle.id)
    assert by_record == {**stored, "date_done": by_record["date_done"], "children": []}  # None without a task's request


def test_job_that_no_worker_has_ended_has_ended_for_celery(client: Client, app: Celery) -> None:
    """Its wake-up may have been lost, so that no worker comes to say so."""
    handle = client.submit("summarize", "?")
    handle.cancel()
    assert app.AsyncResult(handle.id).get(timeout=PATIENCE_SECONDS)["status"] == "cancelled"


def test_results_may_be_elsewhere_than_records(make_environ: Environ, simulator: Simulator) -> None:
    """The record is looked for where records are."""
    environ = make_environ(simulator)
    environ["ATTUNE_RESULT_BACKEND"] = environ["ATTUNE_REDIS_URL"].removesuffix("/0") + "/1"
    settings = Settings.load(environ=environ)
    with Client(settings) as client, make_app(settings) as app:
        handle = client.submit("summarize", "?")
        finish(client, handle.id)
        assert app.AsyncResult(handle.id).state == "SUCCESS"


def test_records_that_are_away_or_nonsense_are_no_news(
    make_environ: Environ, simulator: Simulator, settings: Settings, client: Client, app: Celery, redis: Redis
) -> None:
    """Celery says then what it knows: nothing."""
    handle = client.submit("summarize", "?")
    finish(client, handle.id)
    redis.hset(JobKeys.of(settings.namespace, handle.id).record, "result", "{")
    assert app.AsyncResult(handle.id).state == "PENDING"
    environ = make_environ(simulator, RESULT_BACKEND=settings.backend, REDIS_URL="redis://127.0.0.1:1/0")
    with make_app(Settings.load(environ=environ)) as away:
        assert away.AsyncResult(handle.id).state == "PENDING"


def test_what_celery_knows_costs_no_look_at_the_record(client: Client, app: Celery, redis: Redis) -> None:
    """That is the usual case."""

    def looked() -> int:
        return int(redis.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0))

    handle = client.submit("summarize", "?")
    app.backend.mark_as_done(handle.id, Summary(finish(client, handle.id)))
    before = looked()
    assert app.AsyncResult(handle.id).get(timeout=PATIENCE_SECONDS)["status"] == "succeeded"
    assert looked() == before


def test_backend_that_is_dropped_leaves_no_connection_open(settings: Settings) -> None:
    """Celery closes none of them: the collector would, some time, with a warning."""
    backend: Any = SharedRedisBackend(app=make_app(settings), url=settings.backend)
    backend.client.ping()
    [connection] = backend.client.connection_pool._connections
    backend.get_task_meta("unknown")
    [other] = backend._records._redis.connection_pool._connections
    assert connection.is_connected
    assert other.is_connected
    backend.itself = backend
    del backend
    gc.collect()
    assert not connection.is_connected
    assert not other.is_connected
