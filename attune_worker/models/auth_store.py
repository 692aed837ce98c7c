"""Where is the auth strategy kept? In a file of its own, or in Redis for the whole fleet."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import click

from attune_worker.errors import ConfigurationError
from attune_worker.settings import Settings, masked
from attune_worker.store.connection import RedisClient, ask, close_idle, connect, reaching
from attune_worker.store.keys import FleetKeys

MAX_BYTES = 65_536
"""No strategy is that long; whatever else the file is need not be read to the end."""

Stamp = tuple[int, ...] | bytes


class Saved(NamedTuple):
    """What is kept; a ``stamp`` that stays the same means that it does."""

    raw: bytes
    stamp: Stamp


class FileStore:
    """One file, replaced as a whole. Raises ``ConfigurationError`` where the system refuses."""

    kind = "file"

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def place(self) -> str:
        """The file's name, for messages."""
        return str(self._path)

    def stamp(self) -> Stamp | None:
        """Return what tells one version from another; None: there is no file."""
        with self._allowed("read"):
            try:
                return _stamp(self._path.stat())
            except FileNotFoundError:
                return None

    def read(self) -> Saved | None:
        """Return what the file holds; None: there is no file."""
        with self._allowed("read"):
            try:
                with self._path.open("rb") as stream:
                    return Saved(stream.read(MAX_BYTES), _stamp(os.fstat(stream.fileno())))
            except FileNotFoundError:
                return None

    def write(self, raw: bytes) -> None:
        """Replace the file so that a crash leaves the old or the new one; only its owner may read it."""
        with self._allowed("written"):
            target = self._path.resolve()  # a link stays a link
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, draft = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # with mode 0600
            try:
                with os.fdopen(number, "wb") as stream:
                    stream.write(raw)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(draft, target)  # noqa: PTH105  # atomic, and named so
            except BaseException:
                with suppress(FileNotFoundError):
                    Path(draft).unlink()
                raise
            _sync_folder(target.parent)

    def clear(self) -> None:
        """Remove the file."""
        with self._allowed("removed"):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Do nothing: no file stays open."""

    @contextmanager
    def _allowed(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name with a null in it
            told = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(f"{self.place}: cannot be {what}: {told}; see auth.file") from None


class RedisStore:
    """One key that the fleet shares. Raises ``ServiceUnavailableError`` while Redis is away."""

    kind = "redis"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._key = FleetKeys(settings.namespace).auth
        self._redis: RedisClient | None = None

    @property
    def place(self) -> str:
        """The key and its server, for messages."""
        return f"{self._key} in Redis at {masked(self._settings.redis_url.get_secret_value())}"

    def stamp(self) -> Stamp | None:
        """Return what tells one version from another; None: there is none."""
        saved = self.read()
        return None if saved is None else saved.stamp

    def read(self) -> Saved | None:
        """Return what the key holds; None: there is no such key."""
        raw = self._ask("GET", self._key)
        return None if raw is None else Saved(raw, raw)

    def write(self, raw: bytes) -> None:
        """Replace what the key holds. It has no TTL: what an operator has decided must not lapse."""
        self._ask("SET", self._key, raw)

    def clear(self) -> None:
        """Remove the key."""
        self._ask("DEL", self._key)

    def close(self) -> None:
        """Give the connections back."""
        if self._redis is not None:
            close_idle(self._redis)

    def _ask(self, *command: str | bytes) -> Any:
        with reaching(self._settings):
            self._redis = self._redis or connect(self._settings)
            return ask(self._redis, command)


def auth_store(settings: Settings) -> FileStore | RedisStore:
    """Return where ``settings.auth`` says that the strategy is kept."""
    if settings.auth.store == "redis":
        return RedisStore(settings)
    file = settings.auth.file
    try:
        return FileStore(Path(click.get_app_dir("attune-worker"), "auth.json") if file is None else file.expanduser())
    except RuntimeError:
        raise ConfigurationError(f"auth.file: {file}: there is no home folder; give the whole path") from None


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_ino, status.st_dev, status.st_size


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
