import pytest

from attune_worker.store.outage import LONGEST_WAIT_SECONDS, Outage

ERROR = ConnectionError("away")


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outage(clock: Clock) -> Outage:
    return Outage(clock)


def test_always_worth_trying_while_it_answers(outage: Outage) -> None:
    """Nothing stands in the way of normal work."""
    assert all(outage.worth_trying() for _ in range(3))
    assert not outage.succeeded()
    assert not outage.away


def test_only_the_first_failure_and_the_first_answer_are_news(outage: Outage) -> None:
    """They are logged; the hundreds that follow are not."""
    assert [outage.failed(ERROR), outage.failed(ERROR)] == [True, False]
    assert outage.error is ERROR
    assert [outage.succeeded(), outage.succeeded()] == [True, False]
    assert [outage.worth_trying(), outage.worth_trying()] == [True, True]


def test_one_caller_tries_per_wait(outage: Outage, clock: Clock) -> None:
    """The others do not pay for the timeout, also while the try is under way or was never heard of again."""
    outage.failed(ERROR)
    clock.seconds = 0.9
    assert not outage.worth_trying()
    clock.seconds = 1.0
    assert [outage.worth_trying(), outage.worth_trying()] == [True, False]
    clock.seconds = 2.0
    assert outage.worth_trying()


def test_waits_double_up_to_the_longest(outage: Outage, clock: Clock) -> None:
    """A long outage costs one try in half a minute."""
    outage.failed(ERROR)
    waits = []
    for _ in range(7):
        began = clock.seconds
        while not outage.worth_trying():
            clock.seconds += 0.5
        outage.failed(ERROR)
        waits.append(clock.seconds - began)
    assert waits == [1, 2, 4, 8, 16, LONGEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS]
    outage.succeeded()
    outage.failed(ERROR)
    clock.seconds += 1
    assert outage.worth_trying()


def test_failures_of_calls_under_way_prolong_nothing(outage: Outage, clock: Clock) -> None:
    """Hundreds of commands time out together when Redis goes away; that is one failure, not hundreds."""
    for _ in range(100):
        outage.failed(ERROR)
        clock.seconds += 0.01
    assert outage.worth_trying()
