"""How long does the simulated model take? Fixed, drawn from a log-normal, or resampled from measurements."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_STANDARD_NORMAL = NormalDist()
_LLMPERF_COLUMNS = frozenset({"provider", "error_code", "end_to_end_latency_s"})


class Value(BaseModel):
    """A part of a profile: it never changes, refuses what it does not know, and repeats no input in errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, checked like a new one; nothing computed from the old is kept."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return self.model_validate({**given, **(update or {})})


class _Distribution(Value):
    @model_validator(mode="after")
    def _keep_kind(self) -> Self:
        # A profile is shown by the fields that were set; without its kind this one could not be read back.
        self.model_fields_set.add("kind")
        return self


class FixedLatency(_Distribution):
    """Every answer takes the same time."""

    kind: Literal["fixed"] = "fixed"
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def at(self, quantile: float) -> float:
        """Return the seconds that the given share of answers (0 to 1, exclusive) takes at most."""
        return self.seconds


class LognormalLatency(_Distribution):
    """Half of the answers take up to the median; ``sigma`` (of the logarithm) sets how long the tail is."""

    kind: Literal["lognormal"] = "lognormal"
    median_seconds: float = Field(gt=0, allow_inf_nan=False)
    sigma: float = Field(ge=0, le=5)

    def at(self, quantile: float) -> float:
        """Return the seconds that the given share of answers (0 to 1, exclusive) takes at most."""
        return self.median_seconds * math.exp(self.sigma * _STANDARD_NORMAL.inv_cdf(quantile))


class LlmperfLatency(_Distribution):
    """Answers take as long as requests that llmperf measured (column ``end_to_end_latency_s``, failures left out).

    ``provider`` keeps only that provider's rows. The file is read once, when the profile is made.
    """

    kind: Literal["llmperf"] = "llmperf"
    path: Path
    provider: str | None = None

    @cached_property
    def samples(self) -> tuple[float, ...]:
        """The measured seconds, in order."""
        return tuple(sorted(_read_llmperf(self.path, self.provider)))

    @model_validator(mode="after")
    def _read(self) -> Self:
        # now, because a file that cannot be read is a mistake in the profile, not in the first call
        if not self.samples:
            whose = f" of provider {self.provider!r}" if self.provider else ""
            raise ValueError(f"{self.path} holds no answered request{whose}")
        return self

    def at(self, quantile: float) -> float:
        """Return the seconds that the given share of answers (0 to 1, exclusive) takes at most."""
        return self.samples[int(quantile * len(self.samples))]


def _number_is_fixed(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "fixed", "seconds": value} if is_number else value


Latency = Annotated[
    FixedLatency | LognormalLatency | LlmperfLatency, Field(discriminator="kind"), BeforeValidator(_number_is_fixed)
]
"""In a profile: a number of seconds, or a table with ``kind`` and that kind's fields."""


def _read_llmperf(path: Path, provider: str | None) -> list[float]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = _LLMPERF_COLUMNS - set(rows.fieldnames or ())
            if missing:
                raise ValueError(f"{path} is not an llmperf file: it has no column {', '.join(sorted(missing))}")
            wanted = (row for row in rows if provider in (None, row["provider"]) and not row["error_code"])
            return [float(row["end_to_end_latency_s"]) for row in wanted if row["end_to_end_latency_s"]]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
