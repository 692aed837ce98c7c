"""Where does ``celery -A attune_worker`` find the app?"""

from __future__ import annotations

import click

from attune_worker.app import make_app
from attune_worker.errors import ConfigurationError
from attune_worker.settings import get_settings

try:
    app = make_app(get_settings())
except ConfigurationError as error:
    if click.get_current_context(silent=True) is None:
        raise
    raise click.UsageError(error.message) from None  # one line and exit code 2, under Celery's command line
