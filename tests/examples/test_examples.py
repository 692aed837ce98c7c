from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from attune_worker import Settings
from attune_worker.models.price_list import get_pricing
from attune_worker.models.registry import Registry
from attune_worker.simulator import FixedLatency, Profile, answer
from attune_worker.store.embedded import free_port
from tests.conftest import answer_now
from tests.examples.stack import EXAMPLES, PATIENCE_SECONDS, ROOT, Stack, eventually, running_stack

SYSTEM = "Summarize the text in two sentences."


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis, a simulated provider, and a worker that takes jobs."""
    with running_stack(tmp_path_factory.mktemp("examples")) as stack, stack.worker():
        yield stack


@pytest.fixture
def slow_provider(stack: Stack) -> Iterator[None]:
    """A provider that takes its time, until it is told to answer."""
    stack.simulator.profile = Profile(latency=FixedLatency(seconds=PATIENCE_SECONDS))
    yield
    stack.simulator.profile = Profile()


def text(number: int) -> str:
    """Return a text of which there is only one."""
    return f"Report {number} is in. It holds {number * 7} lines. Nobody has read it yet."


def is_answer_to(question: str, body: dict[str, str]) -> bool:
    """Whether the body holds what the simulated model says to this question, and to no other."""
    return body["content"] == answer(body["model_id"], SYSTEM, [("user", question)]).text


@contextmanager
def serving(stack: Stack, name: str, command: list[str], **environ: str) -> Iterator[str]:
    """Run a web server, and give its URL once it answers."""
    port = free_port()
    with stack.program(name, [part.format(port=port) for part in command], **environ) as log:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/jobs/none").status_code == 404
            except httpx.TransportError:
                return False

        eventually(answers, f"{name} answers; its log: {log}")
        yield url


def fastapi(stack: Stack, **environ: str) -> AbstractContextManager[str]:
    """Run the FastAPI example."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", "examples", "fastapi_app:app", "--port", "{port}"]
    return serving(stack, "fastapi", command, **environ)


def django(stack: Stack) -> AbstractContextManager[str]:
    """Run the Django example."""
    command = [sys.executable, "examples/django_app.py", "runserver", "--noreload", "127.0.0.1:{port}"]
    return serving(stack, "django", command)


class TestFastApi:
    """``examples/fastapi_app.py`` under uvicorn."""

    def test_two_hundred_callers_at_once_each_get_their_own_answer(self, stack):
        """Every caller gets the answer to its own question, and the costs add up to the provider's invoice."""
        stack.simulator.reset()

        async def ask_all(url: str) -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE_SECONDS) as http:
                calls = (http.post("/summarize", json={"text": text(number)}) for number in range(200))
                return await asyncio.gather(*calls)

        with fastapi(stack) as url:
            responses = asyncio.run(ask_all(url))

        assert {response.status_code for response in responses} == {200}
        assert all(is_answer_to(text(number), response.json()) for number, response in enumerate(responses))
        paid = sum(Decimal(response.json()["cost_usd"]) for response in responses)
        assert paid == Decimal(stack.simulator.invoice(summary=True)["total_usd"]) > 0

    def test_a_slow_job_is_answered_with_its_id_and_read_later(self, stack, slow_provider):
        """A job that outlasts the caller's patience goes on, and its answer is found under its id."""
        with fastapi(stack, WAIT_SECONDS="0.1") as url:
            accepted = httpx.post(f"{url}/summarize", json={"text": text(1)}, timeout=PATIENCE_SECONDS)
            assert accepted.status_code == 202
            eventually(lambda: stack.simulator.requests()["in_flight"], "the job is called for")
            answer_now(stack.simulator)
            job = f"{url}/jobs/{accepted.json()['job_id']}"

            def ended() -> httpx.Response | None:
                response = httpx.get(job, timeout=PATIENCE_SECONDS)
                return response if response.status_code != 202 else None

            response = eventually(ended, "the job has ended")
        assert response.status_code == 200
        assert is_answer_to(text(1), response.json())

    def test_bad_input_and_unknown_jobs_are_refused_in_one_line(self, stack):
        """Callers learn what is wrong with their request, by status and by message."""
        with fastapi(stack) as url:
            empty = httpx.post(f"{url}/summarize", json={"text": "  "}, timeout=PATIENCE_SECONDS)
            unknown = httpx.get(f"{url}/jobs/nobody", timeout=PATIENCE_SECONDS)
        assert (empty.status_code, unknown.status_code) == (422, 404)
        assert "prompt" in empty.json()["error"]
        assert "nobody" in unknown.json()["error"]


