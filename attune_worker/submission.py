"""May this job be accepted, and under which id?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from attune_worker.errors import IdempotencyConflictError, InvalidJobError
from attune_worker.jobs import Job
from attune_worker.models.registry import Registry
from attune_worker.models.routing import check
from attune_worker.settings import Settings
from attune_worker.store.keys import idempotent_job_id, new_job_id
from attune_worker.store.records import Acceptance

Accepted = tuple[str, Job, str]
"""A job's id, the job, and its JSON."""


class Submission:
    """Validates jobs against the configured models; writes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def prepare(self, jobs: Sequence[Mapping[str, Any] | Job], job_id: str | None = None) -> list[Accepted]:
        """Return the jobs with their ids, or raise ``InvalidJobError`` for the first that cannot be accepted.

        ``job_id`` is the id of a job without an idempotency key (default: a random one).
        """
        return [self._prepare(fields, index if len(jobs) > 1 else None, job_id) for index, fields in enumerate(jobs)]

    def _prepare(self, fields: Mapping[str, Any] | Job, index: int | None, job_id: str | None) -> Accepted:
        try:
            job = fields if isinstance(fields, Job) else Job.parse(fields)
            text = job.to_json()
            check(job, self._registry, self._settings.default_max_tokens)
        except InvalidJobError as error:
            raise InvalidJobError(error.reason, field=error.field, index=index) from None
        if job.idempotency_key is not None:
            job_id = idempotent_job_id(self._settings.namespace, job.tenant, job.idempotency_key)
        return job_id or new_job_id(), job, text

    def refuse_conflicts(self, jobs: Sequence[Accepted], accepted: Sequence[Acceptance]) -> None:
        """Raise ``IdempotencyConflictError`` if a job's key already belongs to a different one."""
        conflicts = [index for index, acceptance in enumerate(accepted) if acceptance.conflict]
        if conflicts:
            first = jobs[conflicts[0]][1]
            raise IdempotencyConflictError(
                f"'idempotency_key': {first.idempotency_key!r} already belongs to a different job; "
                "use a new key for a new job",
                index=conflicts[0] if len(jobs) > 1 else None,
                conflicts=conflicts,
                job_ids=[job_id for job_id, _, _ in jobs],
            )

    @cached_property
    def _registry(self) -> Registry:
        return Registry.from_settings(self._settings)
