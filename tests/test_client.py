import asyncio
import base64
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

import attune_worker
from attune_worker.async_client import AsyncClient
from attune_worker.client import Client
from attune_worker.errors import (
    AttuneError,
    IdempotencyConflictError,
    InvalidJobError,
    JobNotFoundError,
    ResultTimeoutError,
    ServiceUnavailableError,
)
from attune_worker.jobs import Job, JobResult, JobStatus
from attune_worker.results import BATCH
from attune_worker.settings import Settings
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.keys import JobKeys
from attune_worker.store.records import WAITER_SECONDS, Claim, Finish, Records
from attune_worker.wake_ups import messages_waiting

SECRET = "the merger with Initech is off"
SOON = 60.0


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as used:
        yield used


@pytest.fixture
def finish(records: Records) -> Callable[..., None]:
    """Return a function that does to a job what a worker does."""

    def finish(job_id: str, content: str = "done", status: JobStatus = JobStatus.SUCCEEDED) -> None:
        claim = records.claim(job_id, "worker", "lease-1")
        assert isinstance(claim, Claim)
        assert records.finish(claim.fence, JobResult(job_id=job_id, status=status, content=content)) is Finish.WRITTEN

    return finish


def wake_ups(redis: Redis, settings: Settings) -> list[dict[str, Any]]:
    """Return the raw messages in the queue, whatever their priority."""
    keys = redis.scan_iter(f"{settings.namespace}:celery:{settings.queue}*", _type="list")
    return [json.loads(message) for key in keys for message in redis.lrange(key, 0, -1)]


def written(redis: Redis, settings: Settings) -> list[bytes]:
    return [key for key in redis.scan_iter(f"*{settings.namespace}*") if b"_kombu" not in key]


def in_process(code: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_submitted_job_is_queued_until_it_has_ended(client: Client, finish: Any) -> None:
    """The handle sees where the job is, and how it ended."""
    handle = client.submit("summarize", "?", metadata={"ticket": 7})
    assert handle.status() is JobStatus.QUEUED
    finish(handle.id, "the answer")
    assert handle.status() is JobStatus.SUCCEEDED
    assert handle.result(SOON).content == "the answer"
    assert client.get(handle.id).result().content == "the answer"


def test_wake_up_carries_the_id_and_nothing_else(client: Client, redis: Redis, settings: Settings) -> None:
    """Whoever can read the broker must not read prompts."""
    handle = client.submit("summarize", SECRET, system=SECRET, metadata={"a": SECRET}, priority=3)
    [message] = wake_ups(redis, settings)
    assert message["headers"]["task"] == "attune_worker.run_job"
    assert message["headers"]["id"] == handle.id
    assert message["properties"]["priority"] == 3
    assert SECRET not in json.dumps(message)
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[handle.id], {}]


def test_unknown_job_is_not_a_queued_one(client: Client) -> None:
    """Polling for a job that never existed must not look like patience."""
    assert client.status("nobody") is JobStatus.UNKNOWN
    assert client.get("nobody").status() is JobStatus.UNKNOWN
    with pytest.raises(JobNotFoundError):
        client.cancel("nobody")
    with pytest.raises(JobNotFoundError, match="nobody"):
        client.result("nobody", SOON)


def test_waiting_too_long_is_a_typed_error_and_the_job_goes_on(client: Client, finish: Any) -> None:
    """The same handle gives the result later."""
    handle = client.submit("summarize", "?")
    for timeout in (0, 0.05):
        with pytest.raises(ResultTimeoutError, match=handle.id):
            handle.result(timeout)
    finish(handle.id)
    assert handle.result(0).succeeded


def test_cancelled_job_has_a_result_that_says_so(client: Client) -> None:
    """Also for whoever waits already."""
    handle = client.submit("summarize", "?")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.result, SOON)
        assert handle.cancel() is True
        result = waiting.result()
    assert (result.status, result.content) == (JobStatus.CANCELLED, None)
    assert result.error is not None
    assert result.error.type == "cancelled"


def test_running_job_will_be_cancelled(client: Client, records: Records) -> None:
    """From then on it has no other end, whatever its worker says; asking again does no harm."""
    handle = client.submit("summarize", "?")
    claim = records.claim(handle.id, "worker", "lease-1")
    assert isinstance(claim, Claim)
    assert [handle.cancel(), handle.cancel()] == [True, True]
    assert handle.status() is JobStatus.RUNNING
    answered = JobResult(job_id=handle.id, status=JobStatus.SUCCEEDED, content="too late")
    assert records.finish(claim.fence, answered) is Finish.CANCELLED
    records.put_back(handle.id, claim.fence, 0, "its worker was shut down", ())
    assert (handle.status(), handle.result(SOON).content) == (JobStatus.CANCELLED, None)


