"""A stage that computes nothing: what is left of a step is what its messages cost."""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import ray
import torch

from gllm_ray.config import ServiceConfig
from gllm_ray.messages import MicroBatch, SampledTokens, StepInterval
from gllm_ray.stages.stage import Stage
from gllm_ray.stages.worker import StageWorker

Method = TypeVar("Method", bound=Callable[..., object])


def _beside_steps(method: Method) -> Method:
    """Let a method of the actor answer while another thread takes steps."""
    marked: Method = ray.method(concurrency_group="ctl")(method)
    return marked


class PassThroughWorker(StageWorker):
    """Hands hidden states on as they came; the first stage makes them, the last answers nothing.

    Args:
        config: Of the pipeline; there is no model.
        stage_id: Position in the pipeline, from 0.
        num_bytes: Of the float32 hidden states of a micro-batch, which has one token.
    """

    def __init__(self, config: ServiceConfig, stage_id: int, num_bytes: int) -> None:
        super().__init__(config, stage_id)
        self._hidden = torch.ones(1, num_bytes // self.dtype.itemsize)

    @property
    def hidden_size(self) -> int:
        """See `StageWorker`."""
        return self._hidden.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """See `StageWorker`."""
        return torch.float32

    def execute(
        self, batch: MicroBatch, hidden: torch.Tensor | None, sampled: Sequence[int] = ()
    ) -> torch.Tensor | SampledTokens:
        """See `StageWorker`."""
        if self.is_last:
            return SampledTokens(())
        return self._hidden if hidden is None else hidden


class TransportStage(Stage):
    """A `Stage` of the service, with the same edges and the same steps, that computes nothing."""

    def __init__(self, config: ServiceConfig, stage_id: int) -> None:
        super().__init__(config, stage_id)
        self.resize(4)

    @_beside_steps
    def resize(self, num_bytes: int) -> None:
        """Send hidden states of `num_bytes` from now on."""
        self._worker = PassThroughWorker(self._config, self._stage_id, num_bytes)

    @_beside_steps
    def ping(self) -> int:
        """Show that the process lives; returns its process id."""
        return os.getpid()

    @_beside_steps
    def leave_edges(self) -> None:
        """See `Stage`."""
        super().leave_edges()

    @_beside_steps
    def intervals(self) -> tuple[StepInterval, ...]:
        """See `Stage`."""
        return super().intervals()


TransportStageActor = ray.remote(
    max_restarts=0, max_task_retries=0, enable_task_events=False, concurrency_groups={"ctl": 1}
)(TransportStage)
