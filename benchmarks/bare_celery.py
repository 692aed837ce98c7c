"""What does one write without attune-worker, and with retries? A Celery task that calls a provider, done well.

Retries are made within the task, so that what becomes of a job in a fault is for Celery's delivery alone to say.
``BARE_ACKS_LATE=1`` acknowledges late, as Celery's documentation advises for tasks that may run twice. All else is
Celery's default, the visibility timeout of an hour included. For the bench, each start and end goes to a file.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from celery import Celery, Task

NAME = "bare.call_with_retries"
MODEL = "claude-haiku-4-5"
API_VERSION = "2023-06-01"
CALL_ID_HEADER = "x-client-request-id"
MAX_ATTEMPTS = 4
BACKOFF_SECONDS = 0.5
BACKOFF_CAP_SECONDS = 8.0

app = Celery("bare")
if os.environ.get("BARE_ACKS_LATE") == "1":
    app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1)
app.conf.update(broker_connection_retry_on_startup=True, broker_connection_max_retries=None)
logging.getLogger("httpx").setLevel(logging.WARNING)
_local = threading.local()
_tls = httpx.create_ssl_context()


@app.task(name=NAME, bind=True)  # type: ignore[untyped-decorator]  # celery has no type information
def call(task: Task, prompt: str) -> dict[str, Any]:
    """Ask the provider, up to ``MAX_ATTEMPTS`` times, and return the answer's text and what it used."""
    job_id = task.request.id
    _note(job_id, "started")
    try:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return _ask(job_id, prompt)
            except (httpx.HTTPError, ValueError):
                if attempt == MAX_ATTEMPTS:
                    raise
                wait_seconds = min(BACKOFF_SECONDS * 2 ** (attempt - 1), BACKOFF_CAP_SECONDS)
                time.sleep(wait_seconds * random.uniform(0.5, 1))
        raise AssertionError("attempts are at least one")
    finally:
        _note(job_id, "ended")


def _ask(job_id: str, prompt: str) -> dict[str, Any]:
    response = _client().post(
        "/v1/messages",
        headers={CALL_ID_HEADER: f"{job_id}.{uuid4().hex[:8]}"},
        json={"model": MODEL, "max_tokens": 4096, "messages": [{"role": "user", "content": prompt}]},
    )
    response.raise_for_status()
    answer = response.json()
    return {"content": answer["content"][0]["text"], "usage": answer["usage"]}


def _client() -> httpx.Client:
    client: httpx.Client | None = getattr(_local, "client", None)
    if client is None:
        headers = {"x-api-key": os.environ["PROVIDER_KEY"], "anthropic-version": API_VERSION}
        timeout_seconds = float(os.environ["PROVIDER_TIMEOUT_SECONDS"])
        base_url = os.environ["PROVIDER_URL"]
        client = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_seconds, verify=_tls)
        _local.client = client
    return client


def _note(job_id: str, event: str) -> None:
    """Append one line in one write, which a kill leaves whole or away."""
    line = json.dumps({"job": job_id, "event": event, "seconds": time.monotonic()}) + "\n"
    notes = os.open(os.environ["BARE_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(notes, line.encode())
    finally:
        os.close(notes)


def noted(file: Path) -> Iterator[tuple[str, str, float]]:
    """Yield the job, the event and the time (seconds, monotonic) of each line that a worker wrote."""
    if file.exists():
        for line in file.read_text().splitlines():
            note = json.loads(line)
            yield note["job"], note["event"], note["seconds"]
