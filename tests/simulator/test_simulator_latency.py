"""Latency and fate are pure functions of the seed and the call's number."""

from collections import Counter
from statistics import median

import pytest

from attune_worker.errors import ConfigurationError
from attune_worker.simulator import FixedLatency, LlmperfLatency, LognormalLatency, Profile, fate

CALLS = range(1, 4001)

LLMPERF = """\
provider,model_size,i,error_code,ttft_s,inter_token_latency_s,end_to_end_latency_s,input_tokens,output_tokens
fast,7b,0,,0.1,0.01,1.0,550,150
fast,7b,1,,0.1,0.01,2.0,550,150
fast,7b,2,429,,,9.0,550,0
slow,7b,0,,0.1,0.01,30.0,550,150
slow,7b,1,-1,,,,550,0
"""


@pytest.fixture
def measurements(tmp_path):
    """Return the path of a small file in llmperf's form."""
    path = tmp_path / "llmperf.csv"
    path.write_text(LLMPERF)
    return path


def latencies(profile):
    """Return how long each call takes."""
    return [fate(profile.seed, call, profile).latency_seconds for call in CALLS]


def test_a_number_is_a_fixed_latency():
    """The short form in a profile file."""
    assert Profile.parse({"latency": 0.25}).latency == FixedLatency(seconds=0.25)


def test_lognormal_latency_keeps_its_median():
    """Half of the calls are faster than the median, and the tail is long."""
    seconds = latencies(Profile(latency=LognormalLatency(median_seconds=2, sigma=1)))
    assert 1.85 < median(seconds) < 2.15
    assert max(seconds) > 20


def test_measured_latency_is_resampled_evenly(measurements):
    """Every answered request is drawn about equally often; failed ones never are."""
    drawn = Counter(latencies(Profile(latency=LlmperfLatency(path=measurements))))
    assert set(drawn) == {1.0, 2.0, 30.0}
    assert all(1200 < count < 1500 for count in drawn.values())


def test_one_provider_can_be_resampled(measurements):
    """The filter keeps that provider's rows."""
    assert set(latencies(Profile(latency=LlmperfLatency(path=measurements, provider="slow")))) == {30.0}


def test_latency_repeats_with_its_seed(measurements):
    """The same seed and call take the same time; another seed deals differently."""
    first, again, other = (
        latencies(Profile(seed=seed, latency=LlmperfLatency(path=measurements))) for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("provider", [None, "nobody"])
def test_unusable_measurements_are_refused_with_the_profile(tmp_path, measurements, provider):
    """A missing file, or one without a usable row, is a mistake in the profile."""
    path = measurements if provider else tmp_path / "missing.csv"
    with pytest.raises(ConfigurationError, match=str(path)):
        Profile.parse({"latency": {"kind": "llmperf", "path": str(path), "provider": provider}})


def test_a_file_of_another_form_is_refused(tmp_path):
    """The missing column is named."""
    path = tmp_path / "other.csv"
    path.write_text("provider,error_code\na,\n")
    with pytest.raises(ConfigurationError, match="end_to_end_latency_s"):
        Profile.parse({"latency": {"kind": "llmperf", "path": str(path)}})


def test_faults_hit_their_share_of_calls():
    """Over many calls each fault is as frequent as asked."""
    profile = Profile.parse({"errors": {"overloaded": 0.5, "hang": 0.1}})
    hits = Counter(fate(0, call, profile).fault for call in CALLS)
    assert abs(hits["overloaded"] / len(CALLS) - 0.5) < 0.03
    assert abs(hits["hang"] / len(CALLS) - 0.1) < 0.02
    assert sum(hits.values()) == hits["overloaded"] + hits["hang"] + hits[None]


def test_shares_that_fill_the_whole_leave_no_answer():
    """Ten tenths are one, whatever floating point makes of them."""
    faults = ["rate_limited", "overloaded", "server_error", "bad_request", "credential"]
    faults += ["spend_limit", "context_too_long", "hang", "disconnect", "truncated"]
    profile = Profile.parse({"errors": dict.fromkeys(faults, 0.1)})
    assert {fate(0, call, profile).fault for call in CALLS} == set(faults)
