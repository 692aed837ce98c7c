"""``attune-worker completion``: what does a shell need to complete our commands?"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM = "attune-worker"
VARIABLE = "_ATTUNE_WORKER_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script by which a shell completes commands, options, providers, tiers, task types and models.

    \b
    bash: attune-worker completion bash > ~/.local/share/bash-completion/completions/attune-worker
    zsh:  attune-worker completion zsh > ~/.zfunc/_attune-worker    with ~/.zfunc in $fpath, before compinit
    fish: attune-worker completion fish > ~/.config/fish/completions/attune-worker.fish

    Completion reads the settings where it is used, and asks nothing over the network.

    Example: attune-worker completion zsh > ~/.zfunc/_attune-worker
    """  # noqa: D301  # click's sign for lines to be left as they are
    found = get_completion_class(shell)
    if found is None:  # no release of click is without these three
        raise click.ClickException(f"click does not know {shell}")
    click.echo(found(ctx.command, {}, PROGRAM, VARIABLE).source())
