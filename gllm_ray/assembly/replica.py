"""One pipeline on a Ray cluster, owned by the process that starts it."""

import asyncio
from collections.abc import Awaitable
from typing import Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gllm_ray.assembly.scheduler_actor import SchedulerActor
from gllm_ray.config import ServiceConfig
from gllm_ray.messages import EngineLoad, GenerationRequest, TokenEvent
from gllm_ray.model.checkpoint import open_checkpoint
from gllm_ray.stages.placement import SCHEDULER_CPUS
from gllm_ray.stages.ray_pipeline import (
    StageGroup,
    start_stage_group,
    stop_stages,
    translate_ray_error,
)

T = TypeVar("T")


class PipelineReplica:
    """The stage actors and the scheduler actor of one pipeline; implements `EngineEndpoint`.

    The actors die with the process that called `start`.

    Attributes:
        group: The stages and what they hold.
        max_model_len: Tokens a sequence may have.
    """

    def __init__(self, group: StageGroup, scheduler: ActorHandle, max_model_len: int) -> None:
        self.group = group
        self.max_model_len = max_model_len
        self._scheduler = scheduler

    @classmethod
    async def start(
        cls, config: ServiceConfig, placement_group: PlacementGroup | None = None
    ) -> Self:
        """Load the stages, connect them, and start their scheduler.

        Args:
            config: What to serve, and how.
            placement_group: Laid out as `placement.bundles` says; None for anywhere.

        Raises:
            ConfigError: The model cannot be served as configured; no actor is left behind.
            PipelineError: A process died; no actor is left behind.
        """
        max_model_len = open_checkpoint(config.model).max_model_len
        group = await start_stage_group(config, placement_group)
        strategy = None
        if placement_group is not None:
            strategy = PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=0
            )
        scheduler = SchedulerActor.options(
            num_cpus=SCHEDULER_CPUS, scheduling_strategy=strategy
        ).remote(config, group, max_model_len)
        try:
            await _translated(scheduler.start.remote())
        except BaseException:
            ray.kill(scheduler)
            await stop_stages(group.stages)
            raise
        return cls(group, scheduler, max_model_len)

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request; see `EngineEndpoint.add`."""
        await _translated(self._scheduler.add.remote(request))

    async def abort(self, request_id: str) -> None:
        """End a request early; see `EngineEndpoint.abort`."""
        await _translated(self._scheduler.abort.remote(request_id))

    async def next_events(self) -> list[TokenEvent]:
        """Wait for events; see `EngineEndpoint.next_events`."""
        return await _translated(self._scheduler.next_events.remote())

    async def load(self) -> EngineLoad:
        """How much the pipeline holds now.

        Raises:
            PipelineError: The pipeline is broken.
        """
        return await _translated(self._scheduler.load.remote())

    async def check_health(self) -> None:
        """Find out whether every process of the pipeline lives.

        Raises:
            PipelineError: One is gone, or the engine gave up.
        """
        pings = [_translated(stage.ping.remote()) for stage in self.group.stages]
        await asyncio.gather(self.load(), *pings)

    async def close(self) -> None:
        """End the scheduler and the stages."""
        await _translated(self._scheduler.close.remote())
        ray.kill(self._scheduler)


async def _translated(answer: Awaitable[T]) -> T:
    """Await an actor's answer; Ray's errors come out as ours."""
    try:
        return await answer
    except RayError as error:
        raise translate_ray_error(error) from None
