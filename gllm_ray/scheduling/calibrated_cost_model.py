"""Predicted stage times from a table of measurements that a calibration file holds."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeFloat, model_validator

from gllm_ray.scheduling.load import StepLoad
from gllm_ray.strict_schema import StrictModel, parse_strictly

# All of them are tabulated; far more than any micro-batch holds.
_MAX_ROWS = 1_000_000


class _Calibration(StrictModel):
    """What a calibration file holds."""

    rows: list[Annotated[int, Field(ge=0, le=_MAX_ROWS)]] = Field(
        min_length=2, description="Of micro-batches, ascending."
    )
    row_times_s: list[NonNegativeFloat] = Field(
        description="How long they take, attention aside. Between them time is linear in the rows."
    )
    context_token_s: float = Field(ge=0, description="A KV token that a decode reads.")
    attention_pair_s: float = Field(ge=0, description="A query-key pair of a prefill chunk.")
    tile: int = Field(ge=1, description="Steps in the time of rows lie at multiples of this.")
    provenance: str = Field(min_length=1, description="What was measured, where and how.")

    @model_validator(mode="after")
    def _has_a_rising_table(self) -> Self:
        rows, times_s = self.rows, self.row_times_s
        if any(more <= fewer for fewer, more in pairwise(rows)):
            raise ValueError(f"rows={rows}: must ascend")
        if len(times_s) != len(rows):
            raise ValueError(f"row_times_s={times_s}: must be one for each of {len(rows)} rows")
        if times_s != sorted(times_s) or times_s[0] == times_s[-1]:
            raise ValueError(f"row_times_s={times_s}: must rise with the rows")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedCostModel:
    """A stage time that is a table of the rows plus linear attention, in seconds.

    ```
    time(rows) + context_token_s * num_context_tokens + attention_pair_s * num_attention_pairs
    ```

    Rows have a table because their time is not linear in them: reading the weights takes as long
    for one row as for a hundred, and from there it rises by steps of a tile.

    Attributes:
        rows: Of micro-batches, ascending.
        row_times_s: How long they take, attention aside. Between two of them time is linear in the
            rows, beyond the last it is proportional to them.
        context_token_s: A KV token that a decode reads.
        attention_pair_s: A query-key pair of a prefill chunk.
        tile: Steps in the time of rows lie at multiples of this.
        provenance: What was measured, where and how.
    """

    rows: tuple[int, ...]
    row_times_s: tuple[float, ...]
    context_token_s: float
    attention_pair_s: float
    tile: int
    provenance: str
    _times_s: list[float] = field(init=False, repr=False, compare=False)  # of 0 rows and more

    def __post_init__(self) -> None:
        """Tabulate every number of rows: a decision looks up dozens."""
        times_s = [self._interpolate(num_rows) for num_rows in range(self.rows[-1] + 1)]
        object.__setattr__(self, "_times_s", times_s)

    @classmethod
    def from_calibration(cls, calibration: Mapping[str, Any]) -> Self:
        """Read what `to_calibration` wrote.

        Raises:
            ConfigError: One line for each missing, unknown or impossible value.
        """
        values = dict(parse_strictly(_Calibration, calibration))
        values |= {name: tuple(values[name]) for name in ("rows", "row_times_s")}
        return cls(**values)

    def to_calibration(self) -> dict[str, Any]:
        """The values as JSON has them."""
        values = asdict(self)
        del values["_times_s"]
        return values

    @property
    def is_calibrated(self) -> bool:
        """Always."""
        return True

    def stage_time(self, load: StepLoad) -> float:
        """The time of the slowest stage, in seconds."""
        rows, times_s = load.num_decodes + load.num_prefill_tokens, self._times_s
        most = len(times_s) - 1
        return (
            (times_s[rows] if rows <= most else times_s[most] * rows / most)
            + self.context_token_s * load.num_context_tokens
            + self.attention_pair_s * load.num_attention_pairs
        )

    def observe(self, load: StepLoad, time_s: float) -> None:
        """Nothing: a calibration does not follow measurements."""

    def _interpolate(self, num_rows: int) -> float:
        upper = bisect_left(self.rows, num_rows)
        if upper == 0:
            return self.row_times_s[0]
        (fewer, more), (time_s, longer_s) = (
            values[upper - 1 : upper + 1] for values in (self.rows, self.row_times_s)
        )
        return time_s + (longer_s - time_s) * (num_rows - fewer) / (more - fewer)
