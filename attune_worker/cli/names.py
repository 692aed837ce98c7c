"""Which names may be typed: of providers, tiers, task types and models? Without a look at the network."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from attune_worker.errors import AttuneError
from attune_worker.jobs import ModelTier
from attune_worker.settings import get_settings

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
"""What click asks for completions."""


def completing(names: Callable[[], Iterable[str]]) -> Complete:
    """Return what completes an argument or option with names; with none where the settings cannot be read."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(name) for name in sorted(set(names())) if name.startswith(incomplete)]
        except AttuneError:  # a shell that completes has nowhere to show it
            return []

    return complete


def provider_names() -> Iterable[str]:
    """Return the configured providers."""
    return get_settings().providers


def model_names() -> Iterable[str]:
    """Return the models' ids."""
    from attune_worker.models.registry import Registry

    return [model.id for model in Registry.from_settings(get_settings()).all()]


def task_names() -> Iterable[str]:
    """Return the task types that come with a tier."""
    from attune_worker.models.task_types import TaskType

    return list(TaskType)


complete_providers = completing(provider_names)
complete_tiers = completing(lambda: list(ModelTier))
complete_tasks = completing(task_names)
complete_models = completing(model_names)


def operator() -> str:
    """Return who types this, for the record: ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
