from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from attune_worker.models.executor import EmpathyLLMExecutor
from attune_worker.settings import Settings

JOB = ("--task-type", "summarize", "--workflow", "w")
PROMPT = "word " * 200


@pytest.fixture
def learned(settings: Settings) -> str:
    """Six calls of one model, all alike; what one of them cost."""
    with EmpathyLLMExecutor(settings) as executor:
        answers = [executor.run("summarize", PROMPT, model="claude-haiku-5-5", workflow="w") for _ in range(6)]
    return f"{answers[-1].cost_usd:f}"


def test_one_job_is_estimated_with_each_model(invoke, learned):
    """The table has what the JSON has, and both what a call like it really cost."""
    told = json.loads(invoke("costs", "estimate", *JOB, "--prompt", PROMPT, "--json").stdout)
    assert told["expected_usd"] == learned
    first, *_ = told["candidates"]
    assert (first["model_id"], first["learned_calls"], first["serves"]) == ("claude-haiku-5-5", 6, True)
    assert first["lately"]["calls"] == 6
    assert Decimal(told["worst_usd"]) > Decimal(told["expected_usd"])
    shown = invoke("costs", "estimate", *JOB, "--prompt", PROMPT).stdout
    assert learned in shown
    assert "learned from 6 calls of this model in this stage" in shown
    assert "may not serve: google: has no API key (set GEMINI_API_KEY) (5 models)" in shown


def test_the_prompt_comes_from_a_file_or_standard_input(invoke, tmp_path):
    """Its bytes are what counts."""
    file = tmp_path / "prompt.txt"
    file.write_text("ä" * 500)
    asked = ("costs", "estimate", *JOB, "--json", "--file")
    assert json.loads(invoke(*asked, str(file)).stdout)["candidates"][0]["input_tokens"] == 250
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in invoke(*asked, str(file), code=2).output


def test_wishes_change_the_estimate(invoke):
    """As they would change the job."""
    asked = ("costs", "estimate", *JOB, "--prompt", "?", "--json")
    told = json.loads(invoke(*asked, "--tier", "premium", "--provider", "openai", "--max-tokens", "10").stdout)
    first = told["candidates"][0]
    assert (first["provider"], first["tier"], first["most_output_tokens"]) == ("openai", "premium", 10)
    assert first["output_tokens"] == 10
    pinned = json.loads(invoke(*asked, "--model", "gpt-6-luna").stdout)
    assert [one["model_id"] for one in pinned["candidates"]] == ["gpt-6-luna"]


TEAM = json.dumps([{"name": "team", "mode": "subscription", "secret": "token-hush"}])


@pytest.mark.parametrize(("lines", "mode"), [("1999", "subscription"), ("2000", "api")])
def test_mode_of_a_job_is_told_with_what_decided(invoke, tmp_path, lines, mode):
    """As the auth strategy recommends for its size; by subscription it costs nothing, and the price is beside it."""
    asked = ("costs", "estimate", *JOB, "--prompt", PROMPT, "--module-lines", lines)
    fleet = {"PROVIDERS__ANTHROPIC__CREDENTIALS": TEAM, "AUTH__FILE": tmp_path / "auth.json"}
    told = json.loads(invoke(*asked, "--json", **fleet).stdout)
    first = told["candidates"][0]
    assert (first["provider"], first["mode"], first["spills"]) == ("anthropic", mode, False)
    assert Decimal(first["expected_usd"]) > 0
    assert (Decimal(told["expected_usd"]) > 0) == (Decimal(told["worst_usd"]) > 0) == (mode == "api")
    shown = invoke(*asked, **fleet).stdout
    assert f"it goes by {mode}: the strategy recommends" in shown
    assert "medium_module_threshold (2000)" in shown
    assert "hush" not in shown
    other = "api" if mode == "subscription" else "subscription"
    own = json.loads(invoke(*asked, "--auth-mode", other, "--json", **fleet).stdout)["candidates"][0]
    assert (own["mode"], own["mode_why"].startswith("the job asks for")) == (other, True)


