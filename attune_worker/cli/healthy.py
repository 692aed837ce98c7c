"""``attune-worker healthy``: does a worker take messages? For whoever restarts those that do not."""

from __future__ import annotations

import time
from pathlib import Path

import click

from attune_worker.cli.files import FileName
from attune_worker.cli.number import Number
from attune_worker.errors import ConfigurationError, ServiceUnavailableError
from attune_worker.settings import Settings, get_settings, masked

BROKER_SECONDS = 3.0
"""How long the broker may take to answer."""


@click.command()
@click.option(
    "-f",
    "--file",
    type=FileName(),
    required=True,
    help="What the worker was given as --liveness-file.",
)
@click.option(
    "--within",
    type=Number(min=1),
    default=60.0,
    show_default=True,
    help="How many seconds ago it may have been that the worker took messages.",
)
def healthy(file: Path, within: float) -> None:
    """Tell whether a worker takes messages. A worker all of whose threads are busy is healthy.

    Exit code 0: it does. 1: it does not, and a restart is what helps. 3: the broker cannot be reached, so that no
    worker can, and a restart does not help.

    Example: attune-worker healthy --file /tmp/attune-worker.alive
    """
    complaint = _complaint(file, within)
    if complaint is None:
        return
    settings = get_settings()
    if not broker_answers(settings):
        url = masked(settings.broker)
        away = f"the broker at {url} cannot be reached within {BROKER_SECONDS:g} s; start it, or set ATTUNE_BROKER_URL"
        raise ServiceUnavailableError(f"{complaint}: {away}", url=url)
    raise click.ClickException(f"{complaint}, though the broker answers")


def _complaint(file: Path, within: float) -> str | None:
    """Say what is wrong with a worker; of one that takes messages, say so, and return None."""
    try:
        age_seconds = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return f"{file}: no worker has taken messages with this --liveness-file yet"
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be looked at: {error.strerror}; see --file") from None
    if age_seconds > within:
        return f"the worker has not taken messages for {age_seconds:.0f} s"
    click.echo(f"healthy: the worker took messages {max(age_seconds, 0):.0f} s ago")
    return None


def broker_answers(settings: Settings, timeout_seconds: float = BROKER_SECONDS) -> bool:
    """Whether a new connection to the broker can be opened within about ``timeout_seconds``."""
    from attune_worker.app import make_app  # Celery is slow to import, and a healthy worker does not need it

    app = make_app(settings)
    app.conf.broker_connection_timeout = timeout_seconds
    for option in ("socket_timeout", "socket_connect_timeout", "read_timeout", "write_timeout"):
        if option in app.conf.broker_transport_options:
            app.conf.broker_transport_options[option] = timeout_seconds
    with app.connection_for_read() as connection:
        try:
            connection.connect()
        except (*connection.connection_errors, *connection.channel_errors):
            return False
    return True
