"""What a micro-batch costs each stage: the seam between the simulator and its cost models."""

from collections.abc import Sequence
from typing import Protocol

from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.attention_cost import AttentionCost
from gllm_ray.simulation.pipeline_layout import PipelineLayout


class PipelineCost(Protocol):
    """Predicts how long each stage of a pipeline takes for a micro-batch."""

    @property
    def layout(self) -> PipelineLayout:
        """The pipeline: its stages, what passes between them, and their KV blocks."""

    def stage_time_s(self, stage_id: int, load: StepLoad) -> float:
        """The time of a stage; never falls when any part of the load grows."""

    def attention(self, stage_id: int) -> Sequence[AttentionCost]:
        """What attention adds to the time of a stage, one entry for each window."""
