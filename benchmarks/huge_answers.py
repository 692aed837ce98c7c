"""How much memory does a provider take that answers without end? The process that calls it, at its peak.

    python benchmarks/huge_answers.py --markdown

Each answer is read by a process of its own, with the default limit (``http.max_response_bytes``); Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from report import machine, versions

from attune_worker.errors import ProviderError
from attune_worker.providers.base import HttpRequest
from attune_worker.providers.http import HttpSender
from attune_worker.sections import HttpSettings

MEGABYTE = 2**20
TIMEOUT_SECONDS = 60.0


def _packed(megabytes: int) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(squeeze.compress(bytes(MEGABYTE)) for _ in range(megabytes)), squeeze.flush()])


def answers(megabytes: int) -> Mapping[str, Iterator[bytes]]:
    """Return the answers to try, as what is sent."""
    packed = _packed(megabytes)
    twice = zlib.compress(packed, 9)

    def endless(header: bytes, before: bytes = b"", after: bytes = b"") -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\n"
        for _ in range(megabytes):
            yield before + bytes(MEGABYTE) + after

    def whole(header: bytes, body: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n%b\r\nContent-Length: %d\r\n\r\n" % (header, len(body)) + body

    return {
        f"{megabytes} MB, with its length": endless(b"Content-Length: %d" % (megabytes * MEGABYTE)),
        f"{megabytes} MB, without a length": endless(b"Connection: close"),
        f"{megabytes} MB, in chunks": endless(b"Transfer-Encoding: chunked", b"%x\r\n" % MEGABYTE, b"\r\n"),
        f"{megabytes} MB of zeros in gzip": whole(b"Content-Encoding: gzip", packed),
        "the same, packed twice": whole(b"Content-Encoding: gzip, deflate", twice),
    }


@contextmanager
def serving(parts: Iterator[bytes]) -> Iterator[str]:
    """Send the parts to whoever connects first; yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):  # the other side hangs up, as it should
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    for part in parts:
                        connection.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join(TIMEOUT_SECONDS)


def read(url: str, done: Connection) -> None:
    """Ask once, and send how the memory grew, how long it took, and what came of it."""
    sender = HttpSender(HttpSettings())
    with suppress(ProviderError):  # nobody listens there: what the first call needs in any case is there afterwards
        sender.send(HttpRequest("http://127.0.0.1:9/", {}, b"{}"), 1)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak_bytes(), time.perf_counter()
    try:
        sender.send(HttpRequest(url, {}, b"{}"), TIMEOUT_SECONDS)
        outcome = "answered"
    except ProviderError as error:
        outcome = error.type
    done.send((peak_bytes() - before, time.perf_counter() - began, outcome))


def peak_bytes() -> int:
    """Return the largest resident size of this process since it was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measured(parts: Iterator[bytes], start: Callable[..., multiprocessing.Process]) -> tuple[int, float, str]:
    """Return what one answer did to a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    with serving(parts) as url:
        process = start(target=read, args=(url, theirs))
        process.start()
        theirs.close()
        found: tuple[int, float, str] = ours.recv()
        process.join()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--markdown", action="store_true", help="print the table of the page")
    arguments = parser.parse_args(argv)
    start = multiprocessing.get_context("spawn").Process
    rows = []
    if arguments.markdown:
        print("| answer | grown by | over after |\n|---|---|---|")
    for name, parts in answers(arguments.megabytes).items():
        grown, seconds, outcome = measured(parts, start)
        rows.append({"answer": name, "grown_bytes": grown, "seconds": seconds, "outcome": outcome})
        print(f"| {name} | {grown / MEGABYTE:.0f} MB | {seconds:.2g} s |" if arguments.markdown else rows[-1])
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}
    print(facts, file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "rows": rows}))
    return int(any(row["outcome"] != "malformed_answer" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
