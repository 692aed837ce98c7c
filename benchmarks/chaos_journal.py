"""What was written to Redis, in order? Its append-only file is a journal that nobody had to be asked to keep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import hiredis

from attune_worker.jobs import JobStatus

CONFIGURATION = "auto-aof-rewrite-percentage 0\naof-use-rdb-preamble no"
"""What keeps the whole journal: Redis would put its state in the place of old commands."""

CHUNK_BYTES = 2**20
ENDED = frozenset(status.value.encode() for status in JobStatus if status.ended)
CELERY_RESULT = b"celery-task-meta-"
CELERY_ENDED = frozenset({"SUCCESS", "FAILURE", "REVOKED"})


@dataclass(frozen=True, slots=True)
class Admitted:
    """A call that was let go: whose it is, under which lease, and when (seconds of Redis' clock)."""

    job_id: str
    lease: str
    seconds: float


@dataclass
class Journal:
    """What the commands of one run did: how often the end of each job was written, and what counters came to.

    ``calls``: those that were admitted. ``peaks``: for each field of a budget that counts what was spent, the most
    that it ever was (nano-USD). ``messages``: all that were put into a queue.
    """

    ends: Counter[str] = field(default_factory=Counter)
    calls: dict[str, Admitted] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    messages: int = 0

    @classmethod
    def of(cls, commands: Iterable[Sequence[bytes]]) -> Journal:
        """Return what these commands did."""
        journal = cls()
        for command in commands:
            journal.add(command)
        return journal

    def add(self, command: Sequence[bytes]) -> None:
        """Take one command into account."""
        name = command[0].upper()
        key = command[1] if len(command) > 1 else b""
        if name in {b"HSET", b"HMSET"} and b":job:" in key:
            self._record(key.partition(b":job:")[2].decode(), dict(zip(command[2::2], command[3::2], strict=False)))
        elif name in {b"HSET", b"HMSET"} and b":call:" in key:
            self._call(key.partition(b":call:")[2].decode(), dict(zip(command[2::2], command[3::2], strict=False)))
        elif name in {b"HSET", b"HMSET"} and b":budget:" in key:
            for counter, number in zip(command[2::2], command[3::2], strict=False):
                if counter.endswith(b":spent"):
                    budget = f"{key.decode()} {counter.decode()}"
                    self.peaks[budget] = max(self.peaks.get(budget, 0), int(number))
        elif name == b"LPUSH":
            self.messages += len(command) - 2
        elif name in {b"SET", b"SETEX", b"PSETEX"} and key.startswith(CELERY_RESULT):
            self._result(key.removeprefix(CELERY_RESULT).decode(), command[2 if name == b"SET" else 3])

    def _record(self, job_id: str, fields: dict[bytes, bytes]) -> None:
        self.ends[job_id] += fields.get(b"state") in ENDED

    def _call(self, call_id: str, fields: dict[bytes, bytes]) -> None:
        if {b"job", b"lease", b"admitted_ms"} <= fields.keys():
            job_id, lease = fields[b"job"].decode(), fields[b"lease"].decode()
            self.calls[call_id] = Admitted(job_id, lease, int(fields[b"admitted_ms"]) / 1000)

    def _result(self, task_id: str, value: bytes) -> None:
        self.ends[task_id] += json.loads(value).get("status") in CELERY_ENDED


def commands_in(folder: Path) -> Iterator[list[bytes]]:
    """Yield the commands that a Redis with its data in ``folder`` has logged.

    One file up to Redis 6, a folder of files since. A last command that was cut off, as by a kill, is left out.
    """
    files = [folder / "appendonly.aof"]
    if (several := folder / "appendonlydir").is_dir():
        files = sorted(several.glob("*.base.aof")) + sorted(several.glob("*.incr.aof"), key=_number)
    for file in files:
        reader = hiredis.Reader()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                reader.feed(chunk)
                while (command := reader.gets()) is not False:
                    yield command


def _number(file: Path) -> int:
    with suppress(ValueError):
        return int(file.name.split(".")[-3])
    return 0
