import pickle

import pytest

from attune_worker import errors
from attune_worker.errors import (
    AttuneError,
    ConfigurationError,
    InvalidJobError,
    JobNotFoundError,
    ProviderError,
    RateLimitedError,
    ResultTimeoutError,
    ServiceUnavailableError,
)

PROVIDER_ERRORS = [
    # class, retryable, counts against the breaker, may have cost
    (errors.RateLimitedError, True, False, False),
    (errors.CredentialError, False, False, False),
    (errors.OverloadedError, True, True, False),
    (errors.ProviderTimeoutError, True, True, True),
    (errors.ProviderConnectionError, True, True, True),
    (errors.MalformedAnswerError, True, True, True),
    (errors.BadRequestError, False, False, False),
    (errors.ContextTooLongError, False, False, False),
]

EXIT_CODES = [
    (errors.ConfigurationError, 2),
    (errors.InvalidJobError, 2),
    (errors.IdempotencyConflictError, 2),
    (errors.ServiceUnavailableError, 3),
    (errors.JobNotFoundError, 1),
    (errors.ResultTimeoutError, 1),
    (errors.NoCandidateError, 1),
    (errors.DeadlineExceededError, 1),
]


def every_class(base: type[AttuneError] = AttuneError) -> set[type[AttuneError]]:
    return {base}.union(*(every_class(kind) for kind in base.__subclasses__()))


@pytest.mark.parametrize(("kind", "retryable", "counts", "may_have_cost"), PROVIDER_ERRORS)
def test_provider_failures_mean_what_the_design_says(
    kind: type[ProviderError], retryable: bool, counts: bool, may_have_cost: bool
) -> None:
    """Retry, breaker and ledger act on these facts alone, so each class must carry the right ones."""
    error = kind("words")
    assert (error.retryable, error.counts_against_breaker, error.may_have_cost) == (retryable, counts, may_have_cost)
    assert error.exit_code == 1


def test_table_of_provider_failures_is_complete() -> None:
    """A new class of failure needs a decision about what it means."""
    assert every_class(ProviderError) - {ProviderError} == {kind for kind, *_ in PROVIDER_ERRORS}


@pytest.mark.parametrize(("kind", "exit_code"), EXIT_CODES)
def test_exit_codes_tell_wrong_usage_from_failed_work(kind: type[AttuneError], exit_code: int) -> None:
    """Scripts tell by the exit code whether to fix the call, start a service, or look at the job."""
    assert kind.exit_code == exit_code
    assert not kind.counts_against_breaker


def test_types_are_distinct() -> None:
    """Results name errors by ``type``, so no two classes may share one."""
    kinds = every_class()
    assert len({kind.type for kind in kinds}) == len(kinds)


def test_waiting_too_long_is_a_timeout_for_python_too() -> None:
    """Callers that know only the standard library catch it as ``TimeoutError``."""
    with pytest.raises(TimeoutError, match=r"job-1 had not ended after 2\.5 s"):
        raise ResultTimeoutError("job-1", 2.5)


def test_bad_job_in_a_batch_is_named_by_its_index() -> None:
    """The index is in the message and in a field, the reason stays available without it."""
    error = InvalidJobError("no", field="prompt", index=3)
    assert (str(error), error.reason, error.field, error.index) == ("job 3: no", "no", "prompt", 3)


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("a key is wrong"),
        InvalidJobError("no", field="prompt", index=3),
        JobNotFoundError("job-1"),
        ResultTimeoutError("job-1", 2.5),
        ServiceUnavailableError("away", url="redis://h", job_ids=["a"]),
        RateLimitedError("slow down", provider="p", model_id="m", status=429, retry_after=2.0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_the_way_to_another_process(error: AttuneError) -> None:
    """Pools of processes pickle errors, and Celery rebuilds them from their arguments: neither may garble them."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert str(type(error)(*error.args)) == str(error)
