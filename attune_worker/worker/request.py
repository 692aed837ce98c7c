"""What does Celery tell others about a message it holds? Never its arguments."""

from __future__ import annotations

import logging
from typing import Any

from celery.worker.request import Request

HIDDEN = "(...)"

# At debug level, every pool of Celery's would write the arguments of each task that it is given.
logging.getLogger("celery.pool").setLevel(logging.INFO)


class _WithoutBodies(logging.Filter):
    """Cuts the contents of a message off the log record that says what is wrong with it."""

    def filter(self, record: logging.LogRecord) -> bool:
        head, newline, rest = str(record.msg).partition("\n")
        if newline and "body" in head + rest and isinstance(record.args, tuple):
            record.msg, record.args = head, record.args[: head.count("%s") + head.count("%r")]
        return True


# Messages that are not for us, or cannot be read, would be logged whole; a job may be in them.
logging.getLogger("celery.worker.consumer.consumer").addFilter(_WithoutBodies())


class QuietRequest(Request):  # type: ignore[misc]  # celery has no type information
    """A request whose arguments stay out of events, logs and ``inspect``, whoever sent it and however."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._argsrepr = self._kwargsrepr = HIDDEN
        self._request_dict.update(argsrepr=HIDDEN, kwargsrepr=HIDDEN)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what ``inspect active`` and its like show, with the arguments hidden whatever ``safe`` says."""
        described: dict[str, Any] = super().info(safe=True)
        return described
