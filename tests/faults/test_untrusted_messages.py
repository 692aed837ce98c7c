"""What does a worker do with messages that no client of ours has sent?"""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import os
import pickle
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery
from kombu import compression
from redis import Redis

from attune_worker.app import make_app
from attune_worker.client import Client
from attune_worker.errors import ResultTimeoutError
from attune_worker.jobs import JobStatus
from attune_worker.local import LocalWorker
from attune_worker.settings import Settings
from attune_worker.simulator import Simulator
from attune_worker.worker.intake import MAX_BODY_BYTES, UnwelcomeMessageError
from tests.conftest import Environ, Until

SECRET = "zebra-crossing-4711"
ESCAPE = "\x1b[31m"
SOON = 60.0
MEGABYTE = 2**20
SUBMIT = "attune_worker.submit_job"

SAID = re.compile("was dropped:|invalid task message|Can't decode|unregistered task|unknown message")
"""Which words say that a message was dropped: ours, and Celery's."""


class Target:
    """One worker, the queue that it reads, and what it has said since the last look."""

    def __init__(self, settings: Settings, worker: LocalWorker, redis: Redis) -> None:
        self.settings = settings
        self.client = Client(settings)
        self.worker = worker
        self._redis = redis
        self._heard = 0

    @property
    def process(self) -> psutil.Process:
        assert self.worker.process is not None
        return psutil.Process(self.worker.process.pid)

    def push(self, entry: bytes) -> None:
        """Put an entry into the worker's queue, before all jobs: its list is the one of priority 0."""
        self._redis.lpush(f"{self.settings.namespace}:celery:{self.settings.queue}", entry)

    def said(self) -> str:
        """Return the log since the last look."""
        with self.worker.log.open("rb") as log:
            log.seek(self._heard)
            text = log.read()
            self._heard += len(text)
        return text.decode(errors="replace")

    def serves(self) -> bool:
        """Whether the next job is done, by the process that was there before."""
        job = self.client.submit("summarize", "?")
        for _ in range(int(SOON)):
            with suppress(ResultTimeoutError):
                return job.result(1.0).status is JobStatus.SUCCEEDED
            self.worker.check()
        return False


@pytest.fixture(scope="module")
def shared_target(
    make_environ: Environ, start_worker: Callable[..., LocalWorker], redis_server: Any
) -> Iterator[Target]:
    with Simulator() as simulator, Redis.from_url(redis_server.url) as redis:
        environ = make_environ(simulator)
        target = Target(Settings.load(environ=environ), start_worker(environ, loglevel="debug", concurrency=4), redis)
        yield target
        target.worker.stop()
        target.client.close()


@pytest.fixture
def target(shared_target: Target) -> Target:
    shared_target.worker.check()
    shared_target.said()
    return shared_target


@pytest.fixture
def app(target: Target) -> Iterator[Celery]:
    """Return a Celery client, to see what is told to those who wait."""
    app = make_app(target.settings)
    yield app
    app.close()


def headers(**changes: Any) -> dict[str, Any]:
    """Return the headers of a wake-up of Celery's protocol 2; its sender shows the arguments to everyone."""
    shown = {"argsrepr": SECRET, "kwargsrepr": SECRET}
    return {"lang": "py", "task": "attune_worker.run_job", "id": "a-task-id", **shown, **changes}


def body(*args: Any, **kwargs: Any) -> bytes:
    return json.dumps([args, kwargs, {}]).encode()


def entry(content: bytes, *, head: Any, properties: Any = None, **changes: Any) -> bytes:
    """Return what Kombu keeps in Redis for a message."""
    told = {
        "delivery_tag": os.urandom(8).hex(),
        "delivery_info": {"exchange": "", "routing_key": "attune"},
        "body_encoding": "base64",
        "priority": 0,
    }
    envelope = {
        "body": base64.b64encode(content).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": head,
        "properties": {**told, **(properties or {})},
    }
    return json.dumps({**envelope, **changes}).encode()


def first_protocol(**fields: Any) -> bytes:
    """Return a message as clients in other languages send it: everything is in its body."""
    return entry(json.dumps({"args": [SECRET], "kwargs": {}, **fields}).encode(), head={})