def test_jobs_of_a_file_that_go_by_subscription_are_summed_in_tokens(invoke, tmp_path):
    """And in no amount of money."""
    file = tmp_path / "jobs.jsonl"
    jobs = [{"task_type": "summarize", "prompt": PROMPT, "module_lines": lines} for lines in (10, 499, 2000)]
    file.write_text("\n".join(map(json.dumps, jobs)))
    fleet = {"PROVIDERS__ANTHROPIC__CREDENTIALS": TEAM, "AUTH__FILE": tmp_path / "auth.json"}
    total = json.loads(invoke("costs", "estimate", "--jobs", str(file), "--json", **fleet).stdout)["total"]
    assert (total["jobs"], total["subscription_jobs"]) == (3, 2)
    assert total["quota_tokens"] == (total["input_tokens"] + total["output_tokens"]) * 2 / 3
    shown = invoke("costs", "estimate", "--jobs", str(file), **fleet).stdout
    assert f"unless they spill: 2 jobs, about {total['quota_tokens']:,} tokens" in shown


def test_nobody_who_may_serve_is_exit_code_1(invoke):
    """The reasons are shown."""
    ran = invoke("costs", "estimate", *JOB, "--prompt", "?", "--max-cost", "0.000000001", code=1)
    assert "over max_cost" in ran.stdout


@pytest.mark.usefixtures("learned")
def test_a_file_of_jobs_is_added_up(invoke, tmp_path: Path):
    """By the model that would be asked first; invalid lines are named, and are exit code 1."""
    lines = [{"id": n, "task_type": "summarize", "prompt": PROMPT, "workflow": "w"} for n in range(3)]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"task_type": "final_review", "prompt": "?"}])))
    told = json.loads(invoke("costs", "estimate", "--jobs", str(file), "--json").stdout)
    alone = json.loads(invoke("costs", "estimate", *JOB, "--prompt", PROMPT, "--json").stdout)
    haiku = told["by_model"]["anthropic/claude-haiku-5-5"]
    assert (haiku["jobs"], told["total"]["jobs"]) == (3, 4)
    assert Decimal(haiku["expected_usd"]) == 3 * Decimal(alone["expected_usd"])
    assert Decimal(haiku["worst_usd"]) == 3 * Decimal(alone["worst_usd"])
    sums = [one["worst_usd"] for one in told["by_model"].values()]
    assert sum(map(Decimal, sums)) == Decimal(told["total"]["worst_usd"])
    assert told["total"]["worst_usd"] in invoke("costs", "estimate", "--jobs", str(file)).stdout

    file.write_text(
        file.read_text() + '\n{"task_type": "x"}\nno json\n{"task_type": "x", "prompt": "?", "max_cost": 0}'
    )
    ran = invoke("costs", "estimate", "--jobs", str(file), code=1)
    assert "line 5: give either 'prompt' or 'messages'" in ran.stdout
    assert "line 6: not JSON" in ran.stdout
    assert "no model may serve: 1 job\n" in ran.stdout
    assert "invalid: 2 lines\n" in ran.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["--task-type", "x"], ["--prompt", "?"], ["--task-type", "x", "--prompt", "?", "--file", "-"]],
    ids=" ".join,
)
def test_what_is_missing_is_said(invoke, arguments):
    """One prompt, and a task type; or a file of jobs."""
    assert "give --task-type, and the prompt by" in invoke("costs", "estimate", *arguments, code=2).output


def test_a_file_of_jobs_goes_with_no_other_option(invoke, tmp_path):
    """Each line says for itself what it is."""
    file = tmp_path / "jobs.jsonl"
    file.touch()
    assert "in the file" in invoke("costs", "estimate", "--jobs", str(file), *JOB, code=2).output


def test_without_redis_it_says_so(invoke):
    """Exit code 3, one line, no password."""
    away = "redis://:hush@127.0.0.1:1/0"
    ran = invoke("costs", "estimate", *JOB, "--prompt", "?", code=3, REDIS_URL=away)
    assert "cannot be reached" in ran.output
    assert "hush" not in ran.output
