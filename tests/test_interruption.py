"""Is a job broken off where it stands, once, and for the reason that was given first?"""

import threading

import pytest

from attune_worker.errors import StoppedError
from attune_worker.interruption import Interruption

SOON = 60.0


@pytest.mark.parametrize("how", ["stop", "wind_down"])
def test_wait_ends_when_the_job_is_stopped(how: str) -> None:
    """At once, in whichever way it is stopped; before that it lasts as long as it was told."""
    interruption = Interruption()
    assert not interruption.wait(0.001)
    threading.Timer(0.01, getattr(interruption, how), ["cancelled"]).start()
    assert interruption.wait(SOON)
    assert interruption.stopped


def test_call_is_cut_off_once() -> None:
    """However often the job is stopped."""
    interruption = Interruption()
    cuts: list[int] = []
    interruption.cut_with(lambda: cuts.append(1))
    interruption.stop("cancelled")
    interruption.stop("again")
    assert cuts == [1]


def test_call_goes_on_while_the_job_winds_down() -> None:
    """Until it is stopped after all."""
    interruption = Interruption()
    cuts: list[int] = []
    interruption.cut_with(lambda: cuts.append(1))
    interruption.wind_down("the worker ends")
    assert (interruption.stopped, interruption.cut_off, cuts) == (True, False, [])
    interruption.stop("its time is up")
    assert (interruption.cut_off, cuts) == (True, [1])
    assert interruption.error().message == "the worker ends"


def test_call_that_begins_after_the_stop_is_cut_at_once() -> None:
    """There is no moment in which a stop is lost."""
    interruption = Interruption()
    interruption.stop("cancelled")
    cuts: list[int] = []
    interruption.cut_with(lambda: cuts.append(1))
    assert cuts == [1]


def test_what_is_over_is_not_cut() -> None:
    """The next call of the same thread has nothing to do with it."""
    interruption = Interruption()
    cuts: list[int] = []
    interruption.cut_with(lambda: cuts.append(1))
    interruption.cut_with(None)
    interruption.stop("cancelled")
    assert cuts == []


def test_cut_that_has_begun_ends_before_the_next_call_begins() -> None:
    """Otherwise it could hit a connection that is used for something else by then."""
    interruption = Interruption()
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def cut() -> None:
        begun.set()
        go_on.wait(SOON)
        order.append("cut")

    interruption.cut_with(cut)
    stopping = threading.Thread(target=interruption.stop, args=["cancelled"])
    stopping.start()
    assert begun.wait(SOON)
    threading.Timer(0.05, go_on.set).start()
    interruption.cut_with(None)
    order.append("next")
    stopping.join()
    assert order == ["cut", "next"]


def test_call_begins_while_the_job_is_entitled_to_it() -> None:
    """Without a condition always; once it failed the job has wound down for good, for the reason that goes with it."""
    interruption = Interruption()
    assert interruption.may_begin()
    holds = [True]
    interruption.only_while(lambda: holds[0], "its lease was lost")
    assert interruption.may_begin()
    holds[0] = False
    assert not interruption.may_begin()
    holds[0] = True
    assert not interruption.may_begin()
    assert (interruption.stopped, interruption.cut_off) == (True, False)
    assert interruption.error().message == "its lease was lost"


@pytest.mark.parametrize("how", ["stop", "wind_down"])
def test_no_call_begins_after_the_job_was_stopped(how: str) -> None:
    """In whichever way, and though the job is entitled to it."""
    interruption = Interruption()
    interruption.only_while(lambda: True, "its lease was lost")
    getattr(interruption, how)("cancelled")
    assert not interruption.may_begin()
    assert interruption.error().message == "cancelled"


def test_error_tells_the_reason() -> None:
    """For the record of the job."""
    interruption = Interruption()
    interruption.stop("cancelled")
    assert isinstance(interruption.error(), StoppedError)
    assert (interruption.error().type, interruption.error().message) == ("stopped", "cancelled")
