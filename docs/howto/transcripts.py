"""What do the commands say when a provider is down, and when there is no Redis? ``operate.md`` shows it.

    python -m docs.howto.transcripts           runs every command of the page and writes what it printed
    python -m docs.howto.transcripts --check   writes nothing; exit code 1 when an exit code has changed

Each ``console`` block of the page begins with ``$ attune-worker …``. Those above the line ``## Without Redis`` run
against a fleet of two workers with jobs behind them: the simulated Anthropic is overloaded, the simulated OpenAI
answers. Those below it run with a Redis URL that nobody answers at.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attune_worker.client import Client
from attune_worker.local import LocalFleet, simulated_providers
from attune_worker.settings import Settings
from attune_worker.simulator import FixedLatency, Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis

PAGE = Path(__file__).with_name("operate.md")
BLOCK = re.compile(r"^```console\n\$ (.+)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9])")
EXIT = re.compile(r"^\[exit code (\d+)\]$", re.MULTILINE)
WITHOUT_REDIS = "## Without Redis"

COLUMNS = 110
STOPS_SECONDS = 6.0
"""When a command that does not end by itself gets Ctrl-C."""

LONGEST_SECONDS = 120.0
LONGEST_LINES = 75
"""Of a longer output the page shows the beginning."""

CONFIG = """
[retry]
max_attempts = 8
backoff_seconds = 0.05

[[budgets]]
per = "day"
limit_usd = "5"

[[budgets]]
per = "month"
limit_usd = "50"
tenant = "*"

