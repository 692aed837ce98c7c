"""How do callers on an event loop submit jobs and read their results?

What ``Client`` does, in a few threads; only the waiting for results, and for a thread, is the loop's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from attune_worker.client import Client
from attune_worker.jobs import Job, JobResult, JobStatus
from attune_worker.line import Line
from attune_worker.results import await_for
from attune_worker.settings import Settings

if TYPE_CHECKING:
    from attune_worker.models.estimation import Estimate


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited, and as many waiting callers as you like.

    While Redis or the broker is away, no call waits for a thread longer than ``redis_timeout_seconds``: it raises
    ``ServiceUnavailableError``, and nothing of it is sent afterwards.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._client = Client(settings)
        self._asking = Line(self._client.settings, "attune-client")
        self._sending = Line(self._client.settings, "attune-client-sends")  # by a broker that may be elsewhere

    async def submit(self, task_type: str, prompt: str | None = None, **fields: Any) -> AsyncJobHandle:
        """As ``Client.submit``."""
        handle = await self._sending.call(lambda: self._client.submit(task_type, prompt, **fields))
        return AsyncJobHandle(handle.id, self)

    async def submit_many(self, jobs: Iterable[Mapping[str, Any] | Job]) -> list[AsyncJobHandle]:
        """As ``Client.submit_many``."""
        handles = await self._sending.call(lambda: self._client.submit_many(jobs))
        return [AsyncJobHandle(handle.id, self) for handle in handles]

    async def estimate(self, job: Mapping[str, Any] | Job | str, prompt: str | None = None, **fields: Any) -> Estimate:
        """As ``Client.estimate``."""
        return await self._asking.call(lambda: self._client.estimate(job, prompt, **fields))

    async def get(self, job_id: str) -> AsyncJobHandle:
        """As ``Client.get``."""
        return AsyncJobHandle(job_id, self)

    async def status(self, job_id: str) -> JobStatus:
        """As ``Client.status``."""
        return await self._asking.call(lambda: self._client.status(job_id))

    async def result(self, job_id: str, timeout: float | None = None) -> JobResult:
        """As ``Client.result``."""
        record = await await_for(self._client.records, self._client.inbox, job_id, timeout, self._asking.call)
        return record.to_result()

    async def cancel(self, job_id: str) -> bool:
        """As ``Client.cancel``."""
        return await self._asking.call(lambda: self._client.cancel(job_id))

    async def feedback(self, job_id: str, score: float) -> bool:
        """As ``Client.feedback``."""
        return await self._asking.call(lambda: self._client.feedback(job_id, score))

    async def wake(self, job_ids: Iterable[str]) -> None:
        """As ``Client.wake``."""
        await self._sending.call(lambda: self._client.wake(job_ids))

    async def retry(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """As ``Client.retry``."""
        return await self._sending.call(lambda: self._client.retry(job_ids))

    async def as_completed(
        self, handles: Iterable[AsyncJobHandle], timeout: float | None = None
    ) -> AsyncIterator[JobResult]:
        """Yield the results of jobs as they end; ``timeout`` seconds are for all of them together."""
        waiting = [asyncio.ensure_future(handle.result(timeout)) for handle in handles]
        try:
            for ended in asyncio.as_completed(waiting):
                yield await ended
        finally:
            for one in waiting:
                one.cancel()  # also those that have failed: asyncio would log errors at which nobody has looked

    async def close(self) -> None:
        """Give connections and threads back."""
        await asyncio.to_thread(self._client.close)
        self._asking.close()
        self._sending.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncJobHandle:
    """One submitted job, awaited."""

    __slots__ = ("_client", "id")

    def __init__(self, job_id: str, client: AsyncClient) -> None:
        self.id = job_id
        self._client = client

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r})"

    async def status(self) -> JobStatus:
        """As ``Client.status``."""
        return await self._client.status(self.id)

    async def result(self, timeout: float | None = None) -> JobResult:
        """As ``Client.result``."""
        return await self._client.result(self.id, timeout)

    async def cancel(self) -> bool:
        """As ``Client.cancel``."""
        return await self._client.cancel(self.id)

    async def feedback(self, score: float) -> bool:
        """As ``Client.feedback``."""
        return await self._client.feedback(self.id, score)
