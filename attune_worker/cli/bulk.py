"""Which lines of a JSONL file still have to be done, and where do their results go?

The results file is the memory of a bulk run: a line that has its result there is done. Beside it,
while the run is unfinished, stands ``<results>.run`` with the run's id. The id makes the idempotency
keys of the jobs, so that a run that was interrupted finds the jobs it had submitted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from pydantic import JsonValue

from attune_worker.errors import AttuneError, ConfigurationError, InvalidJobError
from attune_worker.jobs import JobError, JobResult

INVALID = "invalid"
"""Status, in the results file, of a line that is no job; it is read again by the next run."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: the fields of a job, or the reason why it is none.

    ``given_id`` is what the line calls itself (else its number) and what its result is written under;
    ``id`` is the same as text, and of no other line.
    """

    number: int
    given_id: JsonValue
    id: str
    fields: dict[str, Any]
    reason: str | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a JSONL file that are not blank.

    A line's id is its ``id`` field, else its number. Two lines with one id: the second is invalid.
    """
    seen: dict[str, int] = {}
    with path.open("rb") as stream:
        for number, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            line = _read(number, text)
            if line.id in seen and line.reason is None:
                reason = f"id {line.id!r} is already that of line {seen[line.id]}"
                line = Line(number, line.given_id, f"{line.id}#{number}", {}, reason)
            seen.setdefault(line.id, number)
            yield line


def _read(number: int, text: bytes) -> Line:
    try:
        fields = json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one too
        what = "valid UTF-8" if isinstance(error, UnicodeDecodeError) else f"JSON ({error})"
        return _invalid(number, f"not {what}")
    except RecursionError:
        return _invalid(number, "not JSON that can be read: nested too deeply")
    if not isinstance(fields, dict):
        return _invalid(number, f"a job is a JSON object, not {type(fields).__name__}")
    given = fields.pop("id", number)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        return _invalid(number, "'id' must be text or a whole number")
    return Line(number, given, str(given), fields)


def _invalid(number: int, reason: str) -> Line:
    return Line(number, number, str(number), {}, reason)


def job_of(line: Line, run_id: str) -> dict[str, Any]:
    """Return the job's fields, with an idempotency key of this run unless the line has its own."""
    if line.fields.get("idempotency_key") is not None:
        return line.fields
    name = json.dumps([run_id, line.id, line.fields], sort_keys=True).encode()
    return {**line.fields, "idempotency_key": f"run:{hashlib.sha256(name).hexdigest()}"}


class Results:
    """The results file of one run, held exclusively while the context is entered.

    Entering drops a last line that was cut off, and the results that have to be done again; it raises
    ``ConfigurationError``, and leaves the file alone, when that holds anything but results.
    ``failed_before`` counts the results, of those kept, that are no answers.
    """

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        self.path = path
        self.done: set[str] = set()
        self.failed_before = 0
        self._again = {INVALID} | ({"failed", "expired", "cancelled", "dead"} if retry_failed else set())
        self._marker = path.with_name(f"{path.name}.run")

    def __enter__(self) -> Self:
        try:
            self._stream = self.path.open("a+b")
        except OSError as error:
            raise ConfigurationError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise AttuneError(f"{self.path}: another run is writing to it") from None
        try:
            if self._read_done():
                self._marker.unlink(missing_ok=True)  # what is done again must not find its old job
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @cached_property
    def run_id(self) -> str:
        """The id of this run, the same after an interruption."""
        try:
            return self._marker.read_text().strip()
        except FileNotFoundError:
            run_id = uuid4().hex
            self._marker.write_text(run_id)
            return run_id

    def finished(self) -> None:
        """Note that every line has its result: the next run starts anew."""
        self._marker.unlink(missing_ok=True)

    def add(self, line: Line, result: JobResult) -> None:
        """Write a line's result; it is on disk as far as the system is concerned when this returns."""
        self._write({"id": line.given_id, "line": line.number, **json.loads(result.model_dump_json(exclude_none=True))})
        self.done.add(line.id)

    def add_invalid(self, line: Line, reason: str) -> None:
        """Write that a line is no job, and why."""
        error = JobError(type=InvalidJobError.type, message=reason).model_dump(exclude_none=True)
        self._write({"id": line.given_id, "line": line.number, "status": INVALID, "error": error})

    def _write(self, value: dict[str, Any]) -> None:
        self._stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def _read_done(self) -> bool:
        """Read what is done, drop what is not; return whether results of ended jobs were dropped."""
        dropped: Counter[str] = Counter()
        for entry in self._entries():
            if entry is None or entry["status"] in self._again:
                dropped["" if entry is None else entry["status"]] += 1
            else:
                self.done.add(str(entry["id"]))
                self.failed_before += entry["status"] != "succeeded"
        if dropped:
            self._rewrite()
        return bool(set(dropped) - {"", INVALID})

    def _entries(self) -> Iterator[dict[str, Any] | None]:
        """Yield the file's results, and None for a last line that was cut off."""
        self._stream.seek(0)
        for number, text in enumerate(self._stream, start=1):
            entry = _entry(text)
            if entry is None and text.endswith(b"\n"):
                raise ConfigurationError(f"{self.path}: line {number} is no result; is this the file you meant?")
            yield entry

    def _rewrite(self) -> None:
        """Leave out what is to be done again, so that a crash leaves the old file or the new one; keep the lock."""
        draft = self.path.with_name(f"{self.path.name}.new")
        replacement = draft.open("w+b")
        fcntl.flock(replacement, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._stream.seek(0)
        for text in self._stream:
            entry = _entry(text)
            if entry is not None and entry["status"] not in self._again:
                replacement.write(text)
        replacement.flush()
        os.replace(draft, self.path)  # noqa: PTH105  # atomic, and named so
        self._stream.close()
        self._stream = replacement


def _entry(text: bytes) -> dict[str, Any] | None:
    """Read one line of the results file; None for one that is no result."""
    if not text.endswith(b"\n"):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    complete = isinstance(entry, dict) and {"id", "line"} <= entry.keys() and isinstance(entry.get("status"), str)
    return entry if complete else None
