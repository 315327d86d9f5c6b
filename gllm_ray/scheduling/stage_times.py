"""Joins what the stages measured with what they computed."""

from gllm_ray.messages import StageTime
from gllm_ray.scheduling.load import CostModel, StepLoad

# By how many micro-batches a device that computes asynchronously may be late with their times.
_MAX_LATE = 64


class StageTimes:
    """Tells a cost model the time of the slowest stage, once all stages have told theirs.

    Args:
        cost: Learns from it.
        num_stages: Depth of the pipeline.
        max_in_flight: Micro-batches whose results are still to come, at most.
    """

    def __init__(self, cost: CostModel, num_stages: int, max_in_flight: int) -> None:
        self._cost = cost
        self._num_stages = num_stages
        self._max_open = max_in_flight + _MAX_LATE
        self._open: dict[int, tuple[StepLoad, list[float]]] = {}

    def expect(self, batch_id: int, load: StepLoad) -> None:
        """A micro-batch is on its way."""
        self._open[batch_id] = (load, [])
        if len(self._open) > self._max_open:
            del self._open[next(iter(self._open))]

    def add(self, times: tuple[StageTime, ...]) -> None:
        """Stages have told their times; those of a micro-batch may come with several results."""
        for time in times:
            load, measured = self._open.get(time.batch_id, (None, []))
            measured.append(time.time_s)
            if load is not None and len(measured) == self._num_stages:
                del self._open[time.batch_id]
                self._cost.observe(load, max(measured))