def test_ended_job_is_not_cancelled(client: Client, finish: Any) -> None:
    """The answer says so, and the job stays as it is."""
    handle = client.submit("summarize", "?")
    finish(handle.id)
    assert handle.cancel() is False
    assert handle.result(SOON).succeeded


def test_same_key_is_the_same_job(client: Client, redis: Redis, settings: Settings) -> None:
    """A repeated submission gives the first job, and wakes it again while it waits."""
    first = client.submit("summarize", "?", idempotency_key="k")
    again = client.submit("summarize", "?", idempotency_key="k")
    other = client.submit("summarize", "?", idempotency_key="k", tenant="other")
    assert first.id == again.id != other.id
    assert len(wake_ups(redis, settings)) == 3


def test_ended_job_is_not_woken_by_its_key(client: Client, redis: Redis, settings: Settings, finish: Any) -> None:
    """The second caller reads the first one's answer."""
    first = client.submit("summarize", "?", idempotency_key="k")
    finish(first.id, "once")
    assert client.submit("summarize", "?", idempotency_key="k").result(SOON).content == "once"
    assert len(wake_ups(redis, settings)) == 1


def test_same_key_with_another_job_is_refused(client: Client, redis: Redis, settings: Settings) -> None:
    """Giving the old answer to a new question would be worse than an error; the rest of the batch is submitted."""
    client.submit("summarize", "one", idempotency_key="k")
    jobs = [{"task_type": "summarize", "prompt": text} for text in ("a", "two", "b")]
    jobs[1]["idempotency_key"] = "k"
    with pytest.raises(IdempotencyConflictError, match=r"'k' already belongs to a different job") as conflict:
        client.submit_many(jobs)
    assert (conflict.value.index, conflict.value.field) == (1, "idempotency_key")
    assert len(wake_ups(redis, settings)) == 3


def test_batch_with_one_bad_job_writes_nothing(client: Client, redis: Redis, settings: Settings) -> None:
    """The caller corrects it and submits all again, without sorting out which were taken."""
    jobs: list[Any] = [{"task_type": "summarize", "prompt": "fine"} for _ in range(600)]
    jobs[550] = {"task_type": "summarize", "prompt": SECRET, "max_token": 5}
    with pytest.raises(InvalidJobError, match=r"^job 550: ") as refused:
        client.submit_many(jobs)
    assert refused.value.index == 550
    assert SECRET not in str(refused.value)
    assert written(redis, settings) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": "?", "model": "claude-haiku-4-6"}, "did you mean 'claude-haiku-4-5'"),
        ({"prompt": "?", "provider_hint": "nobody"}, "allowed: anthropic, google, openai"),
        ({"prompt": "?", "max_tokens": 10_000_000}, "fewer than max_tokens"),
        ({"prompt": "half a \ud83d smile"}, "Unicode"),
        ({"prompt": "x" * 5_000_000, "model": "claude-haiku-4-5"}, "window of 200000 tokens"),
    ],
)
def test_job_that_cannot_be_run_is_refused_at_submission(
    client: Client, redis: Redis, settings: Settings, fields: dict[str, Any], words: str
) -> None:
    """The error reaches who can act on it, and nothing is written."""
    with pytest.raises(InvalidJobError, match=words):
        client.submit("summarize", **fields)
    with pytest.raises(InvalidJobError, match=words):
        client.check({"task_type": "summarize", **fields})
    assert written(redis, settings) == []


def test_batches_keep_their_order(client: Client, redis: Redis, settings: Settings) -> None:
    """Handles belong to the jobs they were made for, beyond one round trip too."""
    prompts = [f"prompt {number}" for number in range(1100)]
    handles = client.submit_many([Job(task_type="summarize", prompt=prompt) for prompt in prompts])
    keys = [JobKeys.of(settings.namespace, handle.id).record for handle in handles]
    assert [json.loads(redis.hget(key, "job") or "")["prompt"] for key in keys] == prompts
    assert len(wake_ups(redis, settings)) == 1100
    assert client.submit_many([]) == []


