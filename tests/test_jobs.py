import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.errors import InvalidJobError
from attune_worker.jobs import Attempt, Job, JobResult, JobStatus, ModelTier, Usage, total_cost

SECRET = "the merger with Initech is off"

MINIMAL = {"task_type": "summarize", "prompt": SECRET}


def refused(fields: Mapping[str, Any]) -> InvalidJobError:
    with pytest.raises(InvalidJobError) as caught:
        Job.parse(fields)
    return caught.value


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "task_type", "required"),
        ({"task_type": "summarize"}, None, "either 'prompt' or 'messages'"),
        ({**MINIMAL, "messages": [{"role": "user", "content": SECRET}]}, None, "and not both"),
        ({"task_type": "summarize", "prompt": ""}, None, "'prompt' is empty"),
        ({"task_type": "summarize", "prompt": " \n\t"}, None, "'prompt' is empty"),
        ({"task_type": "", "prompt": SECRET}, "task_type", "at least 1 character"),
        ({"task_type": "x" * 257, "prompt": SECRET}, "task_type", "at most 256 character"),
        ({"task_type": 5, "prompt": SECRET}, "task_type", "valid string"),
        ({"task_type": "summarize", "prompt": [SECRET]}, "prompt", "valid string"),
        ({"task_type": "summarize", "messages": []}, None, "role 'user'"),
        ({"task_type": "summarize", "messages": [{"role": "system", "content": SECRET}]}, None, "role 'user'"),
        (
            {"task_type": "summarize", "messages": [{"role": "robot", "content": SECRET}]},
            "messages.0.role",
            "'system', 'user' or 'assistant'",
        ),
        ({"task_type": "summarize", "messages": [{"role": "user", "content": ""}]}, "messages.0.content", "at least 1"),
        ({"task_type": "summarize", "messages": SECRET}, "messages", "tuple"),
        ({**MINIMAL, "tier_hint": "gold"}, "tier_hint", "'cheap', 'capable' or 'premium'"),
        ({**MINIMAL, "max_cost": -1}, "max_cost", "greater than or equal to 0"),
        ({**MINIMAL, "max_cost": math.nan}, "max_cost", "finite number"),
        ({**MINIMAL, "max_cost": "Infinity"}, "max_cost", "finite number"),
        ({**MINIMAL, "max_cost": "a lot"}, "max_cost", "valid decimal"),
        ({**MINIMAL, "max_latency_ms": 0}, "max_latency_ms", "greater than 0"),
        ({**MINIMAL, "max_latency_ms": -5}, "max_latency_ms", "greater than 0"),
        ({**MINIMAL, "min_success_rate": 1.01}, "min_success_rate", "less than or equal to 1"),
        ({**MINIMAL, "min_success_rate": math.nan}, "min_success_rate", "less than or equal to 1"),
        ({**MINIMAL, "max_tokens": 0}, "max_tokens", "greater than 0"),
        ({**MINIMAL, "max_tokens": 1.5}, "max_tokens", "fractional part"),
        ({**MINIMAL, "max_tokens": 10**5000}, "max_tokens", "less than or equal to"),
        ({**MINIMAL, "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({**MINIMAL, "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({**MINIMAL, "stop": [""]}, "stop.0", "at least 1 character"),
        ({**MINIMAL, "stop": 7}, "stop", "tuple"),
        ({**MINIMAL, "tenant": ""}, "tenant", "at least 1 character"),
        ({**MINIMAL, "idempotency_key": "k" * 257}, "idempotency_key", "at most 256"),
        ({**MINIMAL, "priority": 10}, "priority", "less than or equal to 9"),
        ({**MINIMAL, "priority": -1}, "priority", "greater than or equal to 0"),
        ({**MINIMAL, "priority": 10**400}, "priority", "less than or equal to 9"),
        ({**MINIMAL, "deadline_seconds": 0}, "deadline_seconds", "greater than 0"),
        ({**MINIMAL, "deadline_seconds": -1}, "deadline_seconds", "greater than 0"),
        ({**MINIMAL, "deadline_seconds": math.inf}, "deadline_seconds", "finite number"),
        ({**MINIMAL, "deadline_seconds": 1e300}, "deadline_seconds", "less than or equal to"),
        ({**MINIMAL, "metadata": {"a": math.nan}}, "metadata", "not JSON compliant"),
        ({**MINIMAL, "metadata": {"a": {"b": [math.inf]}}}, "metadata", "not JSON compliant"),
        ({**MINIMAL, "metadata": {"a": 10**5000}}, "metadata", "limit"),
        ({**MINIMAL, "metadata": {"a": object()}}, "metadata.a", "JSON"),
        ({**MINIMAL, "metadata": {"a": Decimal(1)}}, "metadata.a", "JSON"),
        ({**MINIMAL, "metadata": {1: "a"}}, "metadata.1.[key]", "valid string"),
        ({**MINIMAL, "metadata": [1]}, "metadata", "valid dictionary"),
        ({**MINIMAL, "metadata": {"deep": deep(50_000)}}, None, ""),
    ],
)
def test_wrong_fields_are_refused_in_one_line_that_names_the_field(
    fields: Mapping[str, Any], field: str | None, words: str
) -> None:
    """The message says what is allowed, and never repeats the text of the job."""
    error = refused(fields)
    assert field is None or error.field == field
    assert words in str(error)
    assert "\n" not in str(error)
    assert SECRET not in str(error)
    assert SECRET not in repr(error)


