"""Predicted stage times from fixed coefficients, and what follows from such predictions."""

from bisect import bisect_right
from dataclasses import dataclass

from gllm_ray.scheduling.load import CostModel, StepLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCostModel:
    """A stage time that is linear in the load, in seconds.

    ```
    floor_s + token_s * rows, rounded up to the tile
            + context_token_s * num_context_tokens + attention_pair_s * num_attention_pairs
    ```

    Attributes:
        floor_s: A micro-batch of no rows: launches and weights.
        token_s: A row.
        context_token_s: A KV token that a decode reads.
        attention_pair_s: A query-key pair of a prefill chunk.
        tile: Rows cost as much as the next multiple of this.
    """

    floor_s: float
    token_s: float
    context_token_s: float
    attention_pair_s: float
    tile: int

    @property
    def is_calibrated(self) -> bool:
        """Always."""
        return True

    def stage_time(self, load: StepLoad) -> float:
        """The time of the slowest stage, in seconds."""
        return (
            self.floor_s
            + self.token_s * priced_rows(load.num_tokens, self.tile)
            + self.context_token_s * load.num_context_tokens
            + self.attention_pair_s * load.num_attention_pairs
        )

    def observe(self, load: StepLoad, time_s: float) -> None:
        """Nothing: fixed coefficients do not follow measurements."""


def priced_rows(num_tokens: int, tile: int) -> int:
    """The rows whose cost a micro-batch of `num_tokens` has."""
    return -(-num_tokens // tile) * tile


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
