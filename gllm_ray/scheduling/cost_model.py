"""Predicted stage times from fixed coefficients, and what follows from such predictions."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from pydantic import Field

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import CostModel, StepLoad
from gllm_ray.strict_schema import StrictModel, find_mistakes


class _Calibration(StrictModel):
    """What a calibration file holds."""

    floor_s: float = Field(ge=0, description="A micro-batch of no rows: launches and weights.")
    token_s: float = Field(gt=0, description="A row.")
    context_token_s: float = Field(ge=0, description="A KV token that a decode reads.")
    attention_pair_s: float = Field(ge=0, description="A query-key pair of a prefill chunk.")
    tile: int = Field(ge=1, description="Rows are rounded up to a multiple of this.")
    min_rows: int = Field(default=1, ge=1, description="Fewer rows cost as much as these.")
    provenance: str = Field(min_length=1, description="What was measured, where and how.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedCostModel:
    """A stage time that is linear in the load above `min_rows`, in seconds.

    ```
    floor_s + token_s * max(rows, rounded up to the tile; min_rows)
            + context_token_s * num_context_tokens + attention_pair_s * num_attention_pairs
    ```

    Attributes:
        min_rows: Fewer rows cost as much as these, because they take no longer than the reading of
            the weights.
        provenance: What was measured, where and how.
    """

    floor_s: float
    token_s: float
    context_token_s: float
    attention_pair_s: float
    tile: int
    provenance: str
    min_rows: int = 1

    @classmethod
    def from_calibration(cls, calibration: Mapping[str, Any]) -> Self:
        """Read what `to_calibration` wrote.

        Raises:
            ConfigError: One line for each missing, unknown or impossible value.
        """
        if mistakes := find_mistakes(_Calibration, calibration):
            raise ConfigError("\n".join(mistakes))
        return cls(**calibration)

    def to_calibration(self) -> dict[str, Any]:
        """The coefficients as JSON has them."""
        return asdict(self)

    @property
    def is_calibrated(self) -> bool:
        """Always."""
        return True

    def stage_time(self, load: StepLoad) -> float:
        """The time of the slowest stage, in seconds."""
        return (
            self.floor_s
            + self.token_s * priced_rows(load.num_tokens, self.tile, self.min_rows)
            + self.context_token_s * load.num_context_tokens
            + self.attention_pair_s * load.num_attention_pairs
        )

    def observe(self, load: StepLoad, time_s: float) -> None:
        """Nothing: fixed coefficients do not follow measurements."""


def priced_rows(num_tokens: int, tile: int, min_rows: int = 1) -> int:
    """The rows that a micro-batch of so many tokens costs."""
    return max(-(-num_tokens // tile) * tile, min_rows)


def with_chunk(decodes: StepLoad, start: int, num_tokens: int) -> StepLoad:
    """The load of decodes beside one prefill chunk of `num_tokens` from position `start` on."""
    return StepLoad(
        decodes.num_decodes,
        decodes.num_context_tokens,
        num_tokens,
        num_tokens * (start + num_tokens),
    )


def most_prefill_tokens(
    cost: CostModel, decodes: StepLoad, prefill_start: int, limit_time: float, max_tokens: int
) -> int:
    """The most tokens of one prefill chunk that ride with `decodes` within a time.

    Where the rows of the micro-batch, rounded down to a tile, take less time each, it is those.

    Args:
        cost: Predicts the time; `limit_time` is in its units.
        decodes: The load without prefill.
        prefill_start: Position at which the chunk starts.
        limit_time: The most that the micro-batch may take.
        max_tokens: The most tokens of the chunk.

    Returns:
        From 0 to `max_tokens`; 0 only if not even one token fits.
    """

    def time(num_tokens: int) -> float:
        return cost.stage_time(with_chunk(decodes, prefill_start, num_tokens))

    most = bisect_right(range(1, max_tokens + 1), limit_time, key=time)
    rows = decodes.num_decodes + most
    landed = most - rows % cost.tile
    if landed > 0 and time(landed) * rows < time(most) * (rows - most + landed):
        return landed
    return most
