"""What does one call look like in each library? Run as a process of its own, so that none pays for another.

``python callers.py KIND`` writes the version of the library, then reads from standard input, line by line, how many
calls to make, and writes a line of JSON with the CPU and wall time that they took; CPU is that of the whole process,
its background threads included. The addresses come by the environment. Only the standard library is imported here,
so that litellm may run in an environment that holds little else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

MODELS = ("gpt-4o-mini", "gpt-4.1-nano")
"""A router has two to choose from; the simulator plays both. litellm has their prices, and looks those of models
that it does not know up again for every call."""

PROMPT = "word " * 100
MAX_TOKENS = 256
KEY = "a-key-of-the-benchmark"

Call = Callable[[], object]


def bare_httpx(environ: Mapping[str, str]) -> Call:
    """Return a call as one would write it by hand: a kept connection, JSON in, text out."""
    import httpx

    client = httpx.Client(timeout=60)
    url = f"{environ['PROVIDER_URL']}/v1/chat/completions"
    body = {"model": MODELS[0], "messages": [{"role": "user", "content": PROMPT}], "max_tokens": MAX_TOKENS}

    def call() -> object:
        response = client.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"})
        return response.raise_for_status().json()["choices"][0]["message"]["content"]

    return call


def attune_settings(environ: Mapping[str, str]) -> Any:
    """Return the settings of the executor: the defaults, one provider with two models, and one hard budget."""
    from attune_worker.settings import Settings

    prices = {"input_cost_per_million": "1", "output_cost_per_million": "5"}
    return Settings(
        redis_url=environ["REDIS_URL"],
        providers={"sim": {"kind": "openai", "base_url": f"{environ['PROVIDER_URL']}/v1", "api_key": KEY}},
        provider_order=["sim"],
        models=[{"id": name, "provider": "sim", "tier": "cheap", **prices} for name in MODELS],
        budgets=[{"per": "day", "limit_usd": "1000", "hard": True}],
    )


def attune_executor(environ: Mapping[str, str]) -> Call:
    """Return a call through routing, breaker, limits, a hard budget and telemetry, all shared through Redis."""
    from attune_worker import EmpathyLLMExecutor

    executor = EmpathyLLMExecutor(attune_settings(environ))
    return lambda: executor.run("summarize", PROMPT, max_tokens=MAX_TOKENS)


def litellm_router(environ: Mapping[str, str]) -> Call:
    """Return a call through litellm's Router, which shares latencies and cooldowns through Redis.

    ``completion`` starts an event loop for each call; ``acompletion`` on a kept loop takes about a tenth less CPU.
    """
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or the import asks the internet for prices
    import litellm
    from litellm import Router

    litellm.suppress_debug_info = True
    redis = urlsplit(environ["REDIS_URL"])
    deployments = [
        {
            "model_name": "sim",
            "litellm_params": {
                "model": f"openai/{name}",
                "api_base": f"{environ['PROVIDER_URL']}/v1",
                "api_key": KEY,
            },
        }
        for name in MODELS
    ]
    router = Router(
        model_list=deployments,
        redis_host=redis.hostname,
        redis_port=redis.port,
        redis_password=redis.password,
        routing_strategy="latency-based-routing",
    )
    messages = [{"role": "user", "content": PROMPT}]
    return lambda: router.completion(model="sim", messages=messages, max_tokens=MAX_TOKENS)


KINDS: Mapping[str, tuple[str, Callable[[Mapping[str, str]], Call]]] = {
    "httpx": ("httpx", bare_httpx),
    "attune": ("attune-worker", attune_executor),
    "litellm": ("litellm", litellm_router),
}
"""The package, and what makes a call with it."""


def _serve(kind: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    package, prepare = KINDS[kind]
    call = prepare(os.environ)
    print(version(package), file=answers, flush=True)
    for line in sys.stdin:
        calls = int(line)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            call()
        used = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        print(json.dumps(used), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
