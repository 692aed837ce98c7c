"""What would another rule have achieved on the jobs that were run, and what would it have spent?

Reads what ``attune-worker run FILE -o OUT.jsonl`` wrote. The first call of every job says with what probability each
model would have been chosen, so outcomes can be weighted by how much likelier another rule would have been to choose
as was chosen: self-normalised inverse propensity scoring (Swaminathan and Joachims, NeurIPS 2015). What a rule would
choose but never was chosen cannot be judged; ``unsupported`` is the share of such calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from attune_worker.jobs import Decision, JobResult

Rule = Callable[[Decision], int]
"""From a decision to the place of the candidate that the rule would choose."""

FEW = 30.0
"""With a smaller effective sample an estimate is a guess."""


@dataclass(frozen=True, slots=True)
class Record:
    """A call whose model was drawn: the decision, how well it went (0 to 1), its cost in USD where known."""

    decision: Decision
    score: float
    usd: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a rule would come to; ``success_error`` is one standard error, costs are USD per call."""

    rule: str
    success: float | None
    success_error: float | None
    usd: float | None
    effective_calls: float
    unsupported: float


def always_cheapest(decision: Decision) -> int:
    """Choose the candidate with the least expected cost; an unknown one counts as dear."""
    return min(range(len(decision.candidates)), key=lambda place: _cost(decision, place))


def static(_decision: Decision) -> int:
    """Choose the first: candidates are in static order."""
    return 0


def meeting(floor: float) -> Rule:
    """Return the rule that takes the cheapest candidate expected to meet ``floor``, else the best one."""

    def choose(decision: Decision) -> int:
        expected = [candidate.expected_success or 0.0 for candidate in decision.candidates]
        able = [place for place, success in enumerate(expected) if success >= floor]
        if able:
            return min(able, key=lambda place: _cost(decision, place))
        return max(range(len(expected)), key=lambda place: expected[place])

    return choose


def always(model: str) -> Rule:
    """Return the rule that takes this model where it is a candidate, else the first."""

    def choose(decision: Decision) -> int:
        return next((place for place, one in enumerate(decision.candidates) if one.model_id == model), 0)

    return choose


def parse_rule(text: str) -> Rule:
    """Return the rule called ``text``; raises ``ValueError`` for an unknown one."""
    name, _, value = text.partition("=")
    if text in {"cheapest", "static"}:
        return always_cheapest if text == "cheapest" else static
    if name == "model" and value:
        return always(value)
    if name == "floor" and value and 0 <= float(value) <= 1:
        return meeting(float(value))
    raise ValueError(f"{text!r} is not a rule; allowed: cheapest, static, floor=0.9, model=ID")


def _cost(decision: Decision, place: int) -> float:
    usd = decision.candidates[place].expected_cost_usd
    return float("inf") if usd is None else float(usd)


def records(results: Iterable[JobResult], scores: Mapping[str, float]) -> Iterator[Record]:
    """Yield the calls whose model was drawn.

    A call that failed counts as 0, whatever a fallback then achieved; one that succeeded as the job's score, else 1.
    """
    for result in results:
        for attempt in result.attempts:
            decision = attempt.decision
            if decision is None or decision.rule == "pinned" or not decision.candidates or decision.propensity <= 0:
                continue
            drawn = decision.candidates[decision.chosen]
            if (drawn.provider, drawn.model_id) != (attempt.provider, attempt.model_id):
                continue  # the drawn model could not be called just then, and nothing is known of it
            score = scores.get(result.job_id, 1.0) if attempt.outcome == "succeeded" else 0.0
            yield Record(decision, score, None if attempt.cost_usd is None else float(attempt.cost_usd))


