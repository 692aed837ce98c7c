"""Do the broker and the result backend answer, and could a message come twice?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from celery import Celery

from attune_worker.app import is_amqp, make_app
from attune_worker.doctor.finding import Finding, Level, unreachable
from attune_worker.doctor.state import eviction
from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings, masked
from attune_worker.store.connection import connect, reaching
from attune_worker.store.server import look_at
from attune_worker.wake_ups import messages_waiting

VISIBILITY_TIMEOUT_SECONDS = 3600
"""Kombu's own, where nothing is configured."""


def broker(settings: Settings, queued: int | None) -> Iterator[Finding]:
    """Look at the broker; ``queued`` jobs wait for a message (None: not known)."""
    with closing(make_app(settings)) as app:
        yield _reached(settings, app, queued)
        yield redelivery(app, settings.timeout_seconds)
    yield from _eviction_of_broker(settings)


def redelivery(app: Celery, longest_seconds: float) -> Finding:
    """Tell whether a broker could give a message to a second worker while the first one runs its job.

    ``longest_seconds`` is how long a start of a job may take. A job that waits, or whose deadline is days away, has no
    message: whoever wakes it sends one.
    """
    if not app.conf.task_acks_late:
        why = "messages are acknowledged before their jobs start, so no visibility timeout bears on a job"
        text = f"{why}: one may take {longest_seconds:g} s a start, and its deadline be as far away as you like"
        return Finding("redelivery", Level.OK, text)
    limit = app.conf.broker_transport_options.get("visibility_timeout", VISIBILITY_TIMEOUT_SECONDS)
    if limit > longest_seconds:
        text = f"messages are acknowledged late, and come again after {limit:g} s; a start takes {longest_seconds:g} s"
        return Finding("redelivery", Level.OK, text)
    text = f"messages come again after {limit:g} s, while a job may take {longest_seconds:g} s: it would be sent twice"
    return Finding("redelivery", Level.WARNING, text, "Set task_acks_late = False, as attune-worker does.")


def _reached(settings: Settings, app: Celery, queued: int | None) -> Finding:
    try:
        messages = messages_waiting(app)
    except ServiceUnavailableError as error:
        return Finding("broker", Level.UNREACHABLE, error.message, "Start it, or correct broker_url.")
    text = f"answers at {masked(settings.broker)}; {messages} messages in queue {settings.queue}"
    if queued is None:
        return Finding("broker", Level.OK, text)
    lost = f"; workers send the {queued - messages} missing ones again" if queued > messages else ""
    return Finding("broker", Level.OK, f"{text} for {queued} queued jobs{lost}")


def _eviction_of_broker(settings: Settings) -> Iterator[Finding]:
    """Look at a broker that is a Redis of its own: it holds the only copy of what is submitted as a Celery task."""
    if settings.broker_url is None or settings.broker == settings.redis_url.get_secret_value() or is_amqp(settings):
        return
    elsewhere = settings.model_copy(update={"redis_url": settings.broker_url})
    try:
        with closing(connect(elsewhere, max_connections=1)) as redis:
            yield from (eviction(server) for server in look_at(redis, elsewhere))
    except ServiceUnavailableError as error:
        yield Finding("eviction", Level.UNKNOWN, error.message, "Look at maxmemory-policy of the broker.")


def backend(settings: Settings) -> Iterator[Finding]:
    """Look at the result backend where it is a server of its own; it holds no more than summaries."""
    if settings.result_backend is None or settings.backend == settings.redis_url.get_secret_value():
        return
    elsewhere = settings.model_copy(update={"redis_url": settings.result_backend})
    try:
        with closing(connect(elsewhere, max_connections=1)) as redis, reaching(elsewhere):
            redis.ping()
    except ServiceUnavailableError as error:
        yield unreachable("results", error, "result_backend")
    else:
        yield Finding("results", Level.OK, f"answers at {masked(settings.backend)}")
