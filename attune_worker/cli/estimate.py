"""``attune-worker costs estimate``: what should a job cost, or a file full of jobs, before any is submitted?"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from attune_worker.cli.bulk import read_lines
from attune_worker.cli.credentials import HELD
from attune_worker.cli.files import text_of
from attune_worker.cli.output import Column, Rows, console, counted, json_option, print_fitting, print_json, say, usd
from attune_worker.errors import InvalidJobError
from attune_worker.jobs import AuthMode, Job, ModelTier
from attune_worker.settings import get_settings

if TYPE_CHECKING:
    from attune_worker.models.estimation import CandidateEstimate, Estimate, Estimator
    from attune_worker.models.modes import Quota

STANDARD_INPUT = Path("-")

SHOWN_REASONS = 20
"""Invalid lines that are named; the others are counted."""


@dataclass
class Sum:
    """Jobs that would go to one model, or all of them together; amounts of money are by the mode of each."""

    jobs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    expected_usd: Decimal = Decimal(0)
    worst_usd: Decimal = Decimal(0)
    subscription_jobs: int = 0
    quota_tokens: int = 0
    unpriced_jobs: int = 0
    guessed_jobs: int = 0

    def add(self, one: CandidateEstimate) -> None:
        """Count a job."""
        self.jobs += 1
        self.input_tokens += one.input_tokens
        self.output_tokens += one.output_tokens
        self.expected_usd += one.due_usd or 0
        self.worst_usd += one.most_due_usd or 0
        self.subscription_jobs += one.by_quota
        self.quota_tokens += one.subscription.tokens if one.by_quota else 0
        self.unpriced_jobs += one.most_due_usd is None
        self.guessed_jobs += one.learned_calls == 0


@dataclass
class Bulk:
    """The jobs of a file, by the model that would be asked first; ``unserved`` are those that no model may serve."""

    total: Sum = field(default_factory=Sum)
    by_model: dict[str, Sum] = field(default_factory=dict)
    unserved: int = 0
    invalid: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every line is a job that some model may serve."""
        return not (self.unserved or self.invalid)


@click.command()
@click.option("--task-type", metavar="NAME", help="Kind of work, such as summarize.")
@click.option("--prompt", metavar="TEXT", help="The prompt itself.")
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="File with the prompt; - for standard input.",
)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--workflow", metavar="NAME")
@click.option("--stage", metavar="NAME", help="Place in the workflow.  [default: the task type]")
@click.option("--model", metavar="NAME", help="Only this one: id or provider/id.")
@click.option(
    "--tier", "tier_hint", type=click.Choice([tier.value for tier in ModelTier]), help="Instead of the task type's."
)
@click.option("--provider", "provider_hint", metavar="NAME", help="Preferred one.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Longest answer.")
@click.option("--max-cost", metavar="USD", help="As the job would have it.")
@click.option("--module-lines", type=click.IntRange(min=0), metavar="N", help="Lines of the module it is about.")
@click.option(
    "--auth-mode",
    type=click.Choice([mode.value for mode in AuthMode]),
    help="How it is to be paid for.  [default: as the auth strategy recommends]",
)
@click.option(
    "--jobs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with a job on each line, as for `run`, instead of one job.",
)
@json_option
def estimate(jobs: Path | None, as_json: bool, file: Path | None, **fields: str | int | None) -> None:
    """Say what a job should cost with each model, and at worst, by what the fleet has learned. Nothing is submitted.

    Amounts are by the token, with what the call would take of a subscription's quota beside them, and by which of both
    the job would go.

    Exit code 1: no model may serve the job; with --jobs, that is so for some, or some lines are no jobs.

    Example: attune-worker costs estimate --task-type summarize --file report.txt --max-tokens 500
    """
    from attune_worker.models.estimation import Estimator

    given = {name: value for name, value in fields.items() if value is not None}
    if jobs is not None and (given or file is not None):
        raise click.UsageError("--jobs has all about its jobs in the file: leave the other options out")
    if jobs is None:
        job = Job.parse(given | _prompt(file, given))
        with Estimator(get_settings()) as estimator:
            found = estimator.estimate(job)
        print_json(asdict(found)) if as_json else print_estimate(console(), found)
        whole = found.first is not None
    else:
        with Estimator(get_settings()) as estimator:
            bulk = _bulk(estimator, jobs)
        print_json(asdict(bulk)) if as_json else print_bulk(console(), bulk)
        whole = bulk.whole
    if not whole:
        raise click.exceptions.Exit(1)


def _prompt(file: Path | None, given: dict[str, str | int]) -> dict[str, str]:
    if "task_type" not in given or ("prompt" in given) == (file is not None):
        raise click.UsageError("give --task-type, and the prompt by --prompt or by --file; or a file of jobs by --jobs")
    if file is None:
        return {}
    return {"prompt": text_of(None if file == STANDARD_INPUT else file)}


def _bulk(estimator: Estimator, path: Path) -> Bulk:
    bulk = Bulk()
    for line in read_lines(path):
        reason, first = line.reason, None
        if reason is None:
            try:
                first = estimator.first(Job.parse(line.fields))
            except InvalidJobError as error:
                reason = error.reason
        if reason is not None:
            bulk.invalid.append({"line": line.number, "reason": reason})
            continue
        if first is None:
            bulk.unserved += 1
            continue
        bulk.total.add(first)
        bulk.by_model.setdefault(first.ref, Sum()).add(first)
    return bulk


