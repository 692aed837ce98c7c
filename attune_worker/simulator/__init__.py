"""A provider that speaks the real wire formats, misbehaves on request, and keeps its own invoice.

    with Simulator(Profile(latency=FixedLatency(seconds=2))) as simulator:
        ...  # point a client at simulator.url (Anthropic) or simulator.openai_url (OpenAI)
        print(simulator.invoice()["total_usd"])

Where to look:

running     ``Simulator`` in a thread, ``serve`` as a process
server      routes, timers and connections (tornado)
service     what one request is answered with, without I/O
profile     how the provider behaves; latency, fates and rate say when, whether and how often
anthropic, openai, wire   the formats, and what they share
subscription  quota windows, and what callers are told of them
answers     what the model says, and the simulator's tokenizer
invoice     what was billed
"""

from attune_worker.simulator.answers import ModelAnswer, answer, count_prompt_tokens, count_tokens, prompt_digest
from attune_worker.simulator.fates import Fate, fate
from attune_worker.simulator.invoice import BilledCall, Invoice
from attune_worker.simulator.latency import FixedLatency, LlmperfLatency, LognormalLatency
from attune_worker.simulator.profile import (
    Behaviour,
    Errors,
    Fault,
    Price,
    Profile,
    RetryAfter,
    Subscription,
    Window,
)
from attune_worker.simulator.running import Simulator, serve

__all__ = [
    "Behaviour",
    "BilledCall",
    "Errors",
    "Fate",
    "Fault",
    "FixedLatency",
    "Invoice",
    "LlmperfLatency",
    "LognormalLatency",
    "ModelAnswer",
    "Price",
    "Profile",
    "RetryAfter",
    "Simulator",
    "Subscription",
    "Window",
    "answer",
    "count_prompt_tokens",
    "count_tokens",
    "fate",
    "prompt_digest",
    "serve",
]
