"""How long the work of a simulation would take a pipeline without bubbles, at its best size."""

from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_model import PipelineCost

_SIZES = tuple(128 * size for size in range(1, 33))
_PROBE = StepLoad(num_decodes=64, num_context_tokens=65_536, num_prefill_tokens=512)
_STEP = 65_536


class IdealWork:
    """Sums up the work of micro-batches, priced as a stage does it at its best.

    A row costs what it costs in the micro-batch of the fewest seconds a row, and what attention
    reads costs what it adds to a large micro-batch. The slowest stage counts.

    Args:
        cost: The time of each stage.

    Attributes:
        time_s: Of all work so far.
    """

    def __init__(self, cost: PipelineCost) -> None:
        self.time_s = 0.0

        def time_s(load: StepLoad) -> float:
            stages = range(cost.layout.num_stages)
            return max(cost.stage_time_s(stage_id, load) for stage_id in stages)

        probe_s = time_s(_PROBE)
        more_context = _PROBE._replace(num_context_tokens=_PROBE.num_context_tokens + _STEP)
        more_pairs = _PROBE._replace(num_attention_pairs=_STEP)
        self._row_s = min(time_s(StepLoad(num_prefill_tokens=size)) / size for size in _SIZES)
        self._context_s = (time_s(more_context) - probe_s) / _STEP
        self._pair_s = (time_s(more_pairs) - probe_s) / _STEP

    def add(self, load: StepLoad) -> None:
        """Count a micro-batch."""
        self.time_s += (
            self._row_s * load.num_tokens
            + self._context_s * load.num_context_tokens
            + self._pair_s * load.num_attention_pairs
        )
