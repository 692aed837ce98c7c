"""Routing that learns from your verdict: each answer is judged, and the jobs after it go by that.

python examples/feedback.py 200                 (beside it: attune-worker worker)
attune-worker routing explain orders extract    (what was learned)
"""

import sys
from collections import Counter

from attune_worker import Client

WORKFLOW, STAGE = "orders", "extract"
BATCH = 20


def complaint(order: int) -> str:
    """Return the text of a customer."""
    return f"Order {order} has not arrived. It was due on Monday. Please have a look."


def verdict(answer: str, order: int) -> float:
    """Return how good an answer is, 0 to 1: a test run, a schema, a user's thumb, whatever can tell."""
    return 1.0 if str(order) in answer else 0.0


def ask(client: Client, orders: range) -> Counter[str]:
    """Have a batch of complaints answered and judge the answers; return how many each model gave."""
    jobs = [
        {"task_type": "write_reply", "prompt": complaint(order), "workflow": WORKFLOW, "stage": STAGE}
        for order in orders
    ]
    handles = client.submit_many(jobs)
    order_of = {handle.id: order for handle, order in zip(handles, orders, strict=True)}
    asked: Counter[str] = Counter()
    for result in client.as_completed(handles, timeout=120):
        if result.succeeded:
            client.feedback(result.job_id, verdict(result.content or "", order_of[result.job_id]))
            asked[f"{result.provider}/{result.model_id}"] += 1
    return asked


if __name__ == "__main__":
    count = int(sys.argv[1])
    with Client() as client:
        for first in range(0, count, BATCH):
            answered = ask(client, range(10_000 + first, 10_000 + min(first + BATCH, count)))
            print(first, ", ".join(f"{model}: {calls}" for model, calls in answered.most_common()))  # noqa: T201