def estimate(name: str, rule: Rule, recorded: Sequence[Record]) -> Estimate:
    """Estimate what ``rule`` would have come to on these jobs."""
    matching, unsupported = [], 0
    for record in recorded:
        place = rule(record.decision)
        if place == record.decision.chosen:
            matching.append((1.0 / record.decision.propensity, record))
        elif record.decision.candidates[place].probability <= 0:
            unsupported += 1
    total = sum(weight for weight, _ in matching)
    share = unsupported / len(recorded) if recorded else 0.0
    if total == 0:
        return Estimate(name, None, None, None, 0.0, share)
    success = sum(weight * record.score for weight, record in matching) / total
    error = sqrt(sum((weight * (record.score - success)) ** 2 for weight, record in matching)) / total
    priced = [(weight, record.usd) for weight, record in matching if record.usd is not None]
    usd = sum(weight * usd for weight, usd in priced) / sum(weight for weight, _ in priced) if priced else None
    return Estimate(name, success, error, usd, total**2 / sum(weight**2 for weight, _ in matching), share)


def as_run(recorded: Sequence[Record]) -> Estimate:
    """Return what the rule that ran did come to."""
    if not recorded:
        return Estimate("as run", None, None, None, 0.0, 0.0)
    count = len(recorded)
    success = sum(record.score for record in recorded) / count
    error = sqrt(sum((record.score - success) ** 2 for record in recorded)) / count
    known = [record.usd for record in recorded if record.usd is not None]
    return Estimate("as run", success, error, sum(known) / len(known) if known else None, float(count), 0.0)


def read_results(file: Path) -> Iterator[JobResult]:
    """Yield the results in a file of JSON lines; raises ``click.ClickException`` with the number of a bad line."""
    for number, line in _lines(file):
        try:
            entry = json.loads(line)
            if "job_id" in entry:  # else it was refused, and there is no job
                yield JobResult.model_validate(entry)
        except (ValueError, TypeError) as error:
            raise click.ClickException(f"{file}, line {number}: not a job's result") from error


def read_scores(file: Path) -> dict[str, float]:
    """Return the score of each job from lines of ``{"job_id": ..., "score": ...}``."""
    scores = {}
    for number, line in _lines(file):
        try:
            entry = json.loads(line)
            scores[str(entry["job_id"])] = min(1.0, max(0.0, float(entry["score"])))
        except (ValueError, KeyError, TypeError) as error:
            raise click.ClickException(f"{file}, line {number}: not a job_id with a score") from error
    return scores


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def as_table(estimates: Sequence[Estimate]) -> Table:
    """Return the estimates for a terminal."""
    table = Table("rule", "success", "± 1 s.e.", "USD per call", "effective calls", "unsupported")
    for one in estimates:
        known = "-" if one.success is None else f"{one.success:.3f}"
        error = "-" if one.success_error is None else f"{one.success_error:.3f}"
        usd = "-" if one.usd is None else f"{one.usd:.6f}"
        few = " (few)" if one.effective_calls < FEW else ""
        table.add_row(one.rule, known, error, usd, f"{one.effective_calls:.0f}{few}", f"{one.unsupported:.1%}")
    return table


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--scores", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON lines: job_id, score."
)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    default=("cheapest", "static", "floor=0.8", "floor=0.9"),
    show_default=True,
    help="cheapest, static, floor=RATE or model=ID; repeatable.",
)
@click.option("--json", "as_lines", is_flag=True, help="Print JSON.")
def main(results: Path, scores: Path | None, rules: tuple[str, ...], as_lines: bool) -> None:
    """Estimate what other rules would have achieved on the jobs whose RESULTS are in this file."""
    try:
        parsed = {name: parse_rule(name) for name in rules}
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--rule") from error
    recorded = list(records(read_results(results), read_scores(scores) if scores else {}))
    estimates = [as_run(recorded), *(estimate(name, rule, recorded) for name, rule in parsed.items())]
    if as_lines:
        click.echo(json.dumps({"calls": len(recorded), "estimates": [asdict(one) for one in estimates]}, indent=2))
        return
    Console().print(as_table(estimates))
    click.echo(f"{len(recorded)} calls whose model was drawn. Where few of them are effective, an estimate is a guess.")


if __name__ == "__main__":
    main()
