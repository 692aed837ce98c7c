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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from attune_worker.errors import AttuneError, ConfigurationError, InvalidJobError
from attune_worker.jobs import JobError, JobResult

INVALID = "invalid"
"""Status, in the results file, of a line that is no job; it is read again by the next run."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: its id, and the fields of a job or the reason why it is none."""

    number: int
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
                line = Line(number, f"{line.id}#line-{number}", {}, reason)
            seen.setdefault(line.id, number)
            yield line


def _read(number: int, text: bytes) -> Line:
    try:
        fields = json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one too
        what = "valid UTF-8" if isinstance(error, UnicodeDecodeError) else f"JSON ({error})"
        return Line(number, str(number), {}, f"not {what}")
    except RecursionError:
        return Line(number, str(number), {}, "not JSON that can be read: nested too deeply")
    if not isinstance(fields, dict):
        return Line(number, str(number), {}, f"a job is a JSON object, not {type(fields).__name__}")
    given = fields.pop("id", number)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        return Line(number, str(number), {}, "'id' must be text or a whole number")
    return Line(number, str(given), fields)


def job_of(line: Line, run_id: str) -> dict[str, Any]:
    """Return the job's fields, with an idempotency key of this run unless the line has its own."""
    if line.fields.get("idempotency_key") is not None:
        return line.fields
    name = json.dumps([run_id, line.id, line.fields], sort_keys=True).encode()
    return {**line.fields, "idempotency_key": f"run:{hashlib.sha256(name).hexdigest()}"}


class Results:
    """The results file of one run, held exclusively while the context is entered.

    Opening it drops a last line that was cut off, and the results that have to be done again.
    """

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        self.path = path
        self.done: set[str] = set()
        self._again = {INVALID} | ({"failed", "expired", "cancelled"} if retry_failed else set())
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
        if self._read_done():
            self._marker.unlink(missing_ok=True)  # what is done again must not find its old job
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @property
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
        self._write({"id": line.id, "line": line.number, **json.loads(result.model_dump_json(exclude_none=True))})
        self.done.add(line.id)

    def add_invalid(self, line: Line, reason: str) -> None:
        """Write that a line is no job, and why."""
        error = JobError(type=InvalidJobError.type, message=reason).model_dump(exclude_none=True)
        self._write({"id": line.id, "line": line.number, "status": INVALID, "error": error})

    def _write(self, value: dict[str, Any]) -> None:
        self._stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def _read_done(self) -> bool:
        """Read what is done, drop what is not; return whether results of ended jobs were dropped."""
        self._stream.seek(0)
        kept, dropped, dirty = [], False, False
        for text in self._stream:
            entry = _entry(text)
            if entry is None or entry["status"] in self._again:
                dirty = True
                dropped |= entry is not None and entry["status"] != INVALID
            else:
                self.done.add(entry["id"])
                kept.append(text)
        if dirty:
            self._rewrite(b"".join(kept))
        return dropped

    def _rewrite(self, content: bytes) -> None:
        """Replace the file's content so that a crash leaves the old or the new one, keeping the lock."""
        draft = self.path.with_name(f"{self.path.name}.new")
        draft.write_bytes(content)
        replacement = draft.open("a+b")
        fcntl.flock(replacement, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(draft, self.path)  # noqa: PTH105  # atomic, and named so
        self._stream.close()
        self._stream = replacement


def _entry(text: bytes) -> dict[str, Any] | None:
    """Read one line of the results file; None for one that was cut off."""
    if not text.endswith(b"\n"):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    complete = isinstance(entry, dict) and isinstance(entry.get("id"), str) and isinstance(entry.get("status"), str)
    return entry if complete else None