def test_messages_may_stand_for_the_prompt(client: Client, records: Records) -> None:
    """Conversations are submitted the same way."""
    handle = client.submit("summarize", messages=[{"role": "user", "content": "hi"}])
    claim = records.claim(handle.id, "worker", "lease-1")
    assert isinstance(claim, Claim)
    assert Job.from_json(claim.job).turns[0].content == "hi"


def test_results_come_as_jobs_end(client: Client, finish: Any) -> None:
    """Each once, and a cancelled one too."""
    handles = client.submit_many([{"task_type": "summarize", "prompt": str(number)} for number in range(20)])
    finish(handles[7].id)
    seen = client.as_completed(handles, SOON)
    assert next(seen).job_id == handles[7].id
    handles[3].cancel()
    assert next(seen).job_id == handles[3].id
    for handle in handles:
        if handle not in (handles[3], handles[7]):
            finish(handle.id)
    rest = [result.job_id for result in seen]
    assert sorted([*rest, handles[3].id, handles[7].id]) == sorted(handle.id for handle in handles)


def test_gathering_unknown_or_endless_jobs_is_a_typed_error(client: Client) -> None:
    """It must not wait for ever."""
    with pytest.raises(JobNotFoundError):
        list(client.as_completed([client.get("nobody")], SOON))
    with pytest.raises(ResultTimeoutError):
        list(client.as_completed([client.submit("summarize", "?")], 0.05))
    assert list(client.as_completed([], SOON)) == []


def test_end_that_nobody_was_told_of_is_found_before_the_time_is_up(
    client: Client, redis: Redis, settings: Settings, finish: Any
) -> None:
    """Redis forgets after an hour who waits for a job; others may have kept the caller busy meanwhile."""
    handles = client.submit_many([{"task_type": "summarize", "prompt": str(number)} for number in range(3)])
    with client.gather() as gathering:
        gathering.add([handle.id for handle in handles])
        assert gathering.ended_within(0) == []
        for handle in handles[:2]:
            assert redis.delete(JobKeys.of(settings.namespace, handle.id).waiters) == 1
            finish(handle.id)
        assert {record.job_id for record in gathering.ended(0.05)} == {handle.id for handle in handles[:2]}
        with pytest.raises(ResultTimeoutError):
            gathering.ended(0.05)
        assert gathering.waiting == 1


def test_who_waits_for_many_jobs_says_so_again_while_they_end(
    client: Client, redis: Redis, settings: Settings, finish: Any
) -> None:
    """In time, before Redis has forgotten; and what has ended without a word is found then."""
    handles = client.submit_many([{"task_type": "summarize", "prompt": str(number)} for number in range(3)])
    with client.gather() as gathering:
        gathering.add([handle.id for handle in handles])
        assert gathering.ended_within(0) == []
        lapsed = [JobKeys.of(settings.namespace, handle.id).waiters for handle in handles[1:]]
        assert redis.delete(*lapsed) == 2
        finish(handles[1].id)
        gathering._looked -= WAITER_SECONDS / 2
        finish(handles[0].id)
        assert {record.job_id for record in gathering.ended(SOON)} == {handle.id for handle in handles[:2]}
        assert redis.exists(lapsed[1])


def test_error_in_the_middle_of_a_look_loses_no_end(
    client: Client, redis: Redis, settings: Settings, finish: Any
) -> None:
    """What was found before it is found again."""
    handles = client.submit_many([{"task_type": "summarize", "prompt": "?"}] * (BATCH + 1))
    finish(handles[0].id)
    spoilt = JobKeys.of(settings.namespace, handles[-1].id).waiters
    redis.set(spoilt, "no set")
    with client.gather() as gathering:
        gathering.add([handle.id for handle in handles])
        with pytest.raises(ServiceUnavailableError, match="WRONGTYPE"):
            gathering.ended_within(0)
        redis.delete(spoilt)
        assert [record.job_id for record in gathering.ended(SOON)] == [handles[0].id]