def test_unknown_field_is_answered_with_the_allowed_ones() -> None:
    """A typo is an error at submission, not a setting that silently does nothing."""
    error = refused({**MINIMAL, "max_token": 5})
    assert error.field == "max_token"
    assert "unknown field; allowed: task_type, prompt, messages" in str(error)
    assert "max_tokens" in str(error)


@pytest.mark.parametrize("fields", [None, "summarize", ["task_type"], 7])
def test_what_is_no_object_is_no_job(fields: Any) -> None:
    """Callers in other languages may send anything."""
    assert "a job is an object" in str(refused(fields))


def test_bad_job_in_a_batch_says_where_it_stands() -> None:
    """The caller of a batch must find the one job that is wrong."""
    with pytest.raises(InvalidJobError, match=r"^job 7: 'prompt' is empty") as caught:
        Job.parse({"task_type": "summarize", "prompt": ""}, index=7)
    assert caught.value.index == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "half a \ud83d smile"},
        {"prompt": "fine", "system": "\udfff"},
        {"prompt": "fine", "metadata": {"note": "\ud800"}},
    ],
)
def test_text_that_is_no_unicode_is_refused_before_it_is_written(fields: dict[str, Any]) -> None:
    """Half a surrogate pair cannot be stored or sent, so the record refuses it with a typed error."""
    with pytest.raises(InvalidJobError, match="lone surrogate"):
        Job.parse({"task_type": "summarize", **fields}).to_json()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda words: words.strip())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
money = st.decimals(min_value=0, max_value=10**6, places=9, allow_nan=False, allow_infinity=False)
question = st.one_of(
    st.fixed_dictionaries({"prompt": text}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": text}),
                min_size=1,
                max_size=4,
            ).map(lambda turns: [*turns, {"role": "user", "content": "?"}])
        }
    ),
)
options = st.fixed_dictionaries(
    {"task_type": names},
    optional={
        "system": text,
        "workflow": names,
        "stage": names,
        "model": names,
        "tier_hint": st.sampled_from(ModelTier),
        "provider_hint": names,
        "max_cost": money,
        "max_latency_ms": st.integers(1, 2**31 - 1),
        "min_success_rate": st.floats(0, 1),
        "max_tokens": st.integers(1, 2**31 - 1),
        "temperature": st.floats(0, 2),
        "stop": st.lists(names, max_size=3),
        "tenant": names,
        "user_id": names,
        "session_id": names,
        "idempotency_key": names,
        "priority": st.integers(0, 9),
        "deadline_seconds": st.floats(0.001, 10**6),
        "metadata": st.dictionaries(names, json_values, max_size=3),
    },
)


@given(question, options)
def test_record_gives_back_the_job_that_was_written(asked: dict[str, Any], fields: dict[str, Any]) -> None:
    """Every field survives the way through Redis, whatever text it holds."""
    job = Job.parse(asked | fields)
    assert Job.from_json(job.to_json()) == job
    assert Job.from_json(job.to_json().encode()) == job


