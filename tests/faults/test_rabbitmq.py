"""Does RabbitMQ carry the wake-ups as well as Redis does, also when it breaks?"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from attune_worker.app import make_app
from attune_worker.cli.healthy import broker_answers
from attune_worker.client import Client
from attune_worker.errors import ServiceUnavailableError
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Profile, Simulator
from tests.conftest import API_KEY, Environ, Until
from tests.faults.conftest import RESULT_SECONDS, assert_each_ran_once, kill, submit
from tests.rabbitmq import RabbitMQ

pytestmark = pytest.mark.rabbitmq

StartWorker = Callable[..., LocalWorker]

LONG_SECONDS = 60


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """Run a private RabbitMQ; without one on this machine the tests fail, they do not skip."""
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture
def environ(make_environ: Environ, simulator: Simulator, rabbitmq: RabbitMQ) -> dict[str, str]:
    environ = make_environ(simulator, BROKER_URL=rabbitmq.url, RECOVERY__LEASE_SECONDS=1)
    return environ | {"ATTUNE_QUEUE": environ["ATTUNE_NAMESPACE"]}  # RabbitMQ knows no namespaces


def slow(seconds: float) -> Profile:
    return Profile.parse({"api_keys": [API_KEY], "latency": seconds})


def answers(simulator: Simulator) -> int:
    count: int = simulator.invoice(summary=True)["count"]
    return count


def queues(rabbitmq: RabbitMQ, *columns: str) -> dict[str, list[str]]:
    """Return what RabbitMQ says of each of its queues."""
    lines = rabbitmq.control("--no-table-headers", "list_queues", "name", *columns).splitlines()
    return {name: values for name, *values in (line.split("\t") for line in lines)}


def test_jobs_run_through_a_quorum_queue_and_nothing_else_is_left_there(
    rabbitmq: RabbitMQ,
    environ: dict[str, str],
    settings: Settings,
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """Two workers run fifty jobs; there is one queue, on disk, besides what the workers hear commands by."""
    for _ in range(2):
        start_worker(environ, concurrency=10)
    assert_each_ran_once(client, submit(client, 50), simulator, until)
    found = queues(rabbitmq, "type", "messages")
    assert found[settings.queue] == ["quorum", "0"]
    assert not [name for name in found if "delayed" in name]


def test_job_does_not_wait_behind_a_full_worker_while_another_has_threads_free(
    rabbitmq: RabbitMQ,
    environ: dict[str, str],
    settings: Settings,
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """A full worker holds back one message, not one for each of its threads."""
    full = start_worker(environ, concurrency=4)
    simulator.profile = slow(LONG_SECONDS)
    submit(client, 12)
    until(lambda: simulator.requests()["in_flight"] == 4)
    until(lambda: queues(rabbitmq, "messages_unacknowledged")[settings.queue] == ["1"])
    other = start_worker(environ, concurrency=20)
    until(lambda: simulator.requests()["in_flight"] >= 11)  # 12 if that message is taken for lost on a slow machine
    kill(full)
    kill(other)


def test_jobs_of_a_killed_worker_are_run_by_another(
    environ: dict[str, str], client: Client, simulator: Simulator, start_worker: StartWorker, until: Until
) -> None:
    """Those that it ran, and the one whose message it held."""
    victim = start_worker(environ, concurrency=5)
    simulator.profile = slow(LONG_SECONDS)
    handles = submit(client, 6)
    until(lambda: simulator.requests()["in_flight"] == 5)
    start_worker(environ, concurrency=10)
    simulator.profile = slow(0.1)
    kill(victim)
    assert {handle.result(RESULT_SECONDS).status for handle in handles} == {"succeeded"}
    crashes = [record.crashes for record in client.records.read([handle.id for handle in handles])]
    assert sorted(crashes) == [0, 1, 1, 1, 1, 1]


def test_rabbitmq_that_crashes_in_the_middle_of_a_hundred_jobs(
    rabbitmq: RabbitMQ,
    environ: dict[str, str],
    settings: Settings,
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """It is killed and started again: every job ends succeeded, with one call, and the workers are the same."""
    workers = [start_worker(environ, concurrency=10) for _ in range(2)]
    simulator.profile = slow(0.3)
    handles = submit(client, 100)
    until(lambda: answers(simulator) > 30)
    assert broker_answers(settings)
    rabbitmq.stop(signal.SIGKILL)
    assert not broker_answers(settings)
    rabbitmq.start()
    assert_each_ran_once(client, handles, simulator, until)
    assert [worker.process and worker.process.poll() for worker in workers] == [None, None]


def test_connections_that_rabbitmq_closes_lose_no_job(
    rabbitmq: RabbitMQ,
    environ: dict[str, str],
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """All at once, under load; afterwards the same client submits, too."""
    worker = start_worker(environ, concurrency=10)
    simulator.profile = slow(0.3)
    handles = submit(client, 60)
    until(lambda: answers(simulator) > 5)
    rabbitmq.control("close_all_connections", "a test")
    handles += submit(client, 10)
    assert_each_ran_once(client, handles, simulator, until)
    assert worker.process is not None
    assert worker.process.poll() is None


def test_wake_ups_that_were_purged_are_sent_again(
    rabbitmq: RabbitMQ,
    environ: dict[str, str],
    settings: Settings,
    client: Client,
    simulator: Simulator,
    start_worker: StartWorker,
    until: Until,
) -> None:
    """An operator empties the queue, and the jobs run all the same."""
    handles = submit(client, 50)
    until(lambda: queues(rabbitmq, "messages")[settings.queue] == ["50"])
    rabbitmq.control("purge_queue", settings.queue)
    start_worker(environ, concurrency=10)
    assert_each_ran_once(client, handles, simulator, until)


def test_queue_of_another_type_is_refused_until_it_is_gone(
    rabbitmq: RabbitMQ, settings: Settings, client: Client, until: Until
) -> None:
    """Callers hear it as a typed error; without that queue the same client goes on."""
    with make_app(settings).connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare(settings.queue, durable=True, auto_delete=False)
        with pytest.raises(ServiceUnavailableError, match=r"refused a command: .*PRECONDITION_FAILED"):
            client.submit("summarize", "?")
        channel.queue_delete(settings.queue)
    client.submit("summarize", "?")
    until(lambda: queues(rabbitmq, "messages")[settings.queue] == ["1"])
