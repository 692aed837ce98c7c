"""The command line: ``attune-worker …``, and the same group as ``celery -A attune_worker attune …``."""

from attune_worker.cli.main import attune, main

__all__ = ["attune", "main"]