[[providers.openai.credentials]]
name = "team-b"
secret = "env:OPENAI_API_KEY_B"
"""

REVOKED = "sk-revoked"
"""The key that the provider refuses; no secret, and on no page."""

CODE = '''"""A module to count."""


def mean(values):
    # the empty list has no mean
    return sum(values) / len(values)
'''


@contextmanager
def fleet(folder: Path) -> Iterator[tuple[dict[str, str], Simulator]]:
    """Yield the environment of a fleet with a history, in which one provider is down, and the provider that is up."""
    own = {name: text for name, text in os.environ.items() if not name.startswith(("ATTUNE_", "FLOWER_"))}
    config = folder / "attune.toml"
    config.write_text(CONFIG)
    quick = FixedLatency(seconds=0.05)
    down = Profile(latency=quick, errors={"overloaded": 1.0})
    with (
        EmbeddedRedis(folder / "redis") as redis,
        Simulator(Profile(latency=quick, refused_keys=(REVOKED,))) as openai,
        Simulator(Profile(latency=quick)) as anthropic,
    ):
        environ = own | simulated_providers(anthropic.url, openai.openai_url)
        environ |= {
            "ATTUNE_CONFIG": str(config),
            "ATTUNE_REDIS_URL": redis.url,
            "ATTUNE_AUTH__FILE": str(folder / "auth.json"),
            "ATTUNE_RETENTION_SECONDS": "3600",
            "OPENAI_API_KEY_B": REVOKED,
            "FLOWER_BASIC_AUTH": "somebody:a-password",
        }
        environ.pop("ATTUNE_PROVIDERS__GOOGLE__API_KEY")
        with LocalFleet(2, environ, folder / "workers", concurrency=20) as workers:
            workers.wait_until_ready()
            _work(environ, 60)
            anthropic.profile = down
            _work(environ, 40)
            yield environ, openai


def _work(environ: Mapping[str, str], jobs: int) -> None:
    """Have a number of jobs run to their end."""
    tasks = ("summarize", "fix_bug", "final_review")
    with Client(Settings.load(environ=environ)) as client:
        handles = client.submit_many(
            [
                {
                    "task_type": tasks[number % 3],
                    "prompt": f"Text {number}. " + "word " * 200,
                    "workflow": "nightly",
                    "tenant": f"tenant-{number % 2}",
                    "max_tokens": 500,
                }
                for number in range(jobs)
            ]
        )
        for handle in handles:
            handle.result(LONGEST_SECONDS)


def nobody(folder: Path) -> dict[str, str]:
    """Return an environment whose Redis is away."""
    own = {name: text for name, text in os.environ.items() if not name.startswith(("ATTUNE_", "FLOWER_"))}
    return own | {
        "ATTUNE_REDIS_URL": "redis://:a-password@127.0.0.1:1/0",
        "ATTUNE_AUTH__FILE": str(folder / "auth.json"),
    }


def run(line: str, environ: Mapping[str, str], folder: Path) -> tuple[str, int]:
    """Run a command line at a terminal, ending it with Ctrl-C when it does not end, and return screen and exit code."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', '')}"
    terminal = {"PATH": path, "TERM": "dumb", "PYTHONWARNINGS": "ignore", "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 200, COLUMNS, 0, 0))
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {line}"],
        cwd=folder,
        env={**environ, **terminal},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    endless = line.split()[1] in {"worker", "dashboard", "simulator"} or " watch" in line
    began, stopped, screen = time.monotonic(), False, b""
    os.set_blocking(ours, False)
    while True:
        try:
            part = os.read(ours, 65536)
            if not part:
                break
            screen += part
        except BlockingIOError:
            if process.poll() is not None:
                break
            time.sleep(0.02)
        except OSError:  # the other side is closed
            break
        if endless and not stopped and time.monotonic() - began > STOPS_SECONDS:
            os.killpg(process.pid, signal.SIGINT)
            stopped = True
        if time.monotonic() - began > LONGEST_SECONDS:
            os.killpg(process.pid, signal.SIGKILL)
    os.close(ours)
    return _plain(screen.decode(errors="replace")), process.wait()


def _plain(screen: str) -> str:
    """Return what is left on the screen, without what moves the cursor, and without this machine's names."""
    text = ESCAPE.sub("", screen.replace("\r\n", "\n"))
    text = re.sub(r"[^\n]*\r", "", text)
    text = re.sub(rf"{tempfile.gettempdir()}/[\w.-]*transcripts[\w.-]*", "/srv", text)
    text = re.sub(r"Linux-\S+", "Linux", text).replace(sys.prefix, "/srv/venv").replace(str(Path.cwd()), "/srv")
    text = text.replace(os.uname().nodename, "host").replace(str(Path.home()), "~")
    lines = [line.rstrip() for line in text.strip("\n").split("\n")]
    cut = [*lines[:LONGEST_LINES], "…"] if len(lines) > LONGEST_LINES else lines
    return "\n".join(cut)


def rewritten(text: str) -> tuple[str, list[str]]:
    """Run every command of a page; return the page with what they printed, and which exit codes have changed."""
    changed: list[str] = []
    live, heading, dead = text.partition(WITHOUT_REDIS)
    with tempfile.TemporaryDirectory(prefix="transcripts-") as name:
        folder = Path(name)
        (folder / "mean.py").write_text(CODE)
        (folder / "jobs.jsonl").write_text('{"id": "a", "task_type": "summarize", "prompt": "A text."}\n')

        def blocks(part: str, environ: Mapping[str, str], provider: Simulator | None = None) -> str:
            def ran(block: re.Match[str]) -> str:
                if provider is not None:
                    (folder / "invoice.json").write_text(json.dumps(provider.invoice()))
                screen, code = run(block[1], environ, folder)
                before = EXIT.search(block[2])
                if block[2] and int(before[1] if before else 0) != code:
                    changed.append(f"{block[1]}: exit code {code}")
                told = f"\n[exit code {code}]" if code else ""
                return f"```console\n$ {block[1]}\n{screen}{told}\n```"

            return BLOCK.sub(ran, part)

        with fleet(folder) as (environ, openai):
            live = blocks(live, environ, openai)
        dead = blocks(dead, nobody(folder))
    return live + heading + dead, changed


def main() -> int:
    """Run it."""
    text = PAGE.read_text(encoding="utf-8")
    page, changed = rewritten(text)
    if "--check" in sys.argv[1:]:
        print("\n".join(changed) or "the exit codes are those of the page")
        return int(bool(changed))
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
