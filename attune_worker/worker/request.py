"""What does Celery tell others about a message it holds? Never its arguments."""

from __future__ import annotations

import logging
from typing import Any

from celery.worker.request import Request

from attune_worker.app import RUN_JOB
from attune_worker.worker.intake import UnwelcomeMessageError, is_name

HIDDEN = "(...)"

# At debug level, every pool of Celery's would write the arguments of each task that it is given.
logging.getLogger("celery.pool").setLevel(logging.INFO)


class _WithoutBodies(logging.Filter):
    """Cuts the contents of a message off the log record that says what is wrong with it, its headers included."""

    def filter(self, record: logging.LogRecord) -> bool:
        head, newline, rest = str(record.msg).partition("\n")
        if newline and "body" in head + rest and isinstance(record.args, tuple):
            record.msg = head.partition(" [")[0].replace("%r", "%s")
            record.args = tuple(_words(value) for value in record.args[: record.msg.count("%s")])
            record.exc_info = None
        return True


def _words(value: object) -> object:
    """Return what may be said of an error about a message: the words of most hold a part of it."""
    if isinstance(value, KeyError) and value.args and is_name(value.args[0]):  # a task that is not known here
        return repr(value)
    if isinstance(value, Exception) and not isinstance(value, UnwelcomeMessageError):
        return type(value).__name__
    return value


# Messages that are not for us, or cannot be read, would be logged whole; a job may be in them.
logging.getLogger("celery.worker.consumer.consumer").addFilter(_WithoutBodies())


class QuietRequest(Request):  # type: ignore[misc]  # celery has no type information
    """A request whose arguments stay out of events, logs and ``inspect``, whoever sent it and however.

    Its names do not, so they have to be names: making one of a message raises ``UnwelcomeMessageError``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not is_name(self.id) or not is_name(self.name):
            raise UnwelcomeMessageError("its id or its name is not a name")
        if self._type == RUN_JOB and not _is_wake_up(self._args, self._kwargs):
            raise UnwelcomeMessageError("it is to wake a job, but does not say which")
        self._argsrepr = self._kwargsrepr = HIDDEN
        self._request_dict.update(argsrepr=HIDDEN, kwargsrepr=HIDDEN)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what ``inspect active`` and its like show, with the arguments hidden whatever ``safe`` says."""
        described: dict[str, Any] = super().info(safe=True)
        return described


def _is_wake_up(args: Any, kwargs: Any) -> bool:
    values = [*args, *kwargs.values()] if isinstance(args, list | tuple) and isinstance(kwargs, dict) else []
    return len(values) == 1 and is_name(values[0])
