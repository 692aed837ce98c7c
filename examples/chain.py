"""A Celery chain: a job for a model, then a task of your own that reads the answer.

celery --workdir examples -A chain worker       (all workers of this queue, so that each knows both tasks)
python examples/chain.py "Some text."
"""

import sys

from celery import chain
from celery.result import AsyncResult

from attune_worker import result
from attune_worker.celery import app
from attune_worker.worker.tasks import submit_job


@app.task(name="chain.publish")  # type: ignore[untyped-decorator]
def publish(summary: dict[str, str]) -> str:
    """Use the answer. What comes down the chain is the job's summary; the answer is read by its id.

    What a task returns is shown in Flower and in the logs, so this one does not return the answer either.
    """
    answer = result(summary["job_id"])
    if not answer.succeeded:
        raise RuntimeError(f"job {answer.job_id} ended as {answer.status}")
    return f"published {len(answer.content or '')} characters by {answer.model_id}"


def summarize_and_publish(text: str) -> AsyncResult:
    """Start the chain and return at once."""
    job = {"task_type": "summarize", "prompt": text}
    return chain(submit_job.s(job), publish.s()).apply_async()


if __name__ == "__main__":
    print(summarize_and_publish(sys.argv[1]).get(timeout=60))  # noqa: T201
