"""How does a Lua script get to Redis, and what if Redis has forgotten it?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from redis.exceptions import NoScriptError

from attune_worker.store.connection import RedisClient, ask, together

Argument = str | bytes | int | float


class Script:
    """One Lua file with the fragments it uses, called by its digest and sent in full when Redis does not know it."""

    def __init__(self, name: str, *fragments: str) -> None:
        self.name = name
        self.text = "\n".join(_source(part) for part in (*fragments, name))
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, redis: RedisClient, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run the script; it may run twice when the connection breaks, which every script here allows for."""
        try:
            return ask(redis, ("EVALSHA", self.sha, len(keys), *keys, *args))
        except NoScriptError:  # each node of a cluster remembers its own
            return redis.eval(self.text, len(keys), *keys, *args)

    def many(self, redis: RedisClient, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
        """Run the script once for each ``(keys, args)``, in one round trip (see ``together``), answers in order."""
        answers = together(redis, [(keys[0], ("EVALSHA", self.sha, len(keys), *keys, *args)) for keys, args in calls])
        for index, answer in enumerate(answers):
            if isinstance(answer, NoScriptError):
                answers[index] = self(redis, *calls[index])
            elif isinstance(answer, Exception):
                raise answer
        return answers


@cache
def _source(name: str) -> str:
    return files("attune_worker.store").joinpath("lua", f"{name}.lua").read_text("utf-8")
