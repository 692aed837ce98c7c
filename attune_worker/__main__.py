"""Runs the command line as ``python -m attune_worker``."""

from attune_worker.cli import main

main()