def scripts_run(redis: Redis) -> int:
    return int(redis.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


def test_waiting_asks_redis_the_same_few_times_however_long_it_takes(settings: Settings, tmp_path: Path) -> None:
    """Waiting is being told, not polling: the cost of a waiting caller does not grow with its patience."""

    def asked(timeout: float) -> int:
        before = scripts_run(redis)
        with pytest.raises(ResultTimeoutError):
            handle.result(timeout)
        return scripts_run(redis) - before

    with EmbeddedRedis(tmp_path) as server:  # one that counts for nobody else
        own = Settings.model_validate(settings.model_dump() | {"redis_url": server.url})
        with Redis.from_url(server.url) as redis, Client(own) as client:
            handle = client.submit("summarize", "?")
            asked(0.1)  # loads the scripts
            assert [asked(timeout) for timeout in (0.5, 1.5)] == [2, 2]


def test_many_waiting_threads_share_one_subscription(
    client: Client, redis: Redis, settings: Settings, finish: Any, until: Any
) -> None:
    """Each gets the result of its own job, and Redis sees one listener for the whole process."""
    handles = client.submit_many([{"task_type": "summarize", "prompt": str(number)} for number in range(30)])
    with ThreadPoolExecutor(30) as pool:
        waiting = [pool.submit(handle.result, SOON) for handle in handles]
        waiters = [JobKeys.of(settings.namespace, handle.id).waiters for handle in handles]
        until(lambda: all(redis.exists(key) for key in waiters))
        assert len(redis.pubsub_channels(f"*{settings.namespace}*")) == 1
        for number, handle in enumerate(handles):
            finish(handle.id, f"answer {number}")
        assert [done.result().content for done in waiting] == [f"answer {number}" for number in range(30)]
    assert client.inbox._callbacks == {}


def test_waiting_survives_a_cut_connection(
    client: Client, redis: Redis, settings: Settings, finish: Any, until: Any
) -> None:
    """The listener subscribes again by itself, so the next end is heard."""
    handle = client.submit("summarize", "?")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.result, SOON)
        until(lambda: redis.exists(JobKeys.of(settings.namespace, handle.id).waiters))
        assert redis.client_kill_filter(_type="pubsub") >= 1
        until(lambda: redis.pubsub_channels(f"*{settings.namespace}*"))
        finish(handle.id)
        assert waiting.result().succeeded


def test_closed_client_can_be_used_again(
    client: Client, redis: Redis, settings: Settings, finish: Any, until: Any
) -> None:
    """Also to wait: it listens again."""
    handle = client.submit("summarize", "?")
    with pytest.raises(ResultTimeoutError):
        handle.result(0)
    client.close()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.result, SOON)
        until(
            lambda: (
                redis.sismember(JobKeys.of(settings.namespace, handle.id).waiters, client.inbox.ready())
                and redis.pubsub_numsub(client.inbox.ready())[0][1] == 1
            )
        )
        finish(handle.id)
        assert waiting.result().succeeded


def test_closing_leaves_no_subscription(settings: Settings, redis: Redis, until: Any) -> None:
    """A web backend that makes a client per request must not run Redis out of connections."""
    with Client(settings) as client:
        with pytest.raises(JobNotFoundError):
            client.result("nobody")
        assert redis.pubsub_channels(f"*{settings.namespace}*")
    until(lambda: not redis.pubsub_channels(f"*{settings.namespace}*"))


def test_async_client_does_the_same(settings: Settings, finish: Any) -> None:
    """Submit, wait, cancel and read, awaited; waiting takes no thread."""

    async def use() -> None:
        async with AsyncClient(settings) as client:
            handles = await client.submit_many([{"task_type": "summarize", "prompt": str(n)} for n in range(30)])
            waiting = [asyncio.create_task(handle.result(SOON)) for handle in handles]
            await asyncio.to_thread(lambda: [finish(handle.id, f"answer {n}") for n, handle in enumerate(handles)])
            results = await asyncio.gather(*waiting)
            assert [result.content for result in results] == [f"answer {n}" for n in range(30)]
            single = await client.submit("summarize", "?")
            assert await single.status() is JobStatus.QUEUED
            with pytest.raises(ResultTimeoutError):
                await single.result(0.05)
            assert await single.cancel() is True
            assert (await (await client.get(single.id)).result()).status is JobStatus.CANCELLED
            for past_seconds in (0, -1, -1000):  # what is left of a deadline that many results share
                assert (await single.result(past_seconds)).status is JobStatus.CANCELLED
            assert await client.status("nobody") is JobStatus.UNKNOWN
            with pytest.raises(JobNotFoundError):
                await client.result("nobody")
            with pytest.raises(InvalidJobError):
                await client.submit("summarize", "")

    asyncio.run(use())