class Mine:
    """Does something of its sender's when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


NOT_EVEN_MESSAGES = {
    "no JSON": b"hello " + SECRET.encode(),
    "no text": b"\xff\xfe" + SECRET.encode(),
    "nothing": b"",
    "a number": b"17",
    "a list": b"[1, 2]",
    "an object": json.dumps({"prompt": SECRET}).encode(),
    "endless nesting": b"[" * 100_000,
    "headers that are text": entry(body("x"), head=SECRET),
    "headers that are a list": entry(body("x"), head=[SECRET]),
    "an unknown body encoding": entry(body("x"), head=headers(), properties={"body_encoding": "rot13"}),
    "a body that is no base64": entry(body("x"), head=headers(), body=f"%{SECRET}"),
}

NOT_TASKS = {
    "no headers": entry(body(SECRET), head={}),
    "no id": entry(body(SECRET), head={"task": "attune_worker.run_job"}),
    "no id, and a task of others": entry(body(SECRET), head={"task": "their.task"}),
    "null as its id": entry(body(SECRET), head=headers(id=None)),
    "an object as its id": entry(body(SECRET), head=headers(id={"a": SECRET})),
    "an id that forges a line": entry(body(SECRET), head=headers(id=f"x\r\n[2026] {ESCAPE} all is well")),
    "an id without end": entry(body(SECRET), head=headers(id="x" * MEGABYTE)),
    "a list as its task": entry(body(SECRET), head=headers(task=[SECRET])),
    "a name that is no name": entry(body("x"), head=headers(shadow=ESCAPE)),
    "another content type": entry(body(SECRET), head=headers(), **{"content-type": "application/x-secret"}),
    "text as its content type": entry(body(SECRET), head=headers(), **{"content-type": "text/plain"}),
    "no body": entry(b"", head=headers()),
    "a body that is no JSON": entry(b"{" + SECRET.encode(), head=headers()),
    "a body that is no UTF-8": entry(b'[["\xff' + SECRET.encode() + b'"], {}, {}]', head=headers()),
    "a body nested without end": entry(b"[" * 200_000, head=headers()),
    "a body with numbers of 5,000 digits": entry(b"[[" + b"9" * 5000 + b"], {}, {}]", head=headers()),
    "a body of another shape": entry(json.dumps({"job": SECRET}).encode(), head=headers()),
    "arguments that are none": entry(json.dumps([SECRET, SECRET, SECRET]).encode(), head=headers()),
    "a tagged value that is none": entry(body({"__type__": "datetime", "__value__": SECRET}), head=headers()),
    "a bad time": entry(body("x"), head=headers(eta=SECRET)),
    "another task of the first protocol": first_protocol(task="their.task", id="1"),
    "no id in the first protocol": first_protocol(task="attune_worker.run_job"),
    "bad arguments in the first protocol": first_protocol(task="attune_worker.run_job", id="1", kwargs=[SECRET]),
    "a wake-up for nobody": entry(body(), head=headers()),
    "a wake-up for many": entry(body(SECRET, SECRET), head=headers()),
    "a wake-up for an object": entry(body({"job": SECRET}), head=headers()),
    "a wake-up for half a character": entry(b'[["\\ud800"], {}, {}]', head=headers()),
    "a wake-up for 5 MB": entry(body("j" * 5 * MEGABYTE), head=headers()),
    "an unknown packing": entry(body("x"), head=headers(compression="application/x-nothing")),
    "a broken packing": entry(body("x"), head=headers(compression="application/x-gzip")),
}


@pytest.mark.parametrize("garbage", NOT_EVEN_MESSAGES.values(), ids=NOT_EVEN_MESSAGES)
def test_worker_outlives_an_entry_that_is_no_message(target: Target, garbage: bytes) -> None:
    """What cannot be read is dropped, not repeated in the log, and not left for the next worker."""
    target.push(garbage)
    assert target.serves()
    log = target.said()
    assert SECRET not in log
    assert len(log) < 20_000


@pytest.mark.parametrize("message", NOT_TASKS.values(), ids=NOT_TASKS)
def test_worker_outlives_a_message_that_is_no_task(target: Target, message: bytes) -> None:
    """One line says that something was dropped, without its contents, and the next job is done."""
    target.push(message)
    assert target.serves()
    log = target.said()
    assert len(SAID.findall(log)) == 1, log
    assert SECRET not in log
    assert ESCAPE not in log
    assert "Traceback" not in log
    assert len(log) < 20_000


@pytest.mark.parametrize("kind", ["application/x-python-serialize", "pickle", "application/data"])
@pytest.mark.parametrize("head", [headers(), {}], ids=["second protocol", "first protocol"])
def test_pickled_message_is_never_unpickled(target: Target, tmp_path: Path, kind: str, head: dict[str, Any]) -> None:
    """Unpickling would run whatever its sender likes."""
    trap = tmp_path / "sprung"
    target.push(entry(pickle.dumps(Mine(trap)), head=head, **{"content-type": kind, "content-encoding": "binary"}))
    assert target.serves()
    assert not trap.exists()
    assert SECRET not in target.said()


def test_task_that_is_not_known_here_fails_for_its_sender(target: Target, app: Celery) -> None:
    """Who waits for it hears so; the log names the task and keeps its arguments to itself."""
    sent = app.send_task("their.task", [SECRET], queue=target.settings.queue, argsrepr=SECRET)
    with pytest.raises(Exception, match=r"their\.task") as caught:
        sent.get(timeout=SOON)
    assert type(caught.value).__name__ == "NotRegistered"
    assert target.serves()
    log = target.said()
    assert "their.task" in log
    assert SECRET not in log


@pytest.mark.parametrize(
    "job",
    [
        {"v": 2, "task_type": "summarize", "prompt": SECRET},
        {"task_type": "summarize", "prompt": SECRET, "temperature": float("nan")},
        {"task_type": "summarize", "prompt": "\ud800" + SECRET},
        {"task_type": "summarize", "prompt": SECRET, "metadata": json.loads("[" * 400 + "]" * 400)},
        [SECRET],
        SECRET,
        None,
    ],
    ids=["of another version", "with NaN", "with half a character", "nested deeply", "a list", "text", "null"],
)
def test_job_that_is_none_is_refused_with_a_typed_error(target: Target, app: Celery, job: Any) -> None:
    """Whoever submits it as a task hears what is wrong with it; nothing of it is repeated."""
    sent = app.send_task(SUBMIT, [job])
    with pytest.raises(Exception, match=r".") as caught:
        sent.get(timeout=SOON)
    assert type(caught.value).__name__ == "InvalidJobError"
    assert SECRET not in str(caught.value)
    assert target.client.status(sent.id) is JobStatus.UNKNOWN
    assert target.serves()
    assert SECRET not in target.said()


def peak_bytes(process: psutil.Process) -> int:
    """Return the most memory that a process has held since ``forget_peak``."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def forget_peak(process: psutil.Process) -> int:
    """Begin to measure anew; return the memory that is held now."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return peak_bytes(process)


def test_packed_message_does_not_fill_the_memory(target: Target) -> None:
    """200 MB of nothing pack into 1 MB; no more than the limit of a message is unpacked."""
    before = forget_peak(target.process)
    bomb = zlib.compress(b" " * 200 * MEGABYTE, 1)
    target.push(entry(bomb, head=headers(compression="zlib")))
    assert target.serves()
    assert peak_bytes(target.process) - before < 150 * MEGABYTE
    assert "unpacks to more than" in target.said()


def test_message_without_end_is_dropped(target: Target) -> None:
    """34 MB are no wake-up: they are read, because Redis hands over nothing less, and not looked into."""
    before = forget_peak(target.process)
    target.push(entry(b" " * 34 * MEGABYTE, head=headers()))
    assert target.serves()
    assert peak_bytes(target.process) - before < 400 * MEGABYTE
    assert "its body is longer than" in target.said()


def test_packed_message_of_reasonable_size_is_read(target: Target, until: Until) -> None:
    """A client that compresses its messages is understood."""
    job = target.client.submit("summarize", "?")
    job.result(SOON)
    target.said()
    target.push(entry(zlib.compress(body(job.id)), head=headers(id=job.id, compression="application/x-gzip")))
    heard: list[str] = []
    until(lambda: heard.append(target.said()) or f"[{job.id}] succeeded" in "".join(heard))


@pytest.mark.parametrize(
    ("kind", "pack"),
    [("gzip", zlib.compress), ("bzip2", lambda data: bz2.compress(data, 1)), ("xz", partial(lzma.compress, preset=0))],
)
def test_each_way_of_packing_has_its_bound(kind: str, pack: Callable[[bytes], bytes]) -> None:
    """What Kombu unpacks in a worker is read as before, up to the limit."""
    assert compression.decompress(pack(b"{}"), kind) == b"{}"
    with pytest.raises(UnwelcomeMessageError):
        compression.decompress(pack(b" " * (MAX_BODY_BYTES + 1)), kind)
