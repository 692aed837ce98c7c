"""What do the fleet's counters say, once they are read? Garbage in a field counts as an empty one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

from attune_worker.jobs import NANO_USD
from attune_worker.telemetry.evidence import RING, Evidence
from attune_worker.telemetry.histogram import LAST, percentile_ms
from attune_worker.telemetry.sizes import Sizes

Fields = Mapping[bytes, bytes]

NOTHING = Evidence()

_SIZES = b"|sizes"
_LONGEST = 1e15
"""More bytes or tokens than any place has seen; what is longer is garbage."""


@dataclass(frozen=True, slots=True)
class Place:
    """A stage, a workflow or the whole fleet: its outcomes so far, how many were judged, and each model's evidence.

    The evidence, by ``provider/model_id``, is discounted to now; ``sizes`` are the lengths of its prompts and answers.
    """

    seen: int = 0
    judged: int = 0
    models: Mapping[str, Evidence] = field(default_factory=dict)
    sizes: Mapping[str, Sizes] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: Fields, half_life: float) -> Place:
        """Return what a hash of evidence holds."""
        seen = _count(fields.get(b"n"))
        of_models = {ref: text for ref, text in fields.items() if ref not in {b"n", b"judged"}}
        found = {_name(ref): evidence(text, seen) for ref, text in of_models.items() if not ref.endswith(_SIZES)}
        models = {ref: one.at(seen, half_life) for ref, one in found.items() if one.calls}
        lengths = {_name(ref[: -len(_SIZES)]): sizes(text) for ref, text in of_models.items() if ref.endswith(_SIZES)}
        known = {ref: one for ref, one in lengths.items() if one.usable}
        return cls(seen, _count(fields.get(b"judged")), models, known)

    def of(self, ref: str) -> Evidence:
        """Return what is known of one model."""
        return self.models.get(ref, NOTHING)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls of one model: how many, how they went, and what they took.

    Calls that say nothing about the model, such as those that hit a rate limit, neither succeeded nor failed.
    ``latency_ms`` is the sum, and ``latencies`` the histogram, of those that succeeded. ``scored`` calls got
    feedback, of ``score_milli`` thousandths together. ``cost_nano`` is without the ``unpriced`` calls.
    """

    calls: int = 0
    succeeded: int = 0
    failed: int = 0
    cost_nano: int = 0
    unpriced: int = 0
    input: int = 0
    output: int = 0
    latency_ms: int = 0
    scored: int = 0
    score_milli: int = 0
    latencies: Mapping[int, int] = field(default_factory=dict)

    @property
    def success_rate(self) -> float | None:
        """Share of the calls that succeeded, of those that say something; None: there were none."""
        return _ratio(self.succeeded, self.succeeded + self.failed)

    @property
    def avg_cost_usd(self) -> Decimal | None:
        """Mean cost of the calls whose cost is known, in USD, to the nano-dollar; None: of none it is known."""
        priced = self.calls - self.unpriced
        return (Decimal(self.cost_nano) / priced * NANO_USD).quantize(NANO_USD) if priced > 0 else None

    @property
    def avg_latency_ms(self) -> float | None:
        """Mean time that an answer took; None: there was none."""
        return _ratio(self.latency_ms, self.succeeded)

    @property
    def p95_latency_ms(self) -> int | None:
        """Time that 95 of 100 answers did not pass; None: there was none."""
        return percentile_ms(self.latencies, 0.95)

    @property
    def avg_score(self) -> float | None:
        """Mean score, 0 to 1, of the calls that got feedback; None: none did."""
        score = _ratio(self.score_milli, self.scored)
        return None if score is None else score / 1000

    @classmethod
    def total(cls, parts: Iterable[Traffic]) -> Traffic:
        """Return the sum of several."""
        sums = dict.fromkeys(_COUNTERS, 0)
        latencies: dict[int, int] = {}
        for one in parts:
            for name in _COUNTERS:
                sums[name] += getattr(one, name)
            for bucket, count in one.latencies.items():
                latencies[bucket] = latencies.get(bucket, 0) + count
        return cls(**sums, latencies=latencies)


