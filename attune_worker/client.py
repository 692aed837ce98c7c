"""How do callers submit jobs and read their results?

``Client`` blocks; ``AsyncClient``, which awaits, is laid over it. Importing this module loads
neither httpx nor provider code, so a web backend stays light and needs no provider keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Self

from celery import Celery
from pydantic import SecretStr

from attune_worker.app import make_app
from attune_worker.errors import InvalidJobError, JobNotFoundError, ServiceUnavailableError
from attune_worker.inbox import Inbox
from attune_worker.jobs import Job, JobResult, JobStatus
from attune_worker.results import Gathering, wait_for
from attune_worker.settings import Settings, get_settings
from attune_worker.store.connection import reaching
from attune_worker.store.records import Acceptance, Records
from attune_worker.submission import Submission
from attune_worker.telemetry.store import Telemetry
from attune_worker.wake_ups import BATCH, send_wake_ups

if TYPE_CHECKING:
    from attune_worker.models.estimation import Estimate, Estimator

DEFAULT_PRIORITY: int = Job.model_fields["priority"].default


class Client:
    """Submits jobs to the fleet and reads their results; safe for use from many threads, and across a fork.

    Every method raises ``ServiceUnavailableError`` when Redis or the broker cannot be reached.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or get_settings()
        self.records = Records(self.settings)
        self._submission = Submission(self.settings)
        self.inbox = Inbox(self.settings)
        self._telemetry = Telemetry(self.settings)

    def submit(self, task_type: str, prompt: str | None = None, **fields: Any) -> JobHandle:
        """Submit one job; ``fields`` are those of ``Job``, for instance ``messages`` instead of ``prompt``.

        Raises ``InvalidJobError`` for a job that cannot be accepted; then nothing is written. The
        same idempotency key gives the same job, and wakes it again if it still waits.
        """
        given = {"task_type": task_type, **fields}
        if prompt is not None:
            given["prompt"] = prompt
        return self.submit_many([given])[0]

    def submit_many(self, jobs: Iterable[Mapping[str, Any] | Job]) -> list[JobHandle]:
        """Submit jobs in few round trips, and return their handles in order.

        All are validated first: if one cannot be accepted, ``InvalidJobError`` names it by its index
        and nothing is written. ``IdempotencyConflictError`` names a key that already belongs to a
        different job; the other jobs are submitted all the same.
        """
        prepared = self._submission.prepare(list(jobs))
        job_ids = [job_id for job_id, _, _ in prepared]
        accepted: list[Acceptance] = []
        try:
            for start in range(0, len(prepared), BATCH):
                batch = prepared[start : start + BATCH]
                accepted += self.records.accept(batch)
                due = zip(batch, accepted[start:], strict=True)
                send_wake_ups(self._app, [(job_id, job.priority) for (job_id, job, _), told in due if told.wake])
        except ServiceUnavailableError as error:
            raise _advised(error, job_ids[: len(accepted)]) from error
        self._submission.refuse_conflicts(prepared, accepted)
        return [JobHandle(job_id, self) for job_id in job_ids]

    def wake(self, job_ids: Iterable[str]) -> None:
        """Send the wake-ups of jobs again, at the default priority, where one may have been lost.

        It does no harm: a job that has ended, or runs, is left alone.
        """
        send_wake_ups(self._app, [(job_id, DEFAULT_PRIORITY) for job_id in job_ids])

    def retry(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """Run jobs again that are dead, failed, expired or cancelled, as if they were new; return what they were.

        None for one that cannot be: it is under way, has succeeded, is unknown, or what was submitted is gone. What
        the earlier calls have cost stays in the ledger.
        """
        before = {job_id: self.records.retry(job_id) for job_id in job_ids}
        again = [job_id for job_id, status in before.items() if status is not None]
        backend = self.settings.model_copy(update={"redis_url": SecretStr(self.settings.backend)})
        with reaching(backend):
            for job_id in again:
                self._app.AsyncResult(job_id).forget()  # Celery would keep what it has
        self.wake(again)
        return before

    def check(self, job: Mapping[str, Any] | Job) -> Job:
        """Return the job, or raise ``InvalidJobError`` if it could not be submitted; writes nothing."""
        return self._submission.prepare([job])[0][1]

    def estimate(self, job: Mapping[str, Any] | Job | str, prompt: str | None = None, **fields: Any) -> Estimate:
        """Return what a job should cost with each model, and at most, before it is submitted; writes nothing.

        ``job`` is a ``Job``, its fields, or a task type, with prompt and fields as for ``submit``. Raises
        ``InvalidJobError`` as ``submit`` does. The first call loads prices and provider code.
        """
        if isinstance(job, str):
            job = {"task_type": job, **({} if prompt is None else {"prompt": prompt}), **fields}
        elif prompt is not None or fields:
            raise TypeError("estimate() takes a prompt and fields with a task type, not beside a whole job")
        return self._estimator.estimate(self.check(job))

    def get(self, job_id: str) -> JobHandle:
        """Return the handle of a job that was submitted before, here or elsewhere."""
        return JobHandle(job_id, self)

    def status(self, job_id: str) -> JobStatus:
        """Return where the job is now; ``unknown`` when there is no record of it."""
        return self.records.read([job_id])[0].status

    def result(self, job_id: str, timeout: float | None = None) -> JobResult:
        """Wait up to ``timeout`` seconds (None: for ever) until the job has ended, and return how.

        A job that failed, expired or was cancelled has a result too: its ``status`` says so. Raises
        ``ResultTimeoutError``, and ``JobNotFoundError`` for an unknown job.
        """
        return wait_for(self.records, self.inbox, job_id, timeout).to_result()

    def cancel(self, job_id: str) -> bool:
        """Cancel the job unless it has ended; return whether it is cancelled, or will be.

        One that runs is stopped by its worker within about a second: a call under way is cut off, though its provider
        may still charge for it. ``result`` then says what is known. Raises ``JobNotFoundError`` for an unknown job.
        """
        status = self.records.cancel(job_id)
        if status is JobStatus.UNKNOWN:
            raise JobNotFoundError(job_id)
        return status is JobStatus.CANCELLED

    def feedback(self, job_id: str, score: float) -> bool:
        """Say how good the job's answer was, from 0 (useless) to 1 (good); routing learns from it.

        Returns False when that had been said before: the first word stands. Raises ``InvalidJobError`` for any
        other score and for a job without an answer, ``JobNotFoundError`` for an unknown job.
        """
        found = self.records.read([job_id])[0].to_result()
        if not found.succeeded or not found.attempts or found.attempts[-1].call_id is None:
            raise InvalidJobError(f"job {job_id} is {found.status}: there is no answer to judge", field="job_id")
        try:
            return self._telemetry.feedback(found.attempts[-1].call_id, score)
        except JobNotFoundError:
            raise JobNotFoundError(job_id) from None

    def as_completed(self, handles: Iterable[JobHandle], timeout: float | None = None) -> Iterator[JobResult]:
        """Yield the results of jobs as they end.

        Raises ``ResultTimeoutError`` when none has ended for ``timeout`` seconds, and
        ``JobNotFoundError`` for an unknown job.
        """
        with self.gather() as gathering:
            gathering.add([handle.id for handle in handles])
            while gathering.waiting:
                for record in gathering.ended(timeout):
                    yield record.to_result()

    def gather(self) -> Gathering:
        """Return a context in which to wait for many jobs, adding more as others end."""
        return Gathering(self.records, self.inbox)

    def close(self) -> None:
        """Give connections back; the client can be used again."""
        self.inbox.close()
        self.records.close()
        self._telemetry.close()
        if "_estimator" in vars(self):
            self._estimator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _app(self) -> Celery:
        return make_app(self.settings)

    @cached_property
    def _estimator(self) -> Estimator:
        from attune_worker.models.estimation import Estimator

        return Estimator(self.settings)


class JobHandle:
    """One submitted job."""

    __slots__ = ("_client", "id")

    def __init__(self, job_id: str, client: Client) -> None:
        self.id = job_id
        self._client = client

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    def status(self) -> JobStatus:
        """As ``Client.status``."""
        return self._client.status(self.id)

    def result(self, timeout: float | None = None) -> JobResult:
        """As ``Client.result``."""
        return self._client.result(self.id, timeout)

    def cancel(self) -> bool:
        """As ``Client.cancel``."""
        return self._client.cancel(self.id)

    def feedback(self, score: float) -> bool:
        """As ``Client.feedback``."""
        return self._client.feedback(self.id, score)


def _advised(error: ServiceUnavailableError, job_ids: Sequence[str]) -> ServiceUnavailableError:
    """Return the error with the jobs that had been accepted, and with what to do about them."""
    advice = "; Client.wake(error.job_ids) sends the wake-ups of those that were accepted" if job_ids else ""
    return ServiceUnavailableError(f"{error.message}{advice}", url=error.url).with_jobs(job_ids)


@cache
def _default_client() -> Client:
    return Client()


def result(job_id: str, timeout: float | None = 60.0) -> JobResult:
    """Return the result of a job, content included, for instance in the next task of a Celery chain.

    Waits up to ``timeout`` seconds; raises as ``Client.result`` does.
    """
    return _default_client().result(job_id, timeout)
