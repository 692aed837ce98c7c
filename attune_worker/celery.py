"""Where does ``celery -A attune_worker`` find the app?"""

from __future__ import annotations

import click

from attune_worker.app import make_app
from attune_worker.errors import ConfigurationError
from attune_worker.settings import get_settings

LIVENESS_FILE = click.Option(
    ["--liveness-file"],
    type=click.Path(dir_okay=False),
    help="A file to touch as long as this worker takes messages; see attune-worker healthy.",
)

try:
    app = make_app(get_settings())
    app.user_options["worker"].add(LIVENESS_FILE)
except ConfigurationError as error:
    if click.get_current_context(silent=True) is None:
        raise
    # Celery's command line would wrap any exception in a traceback; this is one line, and exit code 2.
    click.echo(f"Error: {error}", err=True)
    raise SystemExit(error.exit_code) from None
