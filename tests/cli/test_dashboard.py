import os
import signal
import subprocess
import sys

import httpx
import pytest

from attune_worker.store.embedded import free_port
from tests.conftest import PATIENCE_SECONDS

PASSWORD = "admin:a-long-password"


@pytest.fixture
def dashboard(environ):
    """Return a function that starts the dashboard in a process of its own, with or without a password."""

    def start(port, **variables):
        return subprocess.Popen(
            [sys.executable, "-m", "attune_worker", "dashboard", "--port", str(port)],
            env={**os.environ, **environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def answered(url, **options):
    """Return the status of an answer, None while there is none."""
    try:
        return httpx.get(url, timeout=PATIENCE_SECONDS, **options).status_code
    except httpx.TransportError:
        return None


def test_dashboard_is_flower_on_loopback_behind_a_password(dashboard, until):
    """Without it, or with a wrong one, nothing is shown; SIGTERM ends it."""
    port = free_port()
    process = dashboard(port, FLOWER_BASIC_AUTH=PASSWORD)
    url = f"http://127.0.0.1:{port}/workers"
    try:
        assert until(lambda: process.poll() or answered(url)) == 401
        assert answered(url, auth=("admin", "wrong")) == 401
        assert answered(url, auth=tuple(PASSWORD.split(":"))) == 200
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    assert PASSWORD not in said


@pytest.mark.parametrize("password", ["", "admin", "admin:", ":secret", "admin:secret,", " : "])
def test_dashboard_does_not_start_without_a_password(invoke, monkeypatch, password):
    """Whoever reaches Flower can stop workers."""
    monkeypatch.setenv("FLOWER_BASIC_AUTH", password)
    shown = invoke("dashboard", code=2).output
    assert "FLOWER_BASIC_AUTH: Flower is not started without a password" in shown
    assert "secret" not in shown
