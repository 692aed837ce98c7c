"""``attune-worker simulator``: a provider for tests and trials, on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from attune_worker.cli.number import Number


@click.command()
@click.option("-p", "--port", type=click.IntRange(0, 65_535), default=8089, show_default=True, help="0: any free one.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--latency", type=Number(min=0), help="Seconds before each answer.")
@click.option("--profile", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML or JSON file.")
def simulator(port: int, host: str, latency: float | None, profile: Path | None) -> None:
    """Answer like Anthropic and OpenAI do, without a model: POST /v1/messages and /v1/chat/completions.

    Answers follow from the prompt alone. GET /_sim/invoice lists what a provider would charge,
    GET /_sim/subscriptions how much of its quota each subscription has used.

    Example: attune-worker simulator --latency 2
    """
    from attune_worker.simulator import FixedLatency, Profile, serve  # tornado is needed by this command only

    chosen = Profile.load(profile) if profile else Profile()
    if latency is not None:
        chosen = chosen.model_copy(update={"latency": FixedLatency(seconds=latency)})
    serve(host, port, chosen)
