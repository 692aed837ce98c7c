"""What does a provider say its calls cost? Its usage export, or the simulator's invoice, as lines of one kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

from attune_worker.errors import AttuneError
from attune_worker.jobs import NANO_USD

T = TypeVar("T")

COLUMNS = (
    "client_request_id",
    "request_id",
    "day",
    "model",
    "cost_usd",
    "input_tokens",
    "output_tokens",
    "calls",
)
"""What is read of a line. All others are passed over."""


class InvoiceError(AttuneError):
    """Raised when a file cannot be read as an invoice; ``line`` counts from 1, ``column`` is the one at fault."""

    exit_code = 2
    type = "invoice"

    def __init__(self, message: str, *, path: Path | str, line: int | None = None, column: str | None = None) -> None:
        where = [str(path), *([f"line {line}"] if line else []), *([f"column {column!r}"] if column else [])]
        super().__init__(f"{', '.join(where)}: {message}")
        self.path = str(path)
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """What a provider charges for one call, or for ``calls`` of a ``day`` (UTC) together.

    ``client_request_id`` is the id that the caller gave the call, ``request_id`` the provider's. ``cost_usd`` is to
    the nano-dollar, and None where the line has no price; ``calls`` is None where it does not say. Raises
    ``ValueError`` for less than nothing: a credit would hide what other lines charge.
    """

    model_id: str
    cost_usd: Decimal | None
    client_request_id: str | None = None
    request_id: str | None = None
    day: date | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    calls: int | None = None

    def __post_init__(self) -> None:
        counts = (self.cost_usd, self.input_tokens, self.output_tokens, self.calls)
        if any(count is not None and count < 0 for count in counts):
            raise ValueError("a line charges for nothing at least: no amount and no count is negative")


def read_invoice(path: Path | str, columns: Mapping[str, str] | None = None) -> list[InvoiceLine]:
    """Read a file: ``.csv`` with a header, ``.jsonl`` with an object in each line, or the simulator's ``.json``.

    Each line has ``model``; ``cost_usd``, or ``input_tokens`` and ``output_tokens``; and ``client_request_id``,
    ``request_id`` or ``day`` (a date, or a time, taken as UTC where it names no zone). ``columns`` maps these names,
    and ``calls``, to those that the file uses. Raises ``InvoiceError`` for what it cannot read.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".json": _json,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvoiceError(f"an invoice is one of {', '.join(readers)}", path=path)
    names = {name: name for name in COLUMNS} | dict(columns or {})
    if unknown := set(names) - set(COLUMNS):
        raise InvoiceError(f"no such columns: {', '.join(sorted(unknown))}; known: {', '.join(COLUMNS)}", path=path)
    try:
        return [_Row(path, number, row, names).read() for number, row in reader(path)]
    except OSError as error:
        raise InvoiceError(f"cannot be read: {error.strerror}", path=path) from None
    except UnicodeDecodeError:
        raise InvoiceError("is not UTF-8 text", path=path) from None


def lines_of(report: Mapping[str, Any]) -> list[InvoiceLine]:
    """Return the lines of an invoice as the simulator reports it. Raises ``InvoiceError`` for anything else."""
    path, names = Path("invoice"), {name: name for name in COLUMNS}
    return [_Row(path, number, row, names).read() for number, row in _calls(path, report)]


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            for row in rows:
                if None in row:
                    raise InvoiceError("has more values than the header has columns", path=path, line=rows.line_num)
                yield rows.line_num, row
        except csv.Error as error:
            raise InvoiceError(f"is not CSV: {error}", path=path, line=rows.reader.line_num) from None


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _object(path, number, _decoded(path, number, line))


def _json(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return _calls(path, _decoded(path, None, path.read_text(encoding="utf-8-sig")))


def _calls(path: Path, report: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the calls of the simulator's report, in the words of an export; they count from 1."""
    calls = report.get("calls") if isinstance(report, Mapping) else report
    if not isinstance(calls, list):
        raise InvoiceError("holds no list of calls; an invoice's summary does not say enough", path=path)
    for number, one in enumerate(calls, 1):
        call = _object(path, number, one)
        usage = call.get("usage")
        row = {**call, **usage} if isinstance(usage, Mapping) else dict(call)
        if isinstance(at := call.get("time"), int | float | Decimal):
            row["day"] = _day_of(path, number, float(at))
        yield number, row


def _day_of(path: Path, number: int, seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        raise InvoiceError(f"{seconds:g} is no time", path=path, line=number, column="time") from None


def _decoded(path: Path, number: int | None, text: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError, ArithmeticError):  # the last: a number beyond all bounds
        raise InvoiceError("is not JSON", path=path, line=number) from None


def _object(path: Path, number: int, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvoiceError("is no object", path=path, line=number)
    return value


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a file, before it is understood."""

    path: Path
    number: int
    values: Mapping[str, Any]
    names: Mapping[str, str]

    def read(self) -> InvoiceLine:
        model_id = self._value("model", _text, "a model's id")
        cost_usd = self._value("cost_usd", _amount, "an amount in USD, 0 or more, such as 0.0125")
        input_tokens = self._value("input_tokens", _whole, "a whole number")
        output_tokens = self._value("output_tokens", _whole, "a whole number")
        own_id, request_id = (self._value(name, _text, "an id") for name in ("client_request_id", "request_id"))
        day = self._value("day", _day, "a date or a time, such as 2026-11-23 or 2026-11-23T10:00:00Z")
        if model_id is None:
            raise self._error("model", "is missing")
        if cost_usd is None and (input_tokens is None or output_tokens is None):
            raise self._error("cost_usd", "is missing, and so are tokens to go by")
        if own_id is None and request_id is None and day is None:
            raise self._error("client_request_id", "is missing, and so are request_id and day: whose line is it?")
        calls = self._value("calls", _whole, "a whole number")
        return InvoiceLine(model_id, cost_usd, own_id, request_id, day, input_tokens, output_tokens, calls)

    def _value(self, name: str, read: Callable[[Any], T], wanted: str) -> T | None:
        value = self.values.get(self.names[name])
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        try:
            return read(value.strip() if isinstance(value, str) else value)
        except (ValueError, OverflowError):  # the latter: a time that no calendar has
            raise self._error(name, f"{str(value)[:40]!r} is not {wanted}") from None

    def _error(self, name: str, message: str) -> InvoiceError:
        return InvoiceError(message, path=self.path, line=self.number, column=self.names[name])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)  # noqa: TRY004  # the row says what was wanted
    return value


def _amount(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ValueError(value)  # noqa: TRY004  # as above
    try:
        exact = Decimal(value)
        amount = exact.quantize(NANO_USD, ROUND_HALF_EVEN)
    except InvalidOperation:  # no number, infinite, or beyond any bill
        raise ValueError(value) from None
    if not amount.is_finite() or exact < 0:
        raise ValueError(value)
    return amount


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).isdecimal():
        raise ValueError(value)
    return int(value)


def _day(value: Any) -> date:
    if not isinstance(value, str):
        raise ValueError(value)  # noqa: TRY004  # as above
    moment = datetime.fromisoformat(value)
    return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)).date()
