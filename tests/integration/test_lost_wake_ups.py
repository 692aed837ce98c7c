"""Is a wake-up that was lost sent again, and only such a one?"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.errors import ServiceUnavailableError
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from attune_worker.store.keys import shards
from attune_worker.wake_ups import messages_waiting, send_wake_ups
from attune_worker.worker.lost_wake_ups import MOST_AT_ONCE, MOST_FORGOTTEN, WATCH_SECONDS, Deficit, LostWakeUps
from tests.conftest import PATIENCE_SECONDS

Until = Callable[[Callable[[], Any]], Any]
SOON = 60.0
FIELDS = {"task_type": "summarize", "prompt": "?"}


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as found:
        yield found


@pytest.fixture
def app(settings: Settings) -> Iterator[Celery]:
    with make_app(settings) as found:
        yield found


class Watch:
    """Looks for lost wake-ups, once a second by a clock of the test's own."""

    def __init__(self, app: Celery) -> None:
        self.now_seconds = 0.0
        self._lost_wake_ups = LostWakeUps(app, clock=lambda: self.now_seconds)

    def look(self, seconds: float) -> None:
        """Look for so long."""
        for _ in range(round(seconds)):
            self.now_seconds += self._lost_wake_ups.look()

    def close(self) -> None:
        self._lost_wake_ups.close()


@pytest.fixture
def watch(app: Celery) -> Iterator[Watch]:
    with closing(Watch(app)) as found:
        yield found


def submit(client: Client, redis: Redis, count: int, *, seconds_ago: float = WATCH_SECONDS + 1) -> None:
    """Submit jobs whose wake-ups were sent a while ago: Redis' clock cannot be turned, their scores can."""
    client.submit_many([FIELDS] * count)
    for shard in shards(client.settings.namespace):
        if jobs := redis.zrange(shard.queued, 0, -1, withscores=True):
            redis.zadd(shard.queued, {job_id: sent_ms - seconds_ago * 1000 for job_id, sent_ms in jobs})


def purge(app: Celery) -> int:
    with app.connection_for_write() as connection:
        count: int = connection.default_channel.queue_purge(app.conf.task_default_queue)
        return count


def test_deficit_is_the_least_that_was_missing_for_a_while() -> None:
    """Messages on their way come and go; what is missing all the time is lost."""
    deficit = Deficit()
    assert [deficit.lost(second, missing) for second, missing in enumerate([9, 4, 7, 3, 9, 9, 8])] == [
        *[0] * 5,
        3,
        3,
    ]
    assert deficit.lost(8, 8) == 3
    assert deficit.lost(9, 8) == 8


@pytest.mark.parametrize("missing", [0, -5])
def test_more_messages_than_jobs_are_no_deficit(missing: int) -> None:
    """Doubled wake-ups, and the messages of jobs that wait, do no harm."""
    deficit = Deficit()
    assert {deficit.lost(second, missing) for second in range(20)} == {0}


def test_deficit_begins_anew_after_a_gap_and_when_told() -> None:
    """Whoever begins to lead knows nothing of what was, and an empty line has lost nothing."""
    deficit = Deficit()
    assert [deficit.lost(second, 5) for second in (0, 3, 5)] == [0, 0, 5]
    assert [deficit.lost(second, 5) for second in (11, 14, 16)] == [0, 0, 5]
    deficit.begin_anew()
    assert [deficit.lost(second, 5) for second in (17, 20, 22)] == [0, 0, 5]


def test_messages_are_counted_whatever_their_priority(client: Client, app: Celery) -> None:
    """The queue is ten lists in Redis, and none of them while it is empty."""
    assert messages_waiting(app) == 0
    client.submit_many([{**FIELDS, "priority": number % 10} for number in range(25)])
    assert messages_waiting(app) == 25
    assert purge(app) == 25
    assert messages_waiting(app) == 0