_COUNTERS = (
    "calls",
    "succeeded",
    "failed",
    "cost_nano",
    "unpriced",
    "input",
    "output",
    "latency_ms",
    "scored",
    "score_milli",
)
_BUCKETS = {f"h{bucket}": bucket for bucket in range(LAST + 1)}


@dataclass(frozen=True, eq=False)
class StageView:
    """All that a decision about one stage needs; ``traffic`` is that of the last two days, by model.

    ``derived`` is for its readers, to keep what they made of it for as long as it stands.
    """

    stage: Place = field(default_factory=Place)
    workflow: Place = field(default_factory=Place)
    fleet: Place = field(default_factory=Place)
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def p95_ms(self) -> Mapping[str, tuple[int, int]]:
        """For each model that has answered: the time that 95 of 100 answers did not pass, and the number of answers."""
        found = {ref: (one.p95_latency_ms, sum(one.latencies.values())) for ref, one in self.traffic.items()}
        return {ref: (p95, answers) for ref, (p95, answers) in found.items() if p95 is not None}

    @property
    def judged(self) -> bool:
        """Whether somebody says how good the answers here are."""
        return self.stage.judged > 0 or self.workflow.judged > 0

    @property
    def empty(self) -> bool:
        """Whether nothing is known of this stage and its workflow."""
        return not (self.stage.models or self.workflow.models or self.judged)


def traffic(fields: Fields) -> dict[str, Traffic]:
    """Return the traffic of each model that a hash of stats holds."""
    counters: dict[str, dict[str, int]] = {}
    latencies: dict[str, dict[int, int]] = {}
    for name, text in fields.items():
        ref, bar, counter = _name(name).rpartition("|")
        if bar and counter in _COUNTERS:
            counters.setdefault(ref, {})[counter] = _count(text)
        elif bar and counter in _BUCKETS:
            latencies.setdefault(ref, {})[_BUCKETS[counter]] = _count(text)
    return {ref: Traffic(**counts, latencies=latencies.get(ref, {})) for ref, counts in counters.items()}


def merged(parts: Iterable[Mapping[str, Traffic]]) -> dict[str, Traffic]:
    """Return the traffic of each model over several days or stages."""
    found: dict[str, list[Traffic]] = {}
    for part in parts:
        for ref, one in part.items():
            found.setdefault(ref, []).append(one)
    return {ref: Traffic.total(several) for ref, several in found.items()}


def evidence(text: bytes, seen: int) -> Evidence:
    """Return the evidence that a field holds, written when its place had at most ``seen`` outcomes."""
    try:
        *numbers, recent = json.loads(text)
        weights = [float(one) if type(one) in {int, float} else math.nan for one in numbers]
        successes, failures, at, calls, cost_nano, priced = weights
    except (ValueError, TypeError, OverflowError, RecursionError):
        return NOTHING
    known = all(math.isfinite(one) and one >= 0 for one in weights) and at <= seen
    if not known or not isinstance(recent, str) or len(recent) > RING or recent.strip("01"):
        return NOTHING
    return Evidence(successes, failures, at, int(calls), cost_nano, priced, recent)


def sizes(text: bytes) -> Sizes:
    """Return the lengths that a field holds; nothing where it holds something else."""
    try:
        numbers = [float(one) if type(one) in {int, float} else math.nan for one in json.loads(text)]
        calls, weight, prompts, tokens_in, tokens_out = numbers
    except (ValueError, TypeError, OverflowError, RecursionError):
        return Sizes()
    if not all(0 <= one < _LONGEST for one in numbers):
        return Sizes()
    return Sizes(int(calls), weight, prompts, tokens_in, tokens_out)


def _count(text: bytes | None) -> int:
    """Return a counter's value; 0 for one that is missing or no count."""
    try:
        return max(0, int(text or 0)) if len(text or b"") < 20 else 0
    except ValueError:
        return 0


def _name(raw: bytes) -> str:
    return raw.decode(errors="surrogatepass")


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
