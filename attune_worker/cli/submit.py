"""``attune-worker submit``: one job from the command line, and its answer if that is waited for."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import click

from attune_worker.cli.files import text_of
from attune_worker.cli.names import complete_models, complete_providers, complete_tasks
from attune_worker.cli.number import Number
from attune_worker.cli.output import print_json
from attune_worker.cli.printable import printable
from attune_worker.client import Client
from attune_worker.errors import ResultTimeoutError
from attune_worker.jobs import Job, JobResult

Command = TypeVar("Command", bound=Callable[..., Any])

GIVEN_ELSEWHERE = frozenset({"task_type", "prompt", "messages", "metadata"})
"""Fields of a job that are arguments, or options of their own."""

HELP = {
    "system": "System prompt.",
    "workflow": "Place in your program, for routing and reports.",
    "stage": "Step of the workflow.  [default: the task type]",
    "model": "Only this model: an id, or provider/id.",
    "tier_hint": "Start from this tier instead of the task type's.",
    "provider_hint": "Prefer this provider.",
    "max_cost": "Most that the job may cost, in USD.",
    "max_latency_ms": "Most that 95 of 100 answers of the model take.",
    "min_success_rate": "Success, 0 to 1, that the model should have on average.",
    "best_effort": "Take the closest model where none meets the wishes, or fail.",
    "max_tokens": "Longest answer.",
    "temperature": "0 to 2, for models that take it.",
    "stop": "Text at which the answer ends; may be repeated.",
    "tenant": "Whose job it is, for budgets and reports.",
    "user_id": "Whose job it is, for the provider: hashed.",
    "session_id": "Which conversation it belongs to.",
    "idempotency_key": "Same tenant and key, same job.",
    "priority": "0 (first) to 9 (last).",
    "deadline_seconds": "The job expires this long after it was submitted.",
}

COMPLETES = {"model": complete_models, "provider_hint": complete_providers}


def _job_options(command: Command) -> Command:
    """Give a command an option for each field of a job, in the order in which ``Job`` has them."""
    for name, field in reversed(Job.model_fields.items()):
        if name in GIVEN_ELSEWHERE:
            continue
        flag, kind = f"--{name.replace('_', '-')}", _kind(field.annotation)
        options: dict[str, Any] = {"type": kind, "default": None, "help": HELP.get(name) or field.description}
        if kind is bool:
            flag, options["type"] = f"{flag}/--no-{name.replace('_', '-')}", None
        if name in COMPLETES:
            options["shell_complete"] = COMPLETES[name]
        if get_origin(field.annotation) is tuple:
            options |= {"multiple": True, "type": str}
        command = click.option(flag, name, **options)(command)
    return command


def _kind(annotation: Any) -> Any:
    """Return the click type of a field: its own, without the None and the rules that ``Job`` sees to."""
    while get_origin(annotation) in {Annotated, Union, types.UnionType}:
        parts = [part for part in get_args(annotation) if part is not type(None)]
        annotation = parts[0]
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return click.Choice([one.value for one in annotation])
    if annotation is Decimal:
        return str  # exactly as it is written
    return annotation if annotation in {bool, int, float} else str


def _metadata(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """Read NAME=VALUE; a value that is JSON is taken as such."""
    found: dict[str, Any] = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{one!r}: it should be like ticket=4711", ctx, param)
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


@click.command()
@click.argument("task_type", shell_complete=complete_tasks)
@click.argument("prompt", required=False)
@click.option(
    "-f",
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read the prompt from a file.",
)
@_job_options
@click.option("--metadata", multiple=True, metavar="NAME=VALUE", callback=_metadata, help="Comes back with the result.")
@click.option("--wait", is_flag=True, help="Wait for the end, and print the answer.")
@click.option("--timeout", type=Number(min=0), metavar="SECONDS", help="Longest wait.  [default: until it has ended]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the job's id, or with --wait its whole result.")
@click.pass_context
def submit(
    ctx: click.Context,
    /,
    task_type: str,
    prompt: str | None,
    file: Path | None,
    metadata: dict[str, Any],
    wait: bool,
    timeout: float | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Submit one job and print its id, or with --wait its answer. A PROMPT of - is read from standard input.

    Exit code 1: with --wait, the job has ended without an answer, or not within --timeout; it goes on then.

    Example: attune-worker submit summarize "A text that is too long." --workflow mail --wait
    """
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    if metadata:
        given["metadata"] = metadata
    text = _prompt(ctx, prompt, file)
    with Client() as client:
        handle = client.submit(task_type, text, **given)
        if not wait:
            print_json({"job_id": handle.id}) if as_json else click.echo(handle.id)
            return
        try:
            result = handle.result(timeout)
        except ResultTimeoutError:
            click.echo(handle.id, err=True)
            raise
        except KeyboardInterrupt:
            click.echo(f"job {handle.id} goes on; attune-worker jobs show {handle.id} --content", err=True)
            raise click.exceptions.Exit(130) from None
    _answer(result, as_json=as_json)


def _prompt(ctx: click.Context, prompt: str | None, file: Path | None) -> str:
    if (prompt is None) is (file is None):
        raise click.UsageError("give either a PROMPT (- for standard input) or --file", ctx)
    return text_of(file) if file is not None or prompt == "-" else prompt or ""


def _answer(result: JobResult, *, as_json: bool) -> None:
    """Print how a job has ended; exit code 1 where there is no answer."""
    if as_json:
        print_json(result.model_dump(mode="json"))
    elif result.succeeded:
        click.echo(printable(result.content or "", lines=True))
    else:
        error = f": {result.error.type}: {result.error.message}" if result.error else ""
        click.echo(printable(f"job {result.job_id} is {result.status}{error}"), err=True)
    if not result.succeeded:
        raise click.exceptions.Exit(1)
