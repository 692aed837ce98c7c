"""How many tokens is a line of code? What jobs that named their module's size have really used."""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

from attune_worker.errors import ServiceUnavailableError
from attune_worker.jobs import MAX_COUNT
from attune_worker.settings import Settings
from attune_worker.store.connection import RedisClient, ask, close_idle, connect, reaching
from attune_worker.store.keys import FleetKeys
from attune_worker.store.outage import Outage
from attune_worker.store.scripts import Script

logger = logging.getLogger(__name__)

LEARN_LINES = Script("learn_lines", "values")

ENOUGH_JOBS = 20
"""With fewer, one odd prompt would say what a line is."""

HALF_LIFE_JOBS = 500
"""After so many jobs one counts half: prompts change with the programs that write them."""

MAX_TOKENS_PER_LINE = 1000
"""A job with more said little of its prompt's size: a module of three lines under a long instruction."""

MIN_TOKENS_PER_LINE = 1
"""A job with fewer was not about the whole module: it sent a part, or its size is wrong, and one absurd size would say
for thousands of jobs what a line is."""

READ_EVERY_SECONDS = 5.0


class Learned(NamedTuple):
    """Tokens of the prompt for each line, and how many jobs have been counted."""

    tokens_per_line: float
    jobs: int


class LearnedLines:
    """What the fleet of one namespace has learned. Threads may share it; nothing is sent until it is used."""

    def __init__(self, settings: Settings, redis: RedisClient | None = None) -> None:
        self._settings = settings
        self._key = FleetKeys(settings.namespace).auth_lines
        self._redis = redis
        self._outage = Outage()
        self._reading = threading.Lock()
        self._latest: Learned | None = None
        self._read_at = 0.0

    def learn(self, module_lines: int | None, input_tokens: int | None) -> bool:
        """Count a job's prompt of ``input_tokens`` about a module of so many lines; True when it was counted.

        Raises neither because of what a job says nor because Redis is away: to know of one job less does no harm.
        """
        if not module_lines or not input_tokens or not _plausible(module_lines, input_tokens):
            return False
        if not self._outage.worth_trying():
            return False
        try:
            with reaching(self._settings):
                LEARN_LINES(self._connected(), (self._key,), (module_lines, input_tokens, HALF_LIFE_JOBS))
        except ServiceUnavailableError as error:
            self._away(error)
            return False
        self._outage.succeeded()
        return True

    def read(self) -> Learned | None:
        """Return what has been learned from any number of jobs; None: nothing.

        Raises ``ServiceUnavailableError`` when Redis is away.
        """
        with reaching(self._settings):
            answer = ask(self._connected(), ("HMGET", self._key, "lines", "tokens", "jobs"))
        lines, tokens, jobs = map(_number, answer)
        if not (lines and tokens and jobs) or not MIN_TOKENS_PER_LINE <= tokens / lines <= MAX_TOKENS_PER_LINE:
            return None
        return Learned(tokens / lines, int(jobs))

    def latest(self) -> Learned | None:
        """Return what was learned from enough jobs, at most some seconds ago; None: too little, or Redis is away."""
        if time.monotonic() >= self._read_at and self._reading.acquire(blocking=False):
            try:
                if self._outage.worth_trying():
                    self._latest = self.read()
                    self._outage.succeeded()
            except ServiceUnavailableError as error:
                self._away(error)
            finally:
                self._read_at = time.monotonic() + READ_EVERY_SECONDS
                self._reading.release()
        found = self._latest
        return found if found is not None and found.jobs >= ENOUGH_JOBS else None

    def close(self) -> None:
        """Give the connections back."""
        if self._redis is not None:
            close_idle(self._redis)

    def _connected(self) -> RedisClient:
        self._redis = self._redis or connect(self._settings)
        return self._redis

    def _away(self, error: ServiceUnavailableError) -> None:
        if self._outage.failed(error):
            logger.warning("tokens of a line of code are not learned for now: %s", error)


def _plausible(module_lines: int, input_tokens: int) -> bool:
    if not (0 < module_lines <= MAX_COUNT and 0 < input_tokens <= MAX_COUNT):
        return False
    return MIN_TOKENS_PER_LINE <= input_tokens / module_lines <= MAX_TOKENS_PER_LINE


def _number(raw: bytes | None) -> float | None:
    """Read a number that anybody may have written; None: it is none that could be meant."""
    try:
        found = float(raw or b"")
    except ValueError:
        return None
    return found if 0 < found < float("inf") else None
