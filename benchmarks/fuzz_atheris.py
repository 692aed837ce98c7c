"""Which inputs reach new code? libFuzzer searches for them, for one target; ``fuzz.py`` starts it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import atheris
from fuzz_crashes import Crashes

with atheris.instrument_imports(include=["attune_worker", "fuzz_targets", "h11"]):
    from fuzz_targets import TARGETS, http_target

MAX_BYTES = 20_000


def main(name: str, seconds: float) -> None:
    """Search for ``seconds``, print what was found as JSON, and end the process."""
    crashes, ends, tried = Crashes(), time.monotonic() + seconds, 0
    with http_target() as http, tempfile.TemporaryDirectory() as corpus:
        [target] = (one for one in (*TARGETS, http) if one.name == name)
        for number, one in enumerate((*target.seeds, *target.words)):
            Path(corpus, str(number)).write_bytes(one)

        def run(data: bytes) -> None:
            nonlocal tried
            if time.monotonic() > ends:
                print(json.dumps({"tried": tried, "crashes": crashes.by_place}), flush=True)
                os._exit(0)  # libFuzzer has no other end that lets us speak first
            tried += 1
            with crashes.noted(data):
                target.run(data)

        atheris.Setup([sys.argv[0], f"-max_len={MAX_BYTES}", "-verbosity=0", corpus], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
