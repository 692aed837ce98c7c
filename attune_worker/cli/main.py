"""Which commands are there, and what do their exit codes mean?

0: done. 1: the work failed. 2: wrong usage or configuration. 3: a service cannot be reached.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

from attune_worker.cli.printable import printable
from attune_worker.errors import AttuneError

COMMANDS = {
    "auth": "attune_worker.cli.auth:auth",
    "breaker": "attune_worker.cli.breaker:breaker",
    "budget": "attune_worker.cli.budget:budget",
    "completion": "attune_worker.cli.completion:completion",
    "costs": "attune_worker.cli.costs:costs",
    "dashboard": "attune_worker.cli.dashboard:dashboard",
    "demo": "attune_worker.cli.demo:demo",
    "doctor": "attune_worker.cli.doctor:doctor",
    "healthy": "attune_worker.cli.healthy:healthy",
    "jobs": "attune_worker.cli.jobs:jobs",
    "models": "attune_worker.cli.models:models",
    "routing": "attune_worker.cli.routing:routing",
    "run": "attune_worker.cli.run:run",
    "simulator": "attune_worker.cli.simulator:simulator",
    "submit": "attune_worker.cli.submit:submit",
    "worker": "attune_worker.cli.worker:worker",
}
"""Commands by name, and where each lives; its module is loaded when it is used."""


class Failure(click.ClickException):
    """One of our errors, as it may be shown, with its exit code."""

    def __init__(self, error: AttuneError) -> None:
        super().__init__(printable(error, lines=True))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance


class LazyGroup(click.Group):
    """A group that loads a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, or None for a name that is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command named first in ``args``; a wrong name is answered with the right ones."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            commands = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"{error.message} Commands: {commands}.", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; our errors become one line and an exit code."""
        try:
            return super().invoke(ctx)
        except AttuneError as error:
            raise Failure(error) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("attune-worker"), prog_name="attune-worker")
def attune() -> None:
    """Submit LLM jobs to a fleet of Celery workers, and run that fleet.

    Example: attune-worker submit summarize "A text that is too long." --wait
    """


def main() -> None:
    """Run the command line."""
    attune(prog_name="attune-worker")
