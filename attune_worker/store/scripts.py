"""How does a Lua script get to Redis, and what if Redis has forgotten it?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from redis import Redis
from redis.exceptions import NoScriptError

Argument = str | bytes | int | float


class Script:
    """One Lua file with the fragments it uses, called by its digest and sent in full when Redis does not know it."""

    def __init__(self, name: str, *fragments: str) -> None:
        self.name = name
        self.text = "\n".join(_source(part) for part in (*fragments, name))
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, redis: Redis, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run the script; it may run twice when the connection breaks, which every script here allows for."""
        try:
            return redis.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return redis.eval(self.text, len(keys), *keys, *args)

    def many(self, redis: Redis, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
        """Run the script once for each ``(keys, args)``, all in one round trip, and return the answers in order."""
        with redis.pipeline(transaction=False) as pipeline:
            for keys, args in calls:
                pipeline.evalsha(self.sha, len(keys), *keys, *args)
            answers = pipeline.execute(raise_on_error=False)
        for index, answer in enumerate(answers):
            if isinstance(answer, NoScriptError):
                answers[index] = self(redis, *calls[index])
            elif isinstance(answer, Exception):
                raise answer
        return answers


@cache
def _source(name: str) -> str:
    return files("attune_worker.store").joinpath("lua", f"{name}.lua").read_text("utf-8")
