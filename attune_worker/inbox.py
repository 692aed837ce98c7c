"""How does a process hear that jobs have ended? By being told, on one channel for all that wait in it.

A client that begins to wait leaves the name of its channel with the job (WATCH); whatever ends the job
publishes the id there. One connection and one thread serve any number of waiting callers.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from uuid import uuid4

from redis.client import PubSub
from redis.exceptions import RedisClusterException, RedisError

from attune_worker.errors import ServiceUnavailableError
from attune_worker.settings import Settings
from attune_worker.store.connection import connect, reaching, subscription
from attune_worker.store.keys import inbox as inbox_channel

_LISTEN_SECONDS = 1.0
_RECONNECT_SECONDS = 0.2


class Inbox:
    """Whom to call when a job should be looked at again, and the channel that brings the news."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._listener: _Listener | None = None
        self._failures = 0
        self._failure: ServiceUnavailableError | None = None
        self._callbacks: dict[str, set[Callable[[], None]]] = defaultdict(set)
        self._make_locks()
        _inboxes.add(self)

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # around the callbacks; never held while waiting for the network
        self._opening = threading.Lock()

    def add(self, job_id: str, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, in the listening thread, whenever the job should be looked at again."""
        with self._lock:
            self._callbacks[job_id].add(callback)

    def remove(self, job_id: str, callback: Callable[[], None]) -> None:
        """Undo ``add``."""
        with self._lock:
            callbacks = self._callbacks.get(job_id, set())
            callbacks.discard(callback)
            if not callbacks:
                self._callbacks.pop(job_id, None)

    def ready(self) -> str:
        """Return the channel to leave with jobs, after seeing to it that somebody listens there.

        Raises ``ServiceUnavailableError`` when Redis is away. One caller at a time finds that out, at the cost of a
        timeout; those who waited for him hear the same.
        """
        failures = self._failures
        with self._opening:
            if self._listener is None or not self._listener.alive:
                if self._failure is not None and self._failures != failures:
                    raise self._failure.with_jobs(())  # one of their own: errors belong to threads
                earlier, self._listener = self._listener, self._opened()
                if earlier is not None:
                    self._tell(None)  # those who wait on its channel must name the new one
            return self._listener.channel

    def _opened(self) -> _Listener:
        try:
            return _Listener(self._settings, self._tell)
        except ServiceUnavailableError as error:
            self._failures += 1
            self._failure = error.with_jobs(())
            raise

    def close(self) -> None:
        """Stop listening. Whoever still waits looks again, and so opens a new channel."""
        with self._opening:
            if self._listener is not None:
                self._listener.closed.set()
        self._tell(None)

    def _tell(self, job_ids: Iterable[str] | None) -> None:
        """Have these jobs looked at again; None: all."""
        with self._lock:
            chosen = self._callbacks if job_ids is None else job_ids
            callbacks = [callback for job_id in list(chosen) for callback in self._callbacks.get(job_id, ())]
        for callback in callbacks:
            callback()

    def after_fork(self) -> None:
        """Forget, in a child process, what belongs to threads that only its parent has."""
        self._callbacks.clear()
        self._make_locks()


class _Listener:
    """A subscription and the thread that reads it."""

    def __init__(self, settings: Settings, tell: Callable[[Iterable[str] | None], None]) -> None:
        self.channel = inbox_channel(settings.namespace, uuid4().hex)
        self.closed = threading.Event()
        self._tell = tell
        self._process = os.getpid()
        self._redis = connect(settings, max_connections=2)
        with reaching(settings):
            self._pubsub = self._subscribed()
            if self._pubsub.get_message(timeout=settings.redis_timeout_seconds) is None:
                raise TimeoutError("no answer to SUBSCRIBE")
        self._thread = threading.Thread(target=self._listen, name="attune-inbox", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is here and listens: threads do not survive a fork."""
        return self._process == os.getpid() and self._thread.is_alive() and not self.closed.is_set()

    def _subscribed(self) -> PubSub:
        pubsub = subscription(self._redis)
        pubsub.subscribe(self.channel)
        return pubsub

    def _listen(self) -> None:
        while not self.closed.is_set():
            try:
                message = self._pubsub.get_message(timeout=_LISTEN_SECONDS)
            except (RedisError, OSError):
                self._subscribe_again()
                continue
            if message is None:
                continue
            if message["type"] == "subscribe":  # after a cut, during which messages may have been lost
                self._tell(None)
            else:
                self._tell([message["data"].decode(errors="surrogatepass")])
        self._pubsub.close()
        self._redis.close()

    def _subscribe_again(self) -> None:
        """Make a new subscription, of a cluster at a node that answers."""
        self._pubsub.close()
        while not self.closed.wait(_RECONNECT_SECONDS):
            try:
                self._pubsub = self._subscribed()
            except (RedisError, RedisClusterException, OSError):
                continue
            return


_inboxes: weakref.WeakSet[Inbox] = weakref.WeakSet()


def _after_fork() -> None:
    for inbox in _inboxes:
        inbox.after_fork()


os.register_at_fork(after_in_child=_after_fork)
