"""A `Stage` as a Ray actor."""

import os
from collections.abc import Sequence
from dataclasses import replace

import ray

from gllm_ray.config import ServiceConfig
from gllm_ray.garbage import no_garbage_collection, relax_garbage_collector
from gllm_ray.messages import EdgeAddress, InboxAddress, StageInfo, StepInterval, StepUnderWay
from gllm_ray.stages.step_messages import StepFailure
from gllm_ray.stages.timeline import PhaseClock


# No restarts: Ray's own would come back with an empty KV cache and compute wrong tokens.
@ray.remote(
    max_restarts=0, max_task_retries=0, enable_task_events=False, concurrency_groups={"ctl": 2}
)
class StageActor:
    """Runs a `Stage`, whose methods these are, in a process of its own.

    Methods run one at a time in the order they were called, except those of group `ctl`, which
    answer while a step runs.

    Args:
        config: The replica's configuration.
        stage_id: Position in the pipeline, from 0.
    """

    def __init__(self, config: ServiceConfig, stage_id: int) -> None:
        clock = PhaseClock()
        with no_garbage_collection():
            # Torch is imported where a stage runs, and not by all who hold a handle of it.
            from gllm_ray.stages.stage import Stage

        self._stage = Stage(config, stage_id)
        clock.end("import")
        self._startup_s = clock.times_s

    def load(self) -> StageInfo:
        """See `Stage.load`."""
        info = self._stage.load()
        relax_garbage_collector()
        return replace(info, startup_s={**self._startup_s, **info.startup_s})

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """See `Stage.allocate_kv_cache`."""
        self._stage.allocate_kv_cache(num_blocks)

    def open_edge(self) -> EdgeAddress | None:
        """See `Stage.open_edge`."""
        return self._stage.open_edge()

    def connect(self, epoch: int, previous: EdgeAddress | None) -> InboxAddress | None:
        """See `Stage.connect`."""
        return self._stage.connect(epoch, previous)

    def step(self, epoch: int, metadata: bytes, previous: object) -> object:
        """See `Stage.step`."""
        return self._stage.step(epoch, metadata, previous)

    def run(self, epoch: int, onward: Sequence[InboxAddress]) -> StepFailure | None:
        """See `Stage.run`."""
        return self._stage.run(epoch, onward)

    def settle(self) -> None:
        """See `Stage.settle`."""
        self._stage.settle()

    @ray.method(concurrency_group="ctl")
    def leave_edges(self) -> None:
        """See `Stage.leave_edges`."""
        self._stage.leave_edges()

    @ray.method(concurrency_group="ctl")
    def ping(self) -> int:
        """Show that the process lives; returns its process id."""
        return os.getpid()

    @ray.method(concurrency_group="ctl")
    def step_under_way(self) -> StepUnderWay | None:
        """See `Stage.step_under_way`."""
        return self._stage.step_under_way()

    @ray.method(concurrency_group="ctl")
    def latest_computed(self) -> int:
        """See `Stage.latest_computed`."""
        return self._stage.latest_computed()

    @ray.method(concurrency_group="ctl")
    def intervals(self) -> tuple[StepInterval, ...]:
        """See `Stage.intervals`."""
        return self._stage.intervals()