@given(question, options)
def test_same_job_is_written_the_same_way(asked: dict[str, Any], fields: dict[str, Any]) -> None:
    """The record's digest tells a repeated submission from a different job."""
    assert Job.parse(asked | fields).to_json() == Job.parse(asked | fields).to_json()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ('{"v":2,"task_type":"x","prompt":"y"}', "version 1"),
        ('{"task_type":"x","prompt":"y"}', "version 1"),
        ('{"v":"1","task_type":"x","prompt":"y"}', "version 1"),
        ("[]", "version 1"),
        ("null", "version 1"),
        ("{", "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        ('{"v":1,"task_type":"x","prompt":"y","from_the_future":1}', "unknown field"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_record_that_is_not_understood_is_refused(record: str | bytes, words: str) -> None:
    """A worker must not run half of what a newer client, or a broken one, has asked for."""
    with pytest.raises(InvalidJobError, match=words):
        Job.from_json(record)


def test_older_reader_reads_a_newer_result() -> None:
    """Workers and web backends are not upgraded in the same moment."""
    newer = {"job_id": "a", "status": "succeeded", "content": "hi", "invented_later": {"deep": [1]}}
    result = JobResult.model_validate_json(json.dumps(newer))
    assert (result.content, result.succeeded) == ("hi", True)


@given(money)
def test_money_is_written_as_a_plain_decimal_string(amount: Decimal) -> None:
    """No exponent and no float, or other languages read another amount."""
    result = JobResult(job_id="a", status=JobStatus.SUCCEEDED, cost_usd=amount)
    written = json.loads(result.model_dump_json())["cost_usd"]
    assert isinstance(written, str)
    assert set(written) <= set("0123456789.")
    assert Decimal(written) == amount
    assert JobResult.model_validate_json(result.model_dump_json()).cost_usd == amount


def test_small_amounts_have_no_exponent() -> None:
    """``str`` of a nano-dollar is 1E-9, which many JSON readers do not take for money."""
    attempt = Attempt(
        model_id="m", provider="p", tier=ModelTier.CHEAP, outcome="succeeded", latency_ms=1, cost_usd=Decimal("1E-9")
    )
    assert json.loads(attempt.model_dump_json())["cost_usd"] == "0.000000001"


def test_limit_given_as_a_float_is_the_number_that_was_typed() -> None:
    """0.1 is a tenth of a dollar, not the binary fraction next to it."""
    job = Job.parse({**MINIMAL, "max_cost": 0.1})
    assert job.max_cost == Decimal("0.1")
    assert '"max_cost":"0.1"' in job.to_json()


def test_total_is_what_is_known() -> None:
    """An attempt of unknown cost adds nothing, only unknown ones make the total unknown, and none cost nothing."""

    def attempt(cost: str | None) -> Attempt:
        usd = None if cost is None else Decimal(cost)
        return Attempt(model_id="m", provider="p", tier=ModelTier.CHEAP, outcome="failed", latency_ms=1, cost_usd=usd)

    assert total_cost([attempt("0.1"), attempt(None), attempt("0.2")]) == Decimal("0.3")
    assert total_cost([attempt(None)]) is None
    assert total_cost([]) == 0


@pytest.mark.parametrize(
    ("status", "ended"),
    [
        (JobStatus.UNKNOWN, False),
        (JobStatus.QUEUED, False),
        (JobStatus.RUNNING, False),
        (JobStatus.SUCCEEDED, True),
        (JobStatus.FAILED, True),
        (JobStatus.CANCELLED, True),
        (JobStatus.EXPIRED, True),
    ],
)
def test_status_says_whether_anything_more_will_happen(status: JobStatus, ended: bool) -> None:
    """Waiting callers stop at exactly these."""
    assert status.ended is ended


def test_one_stop_sequence_may_be_given_as_a_string() -> None:
    """A string would otherwise be taken for its letters."""
    assert Job.parse({**MINIMAL, "stop": "END"}).stop == ("END",)


def test_numbers_of_tokens_are_never_negative() -> None:
    """A negative count would pay the caller."""
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Usage(input_tokens=-1)


def test_wish_for_nothing_in_particular_is_none() -> None:
    """``auto`` is what a job without the field means, so both are the same job, also by their idempotency key."""
    fields = {"task_type": "summarize", "prompt": "?"}
    assert Job.parse({**fields, "auth_mode": "auto"}) == Job.parse(fields)
    assert Job.parse({**fields, "auth_mode": "subscription"}).to_json() != Job.parse(fields).to_json()