def test_broker_that_is_away_is_a_typed_error(make_environ: Any, simulator: Simulator) -> None:
    """Without its password."""
    environ = make_environ(simulator, BROKER_URL="redis://:hunter2@127.0.0.1:1/0")
    with make_app(Settings.load(environ=environ)) as app:
        for call in (lambda: messages_waiting(app), lambda: send_wake_ups(app, [("a job", 5)])):
            with pytest.raises(ServiceUnavailableError) as caught:
                call()
            assert "hunter2" not in str(caught.value)


def test_long_line_that_nobody_serves_gets_no_second_wake_ups(
    client: Client, app: Celery, watch: Watch, redis: Redis
) -> None:
    """Thousands of jobs wait for longer than any message takes; each has its message."""
    submit(client, redis, 5_000)
    watch.look(3 * WATCH_SECONDS)
    assert messages_waiting(app) == 5_000


def test_as_many_are_sent_again_as_were_lost(
    client: Client, app: Celery, watch: Watch, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Once; the log says how many."""
    submit(client, redis, 30)
    purge(app)
    submit(client, redis, 20)
    watch.look(WATCH_SECONDS)
    assert messages_waiting(app) == 20
    watch.look(3 * WATCH_SECONDS)
    assert messages_waiting(app) == 50
    assert [record.message for record in caplog.records] == ["30 wake-ups of jobs were lost and are sent again"]


def test_fresh_jobs_are_not_sent_again(client: Client, app: Celery, watch: Watch, redis: Redis) -> None:
    """Their messages may be on their way: a submitter writes five hundred records before it sends."""
    submit(client, redis, 10, seconds_ago=-PATIENCE_SECONDS)  # fresh for however long the test takes
    purge(app)
    watch.look(WATCH_SECONDS + 1)
    assert messages_waiting(app) == 0


def test_great_loss_is_made_good_bit_by_bit(client: Client, app: Celery, watch: Watch, redis: Redis) -> None:
    """A purged queue of any length costs no long pause of the sweeper."""
    count = MOST_AT_ONCE + 200
    submit(client, redis, count)
    purge(app)
    sizes = {0}
    while max(sizes) < count:
        watch.look(1)
        sizes.add(messages_waiting(app))
    assert sizes == {0, MOST_AT_ONCE, count}


def test_jobs_that_have_waited_for_hours_hide_no_loss(client: Client, app: Celery, watch: Watch, redis: Redis) -> None:
    """A long line is when a purged queue hurts most."""
    submit(client, redis, 500, seconds_ago=4_000)
    purge(app)
    watch.look(WATCH_SECONDS + 1)
    assert messages_waiting(app) == 500


def test_job_that_messages_of_others_hide_is_woken_within_the_hour(
    client: Client, app: Celery, watch: Watch, redis: Redis
) -> None:
    """And in a line of hours, where all are of that age, a few a second get another message."""
    submit(client, redis, 2, seconds_ago=3_000)
    purge(app)
    for _ in range(50):
        app.send_task("attune_worker.submit_job", ({},))
    watch.look(3 * WATCH_SECONDS)
    assert messages_waiting(app) == 50
    submit(client, redis, 0, seconds_ago=1_000)
    watch.look(1)
    assert messages_waiting(app) == 52
    submit(client, redis, 3 * MOST_FORGOTTEN, seconds_ago=4_000)
    watch.look(2)
    assert messages_waiting(app) == 52 + 5 * MOST_FORGOTTEN


def test_jobs_run_whose_messages_are_gone(
    environ: dict[str, str],
    client: Client,
    app: Celery,
    redis: Redis,
    simulator: Simulator,
    start_worker: Callable[..., LocalWorker],
) -> None:
    """The keys of the whole queue are deleted; within seconds every job runs, once."""
    handles = client.submit_many([FIELDS] * 50)
    assert messages_waiting(app) == 50
    redis.delete(*redis.scan_iter(f"{client.settings.namespace}:celery:*"))
    assert messages_waiting(app) == 0
    start_worker(environ)
    assert all(handle.result(SOON).succeeded for handle in handles)
    assert simulator.invoice()["count"] == 50
