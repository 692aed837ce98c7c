"""``attune-worker demo``: the whole thing, from nothing to a table of answers and their cost."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
from redis.exceptions import RedisError
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from attune_worker.cli.output import shown
from attune_worker.client import Client, JobHandle
from attune_worker.errors import AttuneError
from attune_worker.jobs import JobResult, JobStatus
from attune_worker.local import (
    SERVICE_SETTINGS,
    LocalFleet,
    end_on_signals,
    local_environment,
    simulated_providers,
)
from attune_worker.settings import Settings
from attune_worker.simulator import LognormalLatency, Profile, Simulator
from attune_worker.store.connection import connect

CONCURRENCY = 16
MAX_TOKENS = 300
MAX_DOCUMENTS = 8
MAX_CHARACTERS = 6_000
PATIENCE_SECONDS = 120.0

TASKS = {
    "summarize": "Summarize this in two sentences.",
    "classify": "Which one fits best: tutorial, how-to, explanation, reference, or code? Answer with that word.",
    "review_security": "Name the most serious security weakness of this code, or say that there is none.",
}


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of real text, and whether it is prose or code."""

    name: str
    text: str
    is_code: bool = False


@click.command()
@click.option("--simulator", "simulated", is_flag=True, help="Use the simulator even if a provider's key is set.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def demo(*, simulated: bool, as_json: bool) -> None:
    """Run summaries, classifications and reviews of this project's own documents, and show what they cost.

    Needs no configuration, no key and no running service: what is missing is started for the demo and
    stopped after it. With a provider's key in the environment it asks the real provider, and says so.

    Example: attune-worker demo
    """
    end_on_signals()
    console = Console(stderr=as_json)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attune-demo-")))
        environ, simulator = stack.enter_context(_providers(os.environ, folder, console, simulated=simulated))
        environ = stack.enter_context(local_environment(environ, folder, console.print, insist=False))
        client = stack.enter_context(_own_corner(environ))
        fleet = stack.enter_context(LocalFleet(1, environ, folder, concurrency=CONCURRENCY))
        labels, results = _run(client, fleet, console)
        invoice = simulator.invoice(summary=True)["total_usd"] if simulator else None
    total = sum((result.cost_usd or Decimal(0) for result in results.values()), Decimal(0))
    if as_json:
        jobs = [json.loads(result.model_dump_json()) for result in results.values()]
        click.echo(json.dumps({"jobs": jobs, "total_usd": f"{total:f}", "invoice_usd": invoice}))
    else:
        console.print(_table(labels, results, final=True))
        _say_total(console, total, invoice, time.monotonic() - started)
    _judge(results, total, invoice)


@contextmanager
def _providers(
    environ: Mapping[str, str], folder: Path, console: Console, *, simulated: bool
) -> Iterator[tuple[dict[str, str], Simulator | None]]:
    """Yield the environment in which workers reach a provider, and the simulator if that is the one."""
    name = f"demo-{uuid4().hex[:12]}"  # no worker of somebody else's takes these jobs, and ours takes none of theirs
    corner = {"ATTUNE_NAMESPACE": name, "ATTUNE_QUEUE": name, "ATTUNE_RETENTION_SECONDS": "3600"}
    corner["ATTUNE_ROUTING__ADAPTIVE"] = "false"  # two dozen jobs teach nothing
    keyed = [name for name, provider in Settings.load(environ=environ).providers.items() if provider.key(environ)]
    if keyed and not simulated:
        console.print(f"Asking the real provider: {', '.join(keyed)} (a key is set). This costs a few cents at most.")
        yield {**environ, **corner}, None
        return
    with Simulator(Profile(latency=LognormalLatency(median_seconds=0.6, sigma=0.4))) as simulator:
        console.print(f"Asking the simulator at {simulator.url}: no real provider is called.")
        nothing = folder / "attune.toml"
        nothing.touch()
        kept = {
            name: value for name, value in environ.items() if not name.startswith("ATTUNE_") or name in SERVICE_SETTINGS
        }
        pointed = simulated_providers(simulator.url, simulator.openai_url)
        yield {**kept, **corner, **pointed, "ATTUNE_CONFIG": str(nothing)}, simulator


@contextmanager
def _own_corner(environ: Mapping[str, str]) -> Iterator[Client]:
    """Yield a client of the demo's own namespace, and leave nothing of it in Redis."""
    settings = Settings.load(environ=environ)
    with Client(settings) as client:
        yield client
    with closing(connect(settings)) as redis, suppress(RedisError):  # a private one may have gone already
        for key in redis.scan_iter(f"*{settings.namespace}*", count=1000):
            redis.delete(key)


def _run(client: Client, fleet: LocalFleet, console: Console) -> tuple[dict[str, str], dict[str, JobResult]]:
    """Submit the sample, show it while it runs, and return each job's label and result."""
    sample = list(_sample())
    handles = client.submit_many([fields for _, fields in sample])
    labels = {handle.id: label for handle, (label, _) in zip(handles, sample, strict=True)}
    results: dict[str, JobResult] = {}
    with Live(_table(labels, results), console=console, transient=True, refresh_per_second=8) as live:
        for result in _results(client, fleet, handles):
            results[result.job_id] = result
            live.update(_table(labels, results))
    return labels, results


def _results(client: Client, fleet: LocalFleet, handles: list[JobHandle]) -> Iterator[JobResult]:
    ends = time.monotonic() + PATIENCE_SECONDS
    with client.gather() as gathering:
        gathering.add(handle.id for handle in handles)
        while gathering.waiting:
            for record in gathering.ended_within(1.0):
                yield record.to_result()
            fleet.check()
            if time.monotonic() > ends:
                raise AttuneError(f"{gathering.waiting} jobs had not ended after {PATIENCE_SECONDS:g} s")


def _sample() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a label and the fields of each job."""
    for document in _documents():
        tasks = ("review_security",) if document.is_code else ("summarize", "classify")
        for task in tasks:
            yield (
                f"{task} {document.name}",
                {
                    "task_type": task,
                    "system": TASKS[task],
                    "prompt": document.text[:MAX_CHARACTERS],
                    "max_tokens": MAX_TOKENS,
                    "workflow": "demo",
                },
            )


def _documents() -> Iterator[Document]:
    """Yield the sections of the README, and some modules of this package."""
    readme = metadata("attune-worker").json.get("description", "")
    sections = re.split(r"^## +", str(readme), flags=re.MULTILINE)
    for section in sections[:MAX_DOCUMENTS]:
        title = section.strip().partition("\n")[0].strip("# ")
        if title:
            yield Document(f"README: {title[:40]}", section)
    modules = sorted((file for file in files("attune_worker").iterdir() if file.name.endswith(".py")), key=str)
    for module in modules[:MAX_DOCUMENTS]:
        text = module.read_text("utf-8")
        if text.strip():
            yield Document(module.name, text, is_code=True)


def _table(labels: Mapping[str, str], results: Mapping[str, JobResult], *, final: bool = False) -> Table:
    title = f"{len(results)} of {len(labels)} jobs have ended"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("job", no_wrap=True, max_width=22)
    table.add_column("status", no_wrap=True, min_width=9)
    table.add_column("model", no_wrap=True, min_width=17)
    table.add_column("time", no_wrap=True, justify="right", min_width=6)
    table.add_column("cost", no_wrap=True, justify="right", min_width=12)
    for job_id, label in labels.items():
        result = results.get(job_id)
        if result is not None:
            table.add_row(shown(label), *_cells(result))
        elif final:
            table.add_row(shown(label), "no result", "", "", "")
    return table


def _cells(result: JobResult) -> tuple[Text, Text, str, str]:
    reason = f" ({result.error.type})" if result.error else ""
    status = shown(f"{result.status}{reason}")
    status.stylize("green" if result.status is JobStatus.SUCCEEDED else "red")
    return (
        status,
        shown(result.model_id or ""),
        "" if result.latency_ms is None else f"{result.latency_ms / 1000:.2f} s",
        "unknown" if result.cost_usd is None else f"${result.cost_usd:f}",
    )


def _say_total(console: Console, total: Decimal, invoice: str | None, seconds: float) -> None:
    console.print(f"Total cost: ${total:f}", highlight=False)
    if invoice is not None:
        same = "the same to the nano-dollar" if Decimal(invoice) == total else "[red]which differs[/red]"
        console.print(f"The simulator's invoice: ${invoice}, {same}.", highlight=False)
    console.print(f"Took {seconds:.1f} s. Everything that was started for the demo is stopped.", highlight=False)


def _judge(results: Mapping[str, JobResult], total: Decimal, invoice: str | None) -> None:
    """Raise ``AttuneError`` unless every job succeeded and the invoice, if there is one, agrees."""
    failed = [result for result in results.values() if not result.succeeded]
    if failed:
        reasons = {result.error.message for result in failed if result.error}
        raise AttuneError(f"{len(failed)} jobs have no answer: {'; '.join(sorted(reasons)[:3])}")
    if invoice is not None and Decimal(invoice) != total:
        raise AttuneError(f"the jobs cost ${total:f}, but the invoice says ${invoice}")
