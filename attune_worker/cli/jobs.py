"""``attune-worker jobs``: where are the jobs, what happened to them, and how are they cancelled or run again?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from attune_worker.cli.job_view import View, print_listed, print_lost, print_shown
from attune_worker.cli.output import console, counted, json_option, moment, print_json, say
from attune_worker.cli.printable import printable
from attune_worker.client import Client
from attune_worker.errors import InvalidJobError, JobNotFoundError
from attune_worker.jobs import JobStatus

STATUSES = [status.value for status in JobStatus if status is not JobStatus.UNKNOWN]

MAX_LISTED = 1000

_limit = click.option(
    "--limit", type=click.IntRange(1, MAX_LISTED), default=20, show_default=True, metavar="N", help="Most jobs to show."
)
_ids = click.argument("job_ids", metavar="ID...", nargs=-1, required=True)


@click.group()
def jobs() -> None:
    """See where jobs are, cancel them, and run dead ones again.

    Example: attune-worker jobs list --status waiting
    """


@jobs.command("list")
@click.option("--status", type=click.Choice(STATUSES), help="Only the jobs that are there.")
@_limit
@json_option
def list_jobs(status: str | None, limit: int, as_json: bool) -> None:
    """List the jobs that are under way and those that ended last.

    Of the jobs that have ended, the index keeps the latest thousand in each of sixteen shards.

    Example: attune-worker jobs list --status failed --limit 100
    """
    with Client() as client:
        views = [View(record) for record in client.records.listed(JobStatus(status) if status else None, limit)]
    if as_json:
        print_json([view.to_json() for view in views])
    elif not views:
        click.echo(f"no job is {status}" if status else "no jobs")
    else:
        print_listed(console(), views)


@jobs.command()
@click.argument("job_id", metavar="ID")
@click.option("--content", is_flag=True, help="Show prompt, answer, metadata, user and session, too.")
@json_option
def show(job_id: str, content: bool, as_json: bool) -> None:
    """Show one job: where it is, its times, every call with its cost, lost workers, and its error.

    Example: attune-worker jobs show 5e0c7f6a-3c39-4a0c-9d2b-6f8f6f0c8a11
    """
    with Client() as client:
        view = View(client.records.read([job_id])[0])
        if view.record.status is JobStatus.UNKNOWN:
            raise JobNotFoundError(job_id)
        view = _with_job(client, view)
    if as_json:
        print_json(view.to_full_json(content=content))
    else:
        print_shown(console(), view, content=content)


@jobs.command()
@_ids
@json_option
def cancel(job_ids: tuple[str, ...], as_json: bool) -> None:
    """Cancel jobs that have not ended. One that runs ends within about a second: its call is cut off.

    Exit code 1: some had ended otherwise, or are unknown.

    Example: attune-worker jobs cancel 5e0c7f6a-3c39-4a0c-9d2b-6f8f6f0c8a11
    """
    with Client() as client:
        answers = {job_id: client.records.cancel(job_id) for job_id in dict.fromkeys(job_ids)}
        found = {record.job_id: record.status for record in client.records.read(list(answers))}
    told = []
    for job_id, answer in answers.items():
        done = answer is JobStatus.CANCELLED
        # One that runs is marked, and says cancelled as soon as its worker has stopped it.
        text = "is being cancelled" if done and found[job_id] is JobStatus.RUNNING else _said(answer)
        told.append(({"job_id": job_id, "status": found[job_id].value, "cancelled": done}, text))
    _answer(told, as_json=as_json, key="cancelled")


@jobs.command()
@_limit
@click.option("--retry", is_flag=True, help="Run all of them again.")
@json_option
def dead(limit: int, retry: bool, as_json: bool) -> None:
    """List the jobs that too many workers were lost with, and what is known of each loss.

    Example: attune-worker jobs dead --retry
    """
    with Client() as client:
        if retry:
            records = client.records.listed(JobStatus.DEAD, max(client.records.counts()[JobStatus.DEAD], 1))
            told = _retried(client, [record.job_id for record in records])
        else:
            views = [View(record) for record in client.records.listed(JobStatus.DEAD, limit)]
    if retry and (told or as_json):
        _answer(told, as_json=as_json, key="retried")
    elif retry:
        click.echo("no job is dead")
    elif as_json:
        print_json([view.to_json() | {"lost": list(view.record.lost)} for view in views])
    else:
        _print_dead(views)


@jobs.command()
@_ids
@json_option
def retry(job_ids: tuple[str, ...], as_json: bool) -> None:
    """Run jobs again that are dead, failed, expired or cancelled, as if they were new.

    Exit code 1: some are under way, succeeded, or are unknown.

    Example: attune-worker jobs retry 5e0c7f6a-3c39-4a0c-9d2b-6f8f6f0c8a11
    """
    with Client() as client:
        told = _retried(client, list(dict.fromkeys(job_ids)))
    _answer(told, as_json=as_json, key="retried")


def _with_job(client: Client, view: View) -> View:
    """Add what was submitted, or why that is not there."""
    try:
        job = client.records.read_job(view.record.job_id)
    except InvalidJobError as error:
        return replace(view, gone=error.message)
    return replace(view, job=job, gone="" if job else "is not kept once a job has succeeded")


def _retried(client: Client, job_ids: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """Put jobs back in line and wake them; return what became of each, for programs and for people."""
    before = client.retry(job_ids)
    left = [job_id for job_id, status in before.items() if status is None]
    found = {record.job_id: record.status for record in client.records.read(left)} if left else {}
    told = []
    for job_id, status in before.items():
        now = found[job_id] if status is None else JobStatus.QUEUED
        text = _unretried(now) if status is None else f"was {status}, is queued again"
        was = (status or now).value
        told.append(({"job_id": job_id, "was": was, "retried": status is not None}, text))
    return told


def _unretried(status: JobStatus) -> str:
    if status.ended and status is not JobStatus.SUCCEEDED:
        return f"{status}, and what was submitted is gone: submit it anew"
    return _said(status)


def _said(status: JobStatus) -> str:
    return "no such job, or its retention time has passed" if status is JobStatus.UNKNOWN else status.value


def _answer(told: Sequence[tuple[dict[str, Any], str]], *, as_json: bool, key: str) -> None:
    """Say what became of each job; exit code 1 unless ``key`` is true of all."""
    if as_json:
        print_json([one for one, _ in told])
    else:
        for one, text in told:
            click.echo(printable(f"{one['job_id']}: {text}"))
    if not all(one[key] for one, _ in told):
        raise click.exceptions.Exit(1)


def _print_dead(views: Sequence[View]) -> None:
    on = console()
    if not views:
        say(on, "no job is dead")
    for view in views:
        died = moment(view.record.ended_ms)
        when = "" if died is None else f" since {died:%Y-%m-%d %H:%M:%S} UTC"
        say(on, f"{view.record.job_id}: dead{when}, {counted(view.record.crashes, 'worker')} lost", style="bold")
        print_lost(on, view)