def test_error_among_results_as_they_end_leaves_no_other_unheard(
    settings: Settings, finish: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The first is raised; asyncio logs nothing of the others later."""

    async def use() -> None:
        async with AsyncClient(settings) as client:
            ended = await client.submit("summarize", "?")
            await asyncio.to_thread(finish, ended.id)
            handles = [ended, *[await client.get(f"unknown-{n}") for n in range(20)]]
            async for _ in client.as_completed(handles, SOON):
                for _ in range(10):  # in line behind the others, which have all failed then
                    await ended.status()

    with pytest.raises(JobNotFoundError):
        asyncio.run(use())
    gc.collect()
    assert not [one for one in caplog.records if one.name == "asyncio"]


AWAY = {"ATTUNE_REDIS_TIMEOUT_SECONDS": "0.3"}


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_service_that_is_down_is_a_typed_error_without_the_password(raw_server: Any, how: str) -> None:
    """Within its timeout, for every method; a server that accepts and says nothing is down as well."""
    port = 1 if how == "refused" else raw_server(lambda _: None).port  # it waits for a request of HTTP
    url = f"redis://:hunter2@127.0.0.1:{port}/0"
    client = Client(Settings.load(environ={"ATTUNE_REDIS_URL": url, **AWAY}))
    calls: list[Callable[[], Any]] = [
        lambda: client.submit("summarize", "?"),
        lambda: client.status("a"),
        lambda: client.result("a", 1),
        lambda: client.cancel("a"),
    ]
    for call in calls:
        with pytest.raises(ServiceUnavailableError, match=r"redis://:\*\*\*@127\.0\.0\.1") as away:
            call()
        assert "hunter2" not in f"{away.value} {away.value!r} {away.value.url}"
        assert away.value.exit_code == 3


def test_broker_that_is_down_leaves_the_job_recorded(environ: dict[str, str]) -> None:
    """The error lists the accepted jobs, and the same key wakes them when the broker is back."""
    away = {"ATTUNE_BROKER_URL": "redis://:hunter2@127.0.0.1:1/0"}
    with Client(Settings.load(environ={**environ, **away})) as client:
        with pytest.raises(ServiceUnavailableError, match=r"broker at redis://:\*\*\*@") as error:
            client.submit("summarize", "?", idempotency_key="k")
        assert "hunter2" not in str(error.value)
        assert "Client.wake(error.job_ids)" in str(error.value)
        with pytest.raises(ServiceUnavailableError, match="cannot be reached") as again:
            client.wake(error.value.job_ids)
        assert "Client.wake" not in str(again.value)
    with Client(Settings.load(environ=environ)) as client:
        [job_id] = error.value.job_ids
        assert client.status(job_id) is JobStatus.QUEUED
        assert client.submit("summarize", "?", idempotency_key="k").id == job_id


def test_a_job_is_estimated_before_it_is_submitted(client: Client, redis: Redis, settings: Settings) -> None:
    """Whichever way it is given; nothing is written, and what could not be submitted is refused."""
    fields = {"task_type": "summarize", "prompt": "word " * 100, "max_tokens": 64}
    found = client.estimate("summarize", "word " * 100, max_tokens=64)
    assert found == client.estimate(fields) == client.estimate(Job.parse(fields))
    assert found.first is not None
    assert (found.first.input_tokens, found.first.output_tokens) == (125, 64)
    assert found.expected_usd is not None
    with pytest.raises(InvalidJobError, match="max_tokens"):
        client.estimate("summarize", "?", max_tokens=0)
    with pytest.raises(TypeError, match="beside a whole job"):
        client.estimate(fields, max_tokens=7)
    assert written(redis, settings) == []


async def estimated(settings: Settings) -> Any:
    async with AsyncClient(settings) as client:
        return await client.estimate("summarize", "word " * 100, max_tokens=64)


def test_an_estimate_is_the_same_when_it_is_awaited(client: Client, settings: Settings) -> None:
    """The async client has the signature of the blocking one."""
    assert asyncio.run(estimated(settings)) == client.estimate("summarize", "word " * 100, max_tokens=64)


def test_without_redis_there_is_no_estimate(settings: Settings) -> None:
    """A guess that looks like knowledge is worse than an error."""
    values = settings.model_dump() | {"redis_url": "redis://127.0.0.1:1/0"}
    with Client(Settings(**values)) as away, pytest.raises(ServiceUnavailableError):
        away.estimate("summarize", "?")


def test_importing_the_client_loads_no_http_client_and_no_provider(environ: dict[str, str]) -> None:
    """A web backend that only submits jobs stays light; submitting loads none either."""
    code = """
import sys
from attune_worker import Client, Settings
handle = Client().submit("summarize", "?", max_cost="0.5")
assert handle.status() == "queued"
heavy = ("httpx", "httpcore", "genai_prices", "tornado", "rich", "attune_worker.providers", "attune_worker.simulator")
print([name for name in sys.modules if name.startswith(heavy)])
"""
    assert in_process(code, environ).stdout.strip() == "[]"


def test_public_names_can_be_imported() -> None:
    """What ``__all__`` promises is there, and ``dir`` shows it."""
    for name in attune_worker.__all__:
        assert getattr(attune_worker, name).__module__.startswith("attune_worker.")
    assert set(attune_worker.__all__) <= set(dir(attune_worker))
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        attune_worker.Clint  # noqa: B018
    assert issubclass(attune_worker.InvalidJobError, AttuneError)


def test_star_import_gives_the_public_names() -> None:
    """Names are loaded lazily, and still all of them."""
    names: dict[str, Any] = {}
    exec("from attune_worker import *", names)
    assert set(attune_worker.__all__) <= set(names)


FORK = """
import os, sys, threading
from attune_worker import Client, ResultTimeoutError
client = Client()
before = client.submit("summarize", "parent")
try:
    before.result(0.05)
except ResultTimeoutError:
    pass
if os.fork() == 0:
    handle = client.submit("summarize", "child")
    os.write(1, f"{handle.id}\\n".encode())
    os.write(1, f"child: {handle.result(60).content}\\n".encode())
    os._exit(0)
handle = client.submit("summarize", "parent")
os.write(1, f"{handle.id}\\n".encode())
os.write(1, f"parent: {handle.result(60).content}\\n".encode())
os.wait()
"""


def test_client_works_on_both_sides_of_a_fork(environ: dict[str, str], finish: Any) -> None:
    """Web servers fork after loading the application: parent and child both submit, and both are told."""
    with subprocess.Popen(
        [sys.executable, "-c", FORK], env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if ":" not in line:
                finish(line.strip(), "told")
    assert process.returncode == 0
    assert sorted(line for line in lines if ":" in line) == ["child: told", "parent: told"]


def test_result_function_reads_with_the_settings_of_the_process(
    environ: dict[str, str], client: Client, finish: Any
) -> None:
    """The next task of a chain calls it with nothing but the id."""
    handle = client.submit("summarize", "?")
    finish(handle.id, "the answer")
    code = f"import attune_worker; print(attune_worker.result({handle.id!r}).content)"
    assert in_process(code, environ).stdout.strip() == "the answer"


def test_closing_a_client_wakes_its_waiters_into_a_new_channel(client: Client, finish: Any, until: Any) -> None:
    """Another thread may still wait on the client that one thread closes; it must hear of the end at once."""
    handle = client.submit("summarize", "?")
    with ThreadPoolExecutor(1) as pool:
        first = client.inbox.ready()
        waiting = pool.submit(handle.result, SOON)
        until(lambda: client.inbox._callbacks)
        client.close()
        until(lambda: client.inbox.ready() != first)
        finish(handle.id)
        assert waiting.result(SOON).succeeded


def test_deep_metadata_is_refused_before_anything_is_written(client: Client) -> None:
    """What cannot be read back must not be accepted."""
    metadata: dict[str, Any] = {}
    for _ in range(60):
        metadata = {"a": metadata}
    with pytest.raises(InvalidJobError, match="nested more than 50 levels"):
        client.submit("summarize", "?", metadata=metadata)


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's own
def test_retried_job_begins_anew_for_everybody(client: Client, records: Records) -> None:
    """It is queued and woken, and Celery has forgotten how it ended before: it would never hear of another end."""
    handle = client.submit("summarize", "?")
    claim = records.claim(handle.id, "owner", "lease")
    assert isinstance(claim, Claim)
    records.finish(claim.fence, JobResult(job_id=handle.id, status=JobStatus.FAILED))
    before = client._app.AsyncResult(handle.id)
    client._app.backend.mark_as_done(handle.id, {"status": "failed"})
    assert before.state == "SUCCESS"
    waiting = messages_waiting(client._app)
    assert client.retry([handle.id, "unknown"]) == {handle.id: JobStatus.FAILED, "unknown": None}
    assert handle.status() is JobStatus.QUEUED
    assert client._app.AsyncResult(handle.id).state == "PENDING"
    assert messages_waiting(client._app) == waiting + 1
