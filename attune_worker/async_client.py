"""How do callers on an event loop submit jobs and read their results?

What ``Client`` does, in a few threads; only the waiting for results is the loop's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

from attune_worker.client import Client
from attune_worker.jobs import Job, JobResult, JobStatus
from attune_worker.results import await_for
from attune_worker.settings import Settings

if TYPE_CHECKING:
    from attune_worker.models.estimation import Estimate

T = TypeVar("T")

ASYNC_THREADS = 8
"""Threads in which an ``AsyncClient`` does its short round trips; waiting for results takes none."""


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited, and as many waiting callers as you like."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._client = Client(settings)
        self._threads = ThreadPoolExecutor(ASYNC_THREADS, thread_name_prefix="attune-client")

    async def submit(self, task_type: str, prompt: str | None = None, **fields: Any) -> AsyncJobHandle:
        """As ``Client.submit``."""
        handle = await self._call(lambda: self._client.submit(task_type, prompt, **fields))
        return AsyncJobHandle(handle.id, self)

    async def submit_many(self, jobs: Iterable[Mapping[str, Any] | Job]) -> list[AsyncJobHandle]:
        """As ``Client.submit_many``."""
        handles = await self._call(lambda: self._client.submit_many(jobs))
        return [AsyncJobHandle(handle.id, self) for handle in handles]

    async def estimate(self, job: Mapping[str, Any] | Job | str, prompt: str | None = None, **fields: Any) -> Estimate:
        """As ``Client.estimate``."""
        return await self._call(lambda: self._client.estimate(job, prompt, **fields))

    async def get(self, job_id: str) -> AsyncJobHandle:
        """As ``Client.get``."""
        return AsyncJobHandle(job_id, self)

    async def status(self, job_id: str) -> JobStatus:
        """As ``Client.status``."""
        return await self._call(lambda: self._client.status(job_id))

    async def result(self, job_id: str, timeout: float | None = None) -> JobResult:
        """As ``Client.result``."""
        record = await await_for(self._client.records, self._client.inbox, job_id, timeout, self._call)
        return record.to_result()

    async def cancel(self, job_id: str) -> bool:
        """As ``Client.cancel``."""
        return await self._call(lambda: self._client.cancel(job_id))

    async def feedback(self, job_id: str, score: float) -> bool:
        """As ``Client.feedback``."""
        return await self._call(lambda: self._client.feedback(job_id, score))

    async def wake(self, job_ids: Iterable[str]) -> None:
        """As ``Client.wake``."""
        await self._call(lambda: self._client.wake(job_ids))

    async def retry(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """As ``Client.retry``."""
        return await self._call(lambda: self._client.retry(job_ids))

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
                one.cancel()

    async def close(self) -> None:
        """Give connections and threads back."""
        await self._call(self._client.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


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