class TestDjango:
    """``examples/django_app.py`` under Django's own server."""

    def test_concurrent_callers_each_get_their_own_answer(self, stack):
        """The blocking client serves the threads of one Django process."""
        with django(stack) as url, ThreadPoolExecutor(20) as pool:
            asked = [
                pool.submit(httpx.post, f"{url}/summarize", json={"text": text(n)}, timeout=PATIENCE_SECONDS)
                for n in range(40)
            ]
            responses = [call.result() for call in asked]
        assert {response.status_code for response in responses} == {200}
        assert all(is_answer_to(text(number), response.json()) for number, response in enumerate(responses))

    def test_bad_input_and_unknown_jobs_are_refused_in_one_line(self, stack):
        """Callers learn what is wrong with their request, by status and by message."""
        with django(stack) as url:
            statuses = [
                httpx.post(f"{url}/summarize", content=body, timeout=PATIENCE_SECONDS).status_code
                for body in ('{"text": " "}', '{"text": 1}', "{}", "[]", "no JSON")
            ]
            unknown = httpx.get(f"{url}/jobs/nobody", timeout=PATIENCE_SECONDS)
        assert statuses == [422, 422, 400, 400, 400]
        assert unknown.status_code == 404


def test_a_chain_hands_the_answer_to_the_next_task(stack):
    """The next task of a chain reads the content by the job's id, and the chain's result is the next task's."""
    question = text(3)
    celery = [sys.executable, "-m", "celery", "--workdir", "examples", "-A", "chain", "worker", "--loglevel", "info"]
    own = {"ATTUNE_NAMESPACE": "chain"}
    with stack.program("chain", celery, **own) as log:
        eventually(lambda: " ready." in log.read_text(), f"the worker takes jobs; its log: {log}")
        command = [sys.executable, "examples/chain.py", question]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**stack.environ, **own},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_SECONDS,
            check=True,
        )
    model = done.stdout.split()[-1]
    content = answer(model, "", [("user", question)]).text
    assert done.stdout.strip() == f"published {len(content)} characters by {model}"
    assert question not in log.read_text()
    assert content not in log.read_text()


def test_the_sample_file_runs(stack, tmp_path):
    """Every line of the sample is a job, and every job has its answer in the results."""
    output = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "attune_worker", "run", str(EXAMPLES / "jobs.jsonl"), "-o", str(output)]
    subprocess.run(
        command, cwd=tmp_path, env=stack.environ, stderr=subprocess.PIPE, timeout=2 * PATIENCE_SECONDS, check=True
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == len((EXAMPLES / "jobs.jsonl").read_text().splitlines())
    assert {line["status"] for line in lines} == {"succeeded"}
    assert {line["tier"] for line in lines} == {"cheap", "capable", "premium"}


@pytest.mark.parametrize("file", sorted((EXAMPLES / "config").glob("*.toml")), ids=lambda file: file.stem)
def test_every_configuration_example_has_usable_models_with_prices(file: Path):
    """What an example configures comes first, and nothing it configures would run at an unknown cost."""
    settings = Settings.load(file, {})
    first = settings.provider_order[0]
    models = [model for model in Registry.from_settings(settings).all() if model.provider == first]
    assert models
    assert all(get_pricing(model) is not None for model in models)
