"""Is an answer that was paid for kept until Redis is back, and does the worker go on meanwhile?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.worker.ends import Ends
from tests.conftest import API_KEY, PATIENCE_SECONDS, Environ, Until, answer_now

SOON = 60.0
MODEL = "gpt-6-luna"

StartWorker = Callable[..., LocalWorker]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """Run a Redis that a test may stop; what it has answered is on its disk."""
    with EmbeddedRedis(tmp_path, configuration="appendfsync always\n") as server:
        yield server


@pytest.fixture
def environ(make_environ: Environ, simulator: Simulator, own_server: EmbeddedRedis) -> dict[str, str]:
    return make_environ(simulator, REDIS_URL=own_server.url, REDIS_TIMEOUT_SECONDS=1)


def behave(simulator: Simulator, **profile: Any) -> None:
    simulator.profile = Profile.parse({"api_keys": [API_KEY], **profile})


def test_answers_that_arrive_while_redis_is_away_are_not_asked_for_again(
    own_server: EmbeddedRedis,
    environ: dict[str, str],
    settings: Settings,
    simulator: Simulator,
    until: Until,
    start_worker: StartWorker,
) -> None:
    """All jobs succeed once it is back, each with the one call that was billed; Celery's summary is there as well."""
    worker = start_worker(environ, concurrency=30)
    behave(simulator, latency=PATIENCE_SECONDS)
    with Client(settings) as client:
        handles = client.submit_many([{"task_type": "summarize", "prompt": str(n), "model": MODEL} for n in range(30)])
        until(lambda: simulator.requests()["in_flight"] == 30)
        own_server.stop()
        answer_now(simulator)
        until(lambda: simulator.invoice(summary=True)["count"] == 30)
        until(lambda: "ends of jobs are kept until Redis answers" in worker.log.read_text())
        until(lambda: worker.log.read_text().count("] ignored") == 30)  # every thread is free
        own_server.start()
        results = list(client.as_completed(handles, SOON))
        assert [result.status for result in results] == [JobStatus.SUCCEEDED] * 30
        assert simulator.invoice(summary=True)["count"] == 30
        records = client.records.read([handle.id for handle in handles])
        assert {(record.attempts, record.crashes) for record in records} == {(1, 0)}
        with make_app(settings) as app:
            until(lambda: app.backend.task_result_exists(handles[0].id))  # it would be read by the record otherwise
            assert app.AsyncResult(handles[0].id).get(timeout=SOON)["status"] == "succeeded"
        behave(simulator)
        assert client.submit("summarize", "?", model=MODEL).result(SOON).succeeded


def test_worker_that_ends_writes_what_it_keeps(
    own_server: EmbeddedRedis,
    environ: dict[str, str],
    settings: Settings,
    simulator: Simulator,
    until: Until,
    start_worker: StartWorker,
) -> None:
    """Redis has a few seconds to come back, as for settlements."""
    worker = start_worker(environ, concurrency=2)
    behave(simulator, latency=PATIENCE_SECONDS)
    with Client(settings) as client:
        handles = client.submit_many([{"task_type": "summarize", "prompt": str(n), "model": MODEL} for n in range(2)])
        until(lambda: simulator.requests()["in_flight"] == 2)
        own_server.stop()
        answer_now(simulator)
        until(lambda: worker.log.read_text().count("] ignored") == 2)
        worker.terminate()
        until(lambda: "Warm shutdown" in worker.log.read_text())
        own_server.start()
        assert all(handle.result(SOON).succeeded for handle in handles)
        assert simulator.invoice(summary=True)["count"] == 2


class Switched:
    """What can be written while a server is there."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.written: list[str] = []

    def write(self, word: str) -> str:
        try:
            with Redis.from_url(self._url, socket_timeout=1) as redis:
                redis.ping()
        except RedisError as error:
            raise ServiceUnavailableError("Redis is away", url=self._url) from error
        self.written.append(word)
        return word


def test_end_that_is_kept_is_told_when_it_is_written(own_server: EmbeddedRedis, until: Until) -> None:
    """In order; the caller is not held up longer than the patience lasts."""
    ends, server = Ends(), Switched(own_server.url)
    assert ends.write(lambda: server.write("one")) == "one"
    own_server.stop()
    told: list[str] = []
    threads = [
        threading.Thread(target=ends.write, args=[lambda word=word: server.write(word), 10, told.append])
        for word in ("two", "three")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert told == []
    own_server.start()
    until(lambda: sorted(told) == ["three", "two"])
    assert sorted(server.written) == ["one", "three", "two"]


def test_telling_somebody_who_is_slow_to_hear_holds_up_no_other_end(own_server: EmbeddedRedis, until: Until) -> None:
    """Celery's result backend may still be away when the records are back."""
    ends, server, silent = Ends(patience_seconds=0.0), Switched(own_server.url), threading.Event()
    own_server.stop()
    for word in ("one", "two", "three"):
        ends.write(lambda word=word: server.write(word), then=lambda _: silent.wait(PATIENCE_SECONDS))
    own_server.start()
    until(lambda: sorted(server.written) == ["one", "three", "two"])
    silent.set()
    ends.close(SOON)


def test_memory_is_bounded(own_server: EmbeddedRedis, until: Until) -> None:
    """Who comes when too much is kept waits for Redis in its own thread."""
    ends, server = Ends(patience_seconds=0.1, max_characters=100), Switched(own_server.url)
    own_server.stop()
    assert ends.write(lambda: server.write("small"), 60) is None
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(ends.write(lambda: server.write("large"), 60)))
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    own_server.start()
    thread.join(SOON)
    assert answers == ["large"]
    until(lambda: sorted(server.written) == ["large", "small"])
    assert ends.write(lambda: server.write("next"), 60) == "next"


def test_one_end_that_cannot_be_written_does_not_hold_up_the_others(until: Until, caplog: Any) -> None:
    """It is logged, and passed over."""
    ends = Ends()
    written: list[str] = []

    def broken() -> None:
        raise ValueError("no such record")

    ends.keep(broken)
    ends.keep(lambda: written.append("fine"))
    until(lambda: written == ["fine"])
    assert caplog.text.count("the end of a job could not be written") == 1
