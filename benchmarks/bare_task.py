"""What does one write without attune-worker? A Celery task around an HTTP client, done well.

Celery's settings are its defaults; ``CELERY_BROKER_URL`` and ``CELERY_RESULT_BACKEND`` say where Redis
is. It has no retries, limits, cost or recovery: it is the floor that attune-worker is held against.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import httpx
from celery import Celery

NAME = "bare.call"
MODEL = "claude-haiku-4-5"
API_VERSION = "2023-06-01"

DESCRIPTION = (
    "one httpx.Client per thread, kept and reused, with one TLS context for all; JSON request, status checked, "
    "text and usage read and returned; Celery's default settings, result in Redis; httpx' own log line per request off"
)

app = Celery("bare")
logging.getLogger("httpx").setLevel(logging.WARNING)
_local = threading.local()
_tls = httpx.create_ssl_context()  # one for all threads: each of its own would cost a megabyte and 10 ms


@app.task(name=NAME)
def call(prompt: str) -> dict[str, Any]:
    """Ask the provider, and return the answer's text and what it used."""
    response = _client().post(
        "/v1/messages",
        json={"model": MODEL, "max_tokens": 4096, "messages": [{"role": "user", "content": prompt}]},
    )
    response.raise_for_status()
    answer = response.json()
    return {"content": answer["content"][0]["text"], "usage": answer["usage"]}


def _client() -> httpx.Client:
    client: httpx.Client | None = getattr(_local, "client", None)
    if client is None:
        headers = {"x-api-key": os.environ["PROVIDER_KEY"], "anthropic-version": API_VERSION}
        client = httpx.Client(base_url=os.environ["PROVIDER_URL"], headers=headers, timeout=120, verify=_tls)
        _local.client = client
    return client