def print_estimate(on: Console, found: Estimate) -> None:
    """Print a line for each model that may serve, what they say together, and why the others may not."""
    serving = [one for one in found.candidates if one.serves]
    if serving:
        title = f"{found.workflow}/{found.stage}, {found.rule} order: one call of each model"
        print_fitting(on, Rows(CANDIDATES, list(map(_cells, serving)), title, {0: "bold"}))
        _say_first(on, serving[0])
        most = "not known, as a price is missing" if found.most_usd is None else f"${usd(found.most_usd)}"
        say(on, f"the job, whatever fails and falls back: at most {most}")
    reasons = Counter(f"{one.provider}: {one.why}" for one in found.candidates if not one.serves)
    for reason, count in reasons.items():
        say(on, f"may not serve: {reason} ({counted(count, 'model')})")


CANDIDATES = (
    Column("model"),
    Column("tier", 3),
    Column("tokens in", 2, right=True),
    Column("out", 2, right=True),
    Column("expected USD", right=True),
    Column("worst USD", right=True),
    Column("or of a quota", 1, right=True),
    Column("goes by", 1),
    Column("learned from", 4, right=True),
    Column("actual/expected", 4, right=True),
)


def _cells(one: CandidateEstimate) -> tuple[str, ...]:
    ratio = "" if one.lately is None or one.lately.ratio is None else f"{one.lately.ratio:.2f}"
    return (
        one.ref,
        one.tier.value,
        f"{one.input_tokens:,}",
        f"{one.output_tokens:,}",
        usd(one.expected_usd),
        usd(one.worst_usd),
        _of_quota(one.subscription),
        _goes_by(one),
        counted(one.learned_calls, "call") if one.learned_calls else "a guess",
        ratio,
    )


def _of_quota(quota: Quota) -> str:
    shares = [f"{share.share:.1%} of {name}" for name, share in quota.windows.items() if share.share is not None]
    return ", ".join([f"{quota.tokens:,} tokens", *shares])


def _goes_by(one: CandidateEstimate) -> str:
    if one.mode is None:
        return "nothing"
    return f"{one.mode.value}{', else api' if one.spills else ''}"


def _say_first(on: Console, one: CandidateEstimate) -> None:
    say(on, f"{one.ref}, asked first ({one.why}): expected ${usd(one.due_usd)}, at worst ${usd(one.most_due_usd)}")
    say(on, f"it goes by {_goes_by(one)}: {one.mode_why}")
    if one.by_quota and one.subscription.held is not None:
        until = (
            "" if one.subscription.held_until is None else f" until {one.subscription.held_until:%Y-%m-%d %H:%M} UTC"
        )
        how = HELD.get(one.subscription.held, one.subscription.held)
        say(on, f"its subscription {one.subscription.credential} is held up{until}: {how}", style="yellow")
    say(on, f"the expectation is {one.source}")
    if one.lately is not None and one.lately.ratio is not None:
        say(
            on,
            f"lately its calls in this workflow cost {one.lately.ratio:.2f} times what was expected; each estimate was "
            f"off by ${usd(one.lately.mean_off_usd)} on average, of {counted(one.lately.calls, 'call')}",
        )


SUMS = (
    Column("model asked first"),
    Column("jobs", right=True),
    Column("expected USD", right=True),
    Column("worst USD", right=True),
    Column("tokens in", 1, right=True),
    Column("tokens out", 1, right=True),
)


def print_bulk(on: Console, bulk: Bulk) -> None:
    """Print the sums by model, and what is in none of them."""
    for one in bulk.invalid[:SHOWN_REASONS]:
        say(on, f"line {one['line']}: {one['reason']}")
    ranked = sorted(bulk.by_model.items(), key=lambda item: -item[1].jobs)
    if ranked:
        total = ("total", *_sums(bulk.total))
        print_fitting(on, Rows(SUMS, [(ref, *_sums(one)) for ref, one in ranked], footer=total))
    if bulk.total.subscription_jobs:
        jobs, tokens = counted(bulk.total.subscription_jobs, "job"), bulk.total.quota_tokens
        say(on, f"by subscription, for no money unless they spill: {jobs}, about {tokens:,} tokens of quota")
    if bulk.total.unpriced_jobs:
        say(on, f"in no amount, as no price is known: {counted(bulk.total.unpriced_jobs, 'job')}")
    if bulk.total.guessed_jobs:
        say(on, f"a guess, as nothing like them was called yet: {counted(bulk.total.guessed_jobs, 'job')}")
    if bulk.unserved:
        say(on, f"no model may serve: {counted(bulk.unserved, 'job')}")
    if bulk.invalid:
        say(on, f"invalid: {counted(len(bulk.invalid), 'line')}")


def _sums(one: Sum) -> tuple[str, ...]:
    return str(one.jobs), usd(one.expected_usd), usd(one.worst_usd), f"{one.input_tokens:,}", f"{one.output_tokens:,}"
