"""What another rule would have achieved is estimated from jobs that were routed by chance."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from attune_worker.jobs import Attempt, Candidate, Decision, JobResult, JobStatus, ModelTier

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "replay.py"
TRUTH = {"small": (0.6, 0.001), "large": (0.9, 0.02)}
CALLS = 4000


def result(number, random):
    """Return a job that was given to ``small`` with a chance that differs from job to job."""
    probability = random.choice([0.2, 0.5, 0.9])
    candidates = [
        Candidate(
            model_id=model,
            provider="p",
            tier=ModelTier.CHEAP if model == "small" else ModelTier.PREMIUM,
            probability=chance,
            expected_success=TRUTH[model][0],
            expected_cost_usd=TRUTH[model][1],
        )
        for model, chance in (("large", 1 - probability), ("small", probability))
    ]
    chosen = int(random.random() < probability)
    rate, usd = TRUTH[candidates[chosen].model_id]
    succeeded = random.random() < rate
    decision = Decision(
        rule="adaptive",
        workflow="w",
        stage="s",
        floor=0.8,
        candidates=tuple(candidates),
        chosen=chosen,
        propensity=candidates[chosen].probability,
    )
    return answered(number, decision, usd, succeeded=succeeded)


def answered(number, decision, usd, *, succeeded):
    """Return a job that ended with its first call; after a failure, with a fallback that succeeded."""
    first = Attempt(
        model_id=decision.candidates[decision.chosen].model_id,
        provider="p",
        tier=ModelTier.CHEAP,
        outcome="succeeded" if succeeded else "failed",
        latency_ms=1,
        cost_usd=str(usd),
        decision=decision,
    )
    fallback = first.model_copy(update={"outcome": "succeeded", "decision": None})
    attempts = (first,) if succeeded else (first, fallback)
    return JobResult(job_id=str(number), status=JobStatus.SUCCEEDED, attempts=attempts)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    random = Random(7)
    file = tmp_path_factory.mktemp("replay") / "out.jsonl"
    lines = [{"line": n, **json.loads(result(n, random).model_dump_json(exclude_none=True))} for n in range(CALLS)]
    refused = {"line": CALLS, "error": {"type": "invalid_job", "message": "no prompt"}}
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, refused]))
    return file


def replay(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def estimates(*arguments):
    done = replay(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return {one["rule"]: one for one in json.loads(done.stdout)["estimates"]}


def test_estimates_are_near_the_truth(recorded):
    """What each model achieves and costs comes out, although each job had its own chance of getting it."""
    found = estimates(recorded, "--rule", "cheapest", "--rule", "static", "--rule", "floor=0.85")
    assert found["as run"]["effective_calls"] == CALLS
    for rule, model in (("cheapest", "small"), ("static", "large"), ("floor=0.85", "large")):
        success, usd = TRUTH[model]
        assert abs(found[rule]["success"] - success) < 4 * found[rule]["success_error"] < 0.1
        assert found[rule]["usd"] == pytest.approx(usd)
        assert 30 < found[rule]["effective_calls"] < CALLS
        assert found[rule]["unsupported"] == 0


def test_scores_replace_outcomes(recorded, tmp_path):
    """An answer that somebody judged counts by its score; a call that failed has none."""
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"job_id": str(n), "score": 0.25}) + "\n" for n in range(CALLS)))
    found = estimates(recorded, "--scores", scores, "--rule", "cheapest")
    assert abs(found["cheapest"]["success"] - 0.25 * TRUTH["small"][0]) < 0.01


def test_what_was_never_chosen_is_not_estimated(tmp_path):
    """A rule that only takes what had no chance is unsupported, and no number is given for it."""
    drawn = result(1, Random(1)).attempts[0].decision
    large, small = drawn.candidates
    certain = (large.model_copy(update={"probability": 1.0}), small.model_copy(update={"probability": 0.0}))
    decision = drawn.model_copy(update={"candidates": certain, "chosen": 0, "propensity": 1.0})
    file = tmp_path / "out.jsonl"
    file.write_text(answered(1, decision, 0.02, succeeded=True).model_dump_json() + "\n")
    found = estimates(file, "--rule", "cheapest")["cheapest"]
    assert (found["success"], found["unsupported"]) == (None, 1.0)


def test_call_to_another_model_than_the_drawn_one_says_nothing(tmp_path):
    """The drawn one could not be called just then; what its fallback achieved is not credited to it."""
    displaced = []
    for number in range(50):
        job = result(number, Random(number))
        first = job.attempts[0].model_copy(update={"model_id": "fallback", "outcome": "succeeded"})
        displaced.append(job.model_copy(update={"attempts": (first,)}))
    drawn = [result(number, Random(number)) for number in range(50, 100)]
    file = tmp_path / "out.jsonl"
    file.write_text("".join(job.model_dump_json() + "\n" for job in [*displaced, *drawn]))
    assert estimates(file, "--rule", "cheapest")["as run"]["effective_calls"] == len(drawn)


def test_bad_input_is_named(recorded, tmp_path):
    """A line that is no result is named by its number, and an unknown rule with those that are known."""
    file = tmp_path / "out.jsonl"
    file.write_text('\n{"job_id": 1}\n')
    assert "line 2" in replay(file).stderr
    assert "model=ID" in replay(recorded, "--rule", "best").stderr
