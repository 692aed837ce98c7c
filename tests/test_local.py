"""Signals end what runs locally, wherever they come."""

import subprocess
import sys

import pytest

INTERRUPTED_FINALIZER = """
import os, signal, time
from attune_worker.local import end_on_signals

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.001)

end_on_signals()
Finalized()
time.sleep(30)
print("the signal was lost")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_within_a_finalizer_is_not_lost(name):
    """Python drops an exception from ``__del__``; the signal comes again when the finalizer is done."""
    script = INTERRUPTED_FINALIZER.format(name=name)
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in ran.stderr
    assert ran.returncode != 0
    assert not ran.stdout


INTERRUPTED_WORK = """
import os, signal, time
from attune_worker.local import end_on_signals, unbroken

@unbroken
def work():
    print("begun")
    inner()
    print("done", flush=True)

def inner():
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.1)

end_on_signals()
work()
time.sleep(30)
print("the signal was lost")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_what_must_not_break_off_comes_to_its_end_first(name):
    """The signal is not lost either: it comes when the work is done."""
    script = INTERRUPTED_WORK.format(name=name)
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["begun", "done"]
    assert "KeyboardInterrupt" in ran.stderr
