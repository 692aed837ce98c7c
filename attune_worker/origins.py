"""Which settings are in force, and where does each come from? Without secrets, for whoever looks for a mistake."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from attune_worker.settings import DEFAULT_FILE, PREFIX, Settings, masked

ALWAYS = ("redis_url", "broker_url", "result_backend", "namespace", "queue")
"""What client and workers must agree on; it is told when it is the default, too."""

URLS = frozenset({"redis_url", "broker_url", "result_backend", "proxy"})
"""Secrets that are shown without their passwords."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A setting by its name, such as ``retry.max_attempts``; ``origin`` is a file, a variable, or ``default``."""

    name: str
    value: str
    origin: str


def settings_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file that settings are read from; None: there is none."""
    path = Path(environ.get(f"{PREFIX}CONFIG") or DEFAULT_FILE)
    return path if path.is_file() else None


def origins(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[Origin]:
    """Return what was set, and what matters most, sorted; ``settings`` were loaded from the same environment."""
    sources: dict[tuple[str, ...], str] = {(name,): "default" for name in ALWAYS}
    if (file := settings_file(environ)) is not None:
        with file.open("rb") as stream:
            sources |= dict.fromkeys(_leaves(tomllib.load(stream)), str(file))
    variables = [name for name in environ if name.startswith(PREFIX) and name != f"{PREFIX}CONFIG"]
    for variable in sorted(variables, key=lambda name: name.count("__")):  # of two, the one that says more wins
        path = tuple(variable.removeprefix(PREFIX).lower().split("__"))
        table = _table(environ[variable])
        sources |= dict.fromkeys([path] if table is None else _leaves(table, *path), variable)
    return [Origin(".".join(path), _shown(settings, path), origin) for path, origin in sorted(sources.items())]


def _table(text: str) -> dict[str, Any] | None:
    """Return the table that a variable holds as JSON; None: it holds something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _leaves(table: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, *above, name)
        else:
            yield (*above, name)


def _shown(settings: Settings, path: tuple[str, ...]) -> str:
    found: Any = settings
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    if found is None:
        return "as redis_url" if path in {("broker_url",), ("result_backend",)} else ""
    return _told(found, path[-1])


def _told(value: Any, name: str) -> str:
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        if name in URLS:
            return masked(secret)
        return secret if secret.startswith("env:") else "***"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel | Mapping):
        return "a table"
    if isinstance(value, tuple | frozenset):
        words = [one for one in value if isinstance(one, str)]
        return ", ".join(words) if len(words) == len(value) else f"{len(value)} in all"
    return str(value)
