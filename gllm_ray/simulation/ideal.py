"""How long the work of a simulation would take a pipeline without bubbles, at its best size."""

from collections.abc import Sequence

from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.attention_cost import NO_WINDOW, AttentionCost, attention_time_s
from gllm_ray.simulation.cost_model import PipelineCost

_TILE = 128
_MAX_SIZE = 32 * _TILE  # beyond it only sizes that micro-batches have
_PROBE = StepLoad(num_decodes=64, num_context_tokens=65_536, num_prefill_tokens=512)
_STEP = 65_536


class IdealWork:
    """Sums up the work of micro-batches, priced as a stage does it at its best.

    A row costs what it costs in the micro-batch of the fewest seconds a row, and what attention
    reads costs what it adds to a large micro-batch, within the windows of the layers. The slowest
    stage counts.

    Args:
        cost: The time of each stage.

    Attributes:
        time_s: Of all work so far.
    """

    def __init__(self, cost: PipelineCost) -> None:
        self.time_s = 0.0
        self._cost = cost
        self._num_rows = 0
        self._max_size = _MAX_SIZE
        sizes = range(_TILE, _MAX_SIZE + 1, _TILE)
        self._row_s = min(map(self._row_time_s, sizes))
        self._attention = self._attention_costs()

    def add(self, load: StepLoad) -> None:
        """Count work, of any number of micro-batches."""
        self._num_rows += load.num_tokens
        self.time_s += attention_time_s(self._attention, load, self._row_s * load.num_tokens)

    def add_batch(self, load: StepLoad) -> None:
        """Count a micro-batch, up to whose size others might have been the best."""
        if load.num_tokens > self._max_size:
            self._extend(load.num_tokens)
        self.add(load)

    def _extend(self, size: int) -> None:
        first = (self._max_size // _TILE + 1) * _TILE
        sizes = [*range(first, size, _TILE), size]
        row_s = min(self._row_s, *map(self._row_time_s, sizes))
        self.time_s -= (self._row_s - row_s) * self._num_rows
        self._row_s, self._max_size = row_s, size

    def _attention_costs(self) -> Sequence[AttentionCost]:
        """Those of the slowest stage, or without windows what they add to its time."""
        stages = range(self._cost.layout.num_stages)
        slowest = max(stages, key=lambda stage_id: self._cost.stage_time_s(stage_id, _PROBE))
        costs = self._cost.attention(slowest)
        if any(cost.window != NO_WINDOW for cost in costs):
            return costs
        probe_s = self._time_s(_PROBE)
        more_context = _PROBE._replace(num_context_tokens=_PROBE.num_context_tokens + _STEP)
        more_pairs = _PROBE._replace(num_attention_pairs=_STEP)
        context_token_s = (self._time_s(more_context) - probe_s) / _STEP
        pair_s = (self._time_s(more_pairs) - probe_s) / _STEP
        return [AttentionCost(NO_WINDOW, context_token_s, pair_s)]

    def _row_time_s(self, size: int) -> float:
        return self._time_s(StepLoad(num_prefill_tokens=size)) / size

    def _time_s(self, load: StepLoad) -> float:
        stages = range(self._cost.layout.num_stages)
        return max(self._cost.stage_time_s(stage_id, load) for stage_id in stages)
