"""Which crashes are the same? Those of one type at one place."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_SHOWN = 300
"""Characters of an input that are shown."""


class Crashes:
    """Notes crashes, and the shortest input that led to each."""

    def __init__(self) -> None:
        self.by_place: dict[str, str] = {}

    @contextmanager
    def noted(self, data: bytes) -> Iterator[None]:
        """Note what is raised inside, and go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # what a search is looking for
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: {str(error)[:100]!r}"
            if len(shown := repr(data)[:MAX_SHOWN]) < len(self.by_place.get(place, " " * (MAX_SHOWN + 1))):
                self.by_place[place] = shown
