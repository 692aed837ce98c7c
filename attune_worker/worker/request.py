"""What does Celery tell others about a message it holds? Never its arguments."""

from __future__ import annotations

import logging
from typing import Any

from celery.worker.request import Request

HIDDEN = "(...)"

# At debug level, every pool of Celery's would write the arguments of each task that it is given.
logging.getLogger("celery.pool").setLevel(logging.INFO)


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
