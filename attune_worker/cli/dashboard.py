"""``attune-worker dashboard``: Flower for this fleet, behind a password."""

from __future__ import annotations

import os

import click

from attune_worker.errors import ConfigurationError

PASSWORD = "FLOWER_BASIC_AUTH"  # noqa: S105  # the variable's name
COLUMNS = "uuid,state,result,received,runtime,worker"


@click.command()
@click.option("-p", "--port", type=click.IntRange(1, 65_535), default=5555, show_default=True)
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen; put TLS before any other.")
def dashboard(port: int, address: str) -> None:
    """Run Flower: which workers are there, what they run, and how jobs ended.

    Whoever reaches it can stop workers, so it needs a password, in FLOWER_BASIC_AUTH=user:password (several: with
    commas between). It comes by the environment because everybody on a machine can see its command lines.

    Example: attune-worker dashboard --port 5555
    """
    users = [one.partition(":") for one in os.environ.get(PASSWORD, "").split(",")]
    if not all(user.strip() and password.strip() for user, _, password in users):
        raise ConfigurationError(
            f"{PASSWORD}: Flower is not started without a password; set it to user:password in the environment"
        )
    from attune_worker.celery import app  # Celery is slow to import

    raise click.exceptions.Exit(
        app.start(["flower", f"--address={address}", f"--port={port}", f"--tasks_columns={COLUMNS}"]) or 0
    )
