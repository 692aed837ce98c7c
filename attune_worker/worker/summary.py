"""What may everyone who watches Celery see of an ended job? No prompt, no answer, no error text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attune_worker.jobs import JobResult


@dataclass(frozen=True, slots=True, repr=False)
class Summary:
    """The Celery return value of a job.

    Its repr is the one line that logs, events and Flower show; in the result backend it is the JSON
    object that ``to_json`` returns (kombu calls ``__json__``).
    """

    result: JobResult

    def __repr__(self) -> str:
        result = self.result
        words = [result.status.value]
        if result.model_id is not None:
            words += [result.model_id, self._money]
        if result.error is not None:
            words.append(result.error.type)
        if result.latency_ms is not None:
            words.append(_duration(result.latency_ms))
        return " ".join(words)

    @property
    def _money(self) -> str:
        if self.result.cost_usd is None:
            return "$?"
        known = all(attempt.cost_usd is not None for attempt in self.result.attempts)
        return f"{'' if known else '≥'}${self.result.cost_usd.normalize():f}"

    def to_json(self) -> dict[str, Any]:
        """Return the summary as a JSON object; ``attempts`` is their number, ``cost_usd`` a decimal string."""
        result = self.result
        return {
            "job_id": result.job_id,
            "status": result.status.value,
            "model_id": result.model_id,
            "provider": result.provider,
            "tier": result.tier,
            "cost_usd": None if result.cost_usd is None else format(result.cost_usd, "f"),
            "latency_ms": result.latency_ms,
            "queue_ms": result.queue_ms,
            "attempts": len(result.attempts),
            "error_type": result.error.type if result.error else None,
        }

    __json__ = to_json


def _duration(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.1f} s" if milliseconds >= 1000 else f"{milliseconds} ms"
