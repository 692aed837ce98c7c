"""Which Celery app carries the wake-ups, and how is it configured?

The job record in Redis owns delivery, retries, deadlines and recovery; Celery carries a message with
the job's id to a free worker. Hence early acknowledgement, no prefetching, no ETA, and JSON only.
"""

from __future__ import annotations

import ssl
from typing import Any

from celery import Celery
from kombu.entity import Queue

from attune_worker.jobs import Job
from attune_worker.settings import Settings

THREAD_POOL = "attune_worker.worker.pool:ThreadPool"
RESULT_BACKEND = "attune_worker.worker.backend:SharedRedisBackend"
AMQP_PREFETCH = 1
"""Messages that RabbitMQ sends to a worker before it has begun with them: so many wait if its threads are busy."""

DISPATCHER = "attune_worker.worker.events:Dispatcher"
RUN_JOB = "attune_worker.run_job"
SUBMIT_JOB = "attune_worker.submit_job"
CONSUMER = "attune_worker.worker.consumer:Consumer"
LIVENESS = "attune_worker.worker.consumer:Liveness"

AMQP_TIMEOUT_SECONDS = 15
"""How long RabbitMQ may take for a command before its connection counts as broken."""

AMQP_HEARTBEAT_SECONDS = 20
"""A worker whose connection to RabbitMQ is dead notices after twice as long."""


def make_app(settings: Settings) -> Celery:
    """Return the Celery app for ``settings``; it connects when it is first used."""
    app = Celery("attune_worker", include=["attune_worker.worker.tasks"])
    app.loader.override_backends = {"redis": RESULT_BACKEND, "rediss": RESULT_BACKEND}
    app.conf.update(_configuration(settings))
    app.events.dispatcher_cls = DISPATCHER
    app.steps["consumer"].add(LIVENESS)
    app.attune_settings = settings
    return app


def _configuration(settings: Settings) -> dict[str, Any]:
    return {
        "broker_url": settings.broker,
        "result_backend": settings.backend,
        **_transport(settings),
        **_DELIVERY,
        **_RESULTS,
        "broker_use_ssl": _checked_tls(settings.broker),
        "redis_backend_use_ssl": _checked_tls(settings.backend),
        "worker_disable_prefetch": not is_amqp(settings),  # only on Redis Celery can; see worker/consumer.py
        "result_expires": settings.retention_seconds,
        "worker_concurrency": settings.concurrency,
        "task_default_queue": settings.queue,
        "task_queues": [_queue(settings)],
        # In the middle: with none, tasks would be as urgent as can be.
        "task_default_priority": broker_priority(settings, Job.model_fields["priority"].default),
    }


def broker_priority(settings: Settings, priority: int) -> int:
    """Return a job's priority (0 is served first) as the broker counts: RabbitMQ serves the highest first."""
    return 9 - priority if is_amqp(settings) else priority


def is_amqp(settings: Settings) -> bool:
    """Whether the broker is RabbitMQ."""
    return settings.broker.startswith("amqp")


def _queue(settings: Settings) -> Queue:
    # A quorum queue is on several nodes' disks; RabbitMQ 4 has given up on the replicated classic ones.
    arguments = {"x-queue-type": "quorum"} if is_amqp(settings) else None
    return Queue(settings.queue, queue_arguments=arguments)  # type: ignore[no-untyped-call]


def _checked_tls(url: str) -> dict[str, Any] | None:
    """Return what makes Celery check the certificate of a server with TLS: it has to be told."""
    scheme = url.partition("://")[0]
    if scheme == "rediss":
        return {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    if scheme == "amqps":
        return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None}  # None: the one in the URL
    return None


def _transport(settings: Settings) -> dict[str, Any]:
    if is_amqp(settings):
        # No confirmation of each message: a wake-up that is lost is sent again, from the job's record.
        options: dict[str, Any] = {"read_timeout": AMQP_TIMEOUT_SECONDS, "write_timeout": AMQP_TIMEOUT_SECONDS}
    else:
        options = {
            "global_keyprefix": f"{settings.namespace}:celery:",
            "priority_steps": list(range(10)),
            # Kombu would note each message in Redis until it is acknowledged, at three round trips apiece.
            # A wake-up needs no such care: the job's record says whether it still has to run.
            "ack_emulation": False,
            "socket_timeout": settings.redis_timeout_seconds,
            "socket_connect_timeout": settings.redis_timeout_seconds,
            "socket_keepalive": True,
            # A connection whose other end has gone without a word is dropped after one to two of these and a second.
            "health_check_interval": 5,
        }
    return {
        "broker_transport_options": options,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 5,
        "broker_heartbeat": AMQP_HEARTBEAT_SECONDS,
        "broker_pool_limit": 20,
        "broker_pool_acquire_timeout": 5,
        "result_backend_transport_options": {"global_keyprefix": f"{settings.namespace}:celery:"},
    }


_DELIVERY: dict[str, Any] = {
    # Late acknowledgement runs a job twice whenever a connection drops; the record brings back what is lost.
    "task_acks_late": False,
    "task_reject_on_worker_lost": False,
    "task_publish_retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
    "task_inherit_parent_priority": True,
    # A misspelt queue name would otherwise create a queue that nobody drains.
    "task_create_missing_queues": False,
    # Jobs wait on the network, so threads; and none is held back by a worker whose threads are busy.
    "worker_pool": THREAD_POOL,
    "worker_consumer": CONSUMER,
    "worker_prefetch_multiplier": 1,
    "worker_enable_prefetch_count_reduction": False,
    "worker_disable_rate_limits": True,
    # A Redis that is a replica for a while, or full, refuses commands without closing the connection.
    "broker_channel_error_retry": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    # Flower and ``celery events`` switch task events on while they watch; nobody pays for them otherwise.
    "worker_send_task_events": False,
    "task_send_sent_event": False,
    "worker_hijack_root_logger": False,
    "worker_log_format": "[%(asctime)s: %(levelname)s/%(processName)s] %(name)s: %(message)s",
    "worker_redirect_stdouts": False,
    "accept_content": ["json"],
    "task_serializer": "json",
}

_RESULTS: dict[str, Any] = {
    # What is stored is the summary of worker/summary.py; the answer itself is read from the job's record.
    "result_serializer": "json",
    "result_accept_content": ["json"],
    "result_extended": False,
    "result_backend_thread_safe": True,
    "redis_socket_timeout": 15,
    "redis_socket_keepalive": True,
    "redis_backend_health_check_interval": 25,
}
