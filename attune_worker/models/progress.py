"""How far has one start of a job come, how long may it go on, and how does it end without an answer?"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from attune_worker.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    ExecutionError,
    NotNowError,
    ProviderError,
    StoppedError,
)
from attune_worker.jobs import Attempt, Job
from attune_worker.models.calls import Permit, Refusal
from attune_worker.models.effects import Reply, Wait
from attune_worker.models.policy import Failure, NextCall
from attune_worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a job.

    ``attempts`` were made in earlier starts. ``timeout_seconds`` is left until the job's deadline (None: it has
    none). With ``patience_seconds`` a longer wait ends the start with ``NotNowError``, as does one that would leave
    too little of the start for a call; without, the flow waits as long as its time allows. ``lease``: see ``Request``.
    """

    job: Job
    job_id: str = ""
    timeout_seconds: float | None = None
    attempts: tuple[Attempt, ...] = ()
    patience_seconds: float | None = None
    lease: str = ""


class Progress:
    """How one start stands, from now on.

    ``attempts`` are all calls of the job, ``failures`` those of them that did not answer, and ``spent_usd`` is what
    they cost, at worst where that is not known. The methods that end the start give the attempts to the error.
    """

    def __init__(self, start: Start, failures: Sequence[Failure], spent_usd: Decimal, settings: Settings) -> None:
        """``failures`` and ``spent_usd`` are those of earlier starts."""
        self.start = start
        self.attempts = list(start.attempts)
        self.failures = list(failures)
        self.spent_usd = spent_usd
        now = time.monotonic()
        self._deadline = math.inf if start.timeout_seconds is None else now + start.timeout_seconds
        self._ends = min(self._deadline, now + settings.timeout_seconds)
        self._pauses_until = self._ends - self._kept_for_a_call(settings)
        self._held_up: str | None = "the time for this start was up before a call"  # None: a call was what took it up

    @property
    def seconds_left(self) -> float:
        """How long this start may go on."""
        return self._ends - time.monotonic()

    @property
    def next_call_by(self) -> float:
        """Until when, by the monotonic clock, it makes sense to call again: in this start, or in one that follows."""
        return self._ends if self.start.patience_seconds is None else self._deadline

    def wait_for(self, step: NextCall) -> Generator[Wait, Reply, None]:
        """Wait until the next call may be made, or raise how the start ends whose time is up before it."""
        if step.wait_seconds > 0 and self.seconds_left > 0:
            yield from self._pause(step.wait_seconds, f"{step.model.ref} failed before")
        if self.seconds_left <= 0:
            raise self._time_up()

    def put_off(self, refusal: Refusal) -> Generator[Wait, Reply, None]:
        """Wait as long as there is no leave for a call, or raise ``BudgetExceededError`` where money is missing."""
        if refusal.for_budget:
            retry_after = refusal.retry_after_seconds or None
            raise BudgetExceededError(refusal.reason, attempts=self.attempts, retry_after=retry_after)
        yield from self._pause(refusal.retry_after_seconds, refusal.reason)

    def called(self, attempt: Attempt | None) -> None:
        """Note a call; None: there was leave for it, and it was not made after all."""
        self._held_up = None
        if attempt is not None:
            self.attempts.append(attempt)

    def failed(self, permit: Permit, error: ProviderError, spent_usd: Decimal) -> None:
        """Note how the last call failed, and what it cost at worst."""
        self.failures.append(Failure(permit.model, error, time.monotonic(), credential=permit.credential.name))
        self.spent_usd += spent_usd

    def go_on_unless_stopped(self, reply: object) -> None:
        """Raise what was replied if it is that the job is stopped."""
        if isinstance(reply, StoppedError):
            reply.attempts = tuple(self.attempts)
            raise reply

    def given_up(self) -> ExecutionError:
        """Return how a start ends after which no call makes sense any more."""
        if not self.failures:
            return self.routed_before()
        last = self.failures[-1].error
        if time.monotonic() < self.next_call_by or not last.retryable:
            last.attempts = tuple(self.attempts)
            return last
        return self._too_late()

    def routed_before(self) -> NotNowError:
        """Return how a start ends that has no way to call any model, though there was one when they were ranked."""
        return NotNowError("the auth strategy has changed since the job was routed", attempts=self.attempts)

    def _kept_for_a_call(self, settings: Settings) -> float:
        """Return the last seconds into which no wait may go: a worker's job comes again rather than have too little."""
        if self.start.patience_seconds is None or self._ends == self._deadline:
            return 0.0
        return min(settings.http.request_timeout_seconds, settings.timeout_seconds / 2)

    def _pause(self, seconds: float, reason: str) -> Generator[Wait, Reply, None]:
        """Wait, or raise ``NotNowError`` or ``DeadlineExceededError`` where that would take too long."""
        self._held_up = reason
        if seconds <= 0:
            return
        too_long = seconds >= self._pauses_until - time.monotonic()
        patience_seconds = self.start.patience_seconds
        if patience_seconds is not None and (too_long or seconds > patience_seconds):
            raise NotNowError(reason, attempts=self.attempts, retry_after=seconds)
        if too_long:
            raise DeadlineExceededError(
                f"no answer can come in the time for this job: {reason}; earliest in {seconds:.1f} s",
                attempts=self.attempts,
                retry_after=seconds,
            )
        self.go_on_unless_stopped((yield Wait(seconds)))

    def _time_up(self) -> ExecutionError:
        """Return how a start ends whose time is up: a worker's job that was only held up comes again, if it can."""
        if self.start.patience_seconds is not None and self._held_up is not None and time.monotonic() < self._deadline:
            return NotNowError(self._held_up, attempts=self.attempts)
        return self._too_late()

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError("the time for this job was up before an answer came", attempts=self.attempts)
