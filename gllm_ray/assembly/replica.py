"""One pipeline on a Ray cluster, owned by the process that starts it."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from typing import Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gllm_ray.assembly.scheduler_actor import SchedulerActor
from gllm_ray.config import RecoveryConfig, ServiceConfig
from gllm_ray.errors import GllmRayError, PipelineError
from gllm_ray.messages import EngineLoad, GenerationRequest, TokenEvent
from gllm_ray.stages.heartbeat import first_fault
from gllm_ray.stages.placement import SCHEDULER_CPUS
from gllm_ray.stages.ray_errors import ask
from gllm_ray.stages.ray_pipeline import StageGroup, start_stage_group, stop_stages
from gllm_ray.stages.repair import repair_stage_group

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PipelineReplica:
    """The stage actors and the scheduler actor of one pipeline; implements `EngineEndpoint`.

    The actors die with the process that called `start`. It replaces stages when the scheduler tells
    of a fault.

    Attributes:
        group: The stages and what they hold.
    """

    def __init__(self, group: StageGroup, scheduler: ActorHandle) -> None:
        self.group = group
        self._scheduler = scheduler
        self._repairs: asyncio.Task[None] | None = None

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
        group = await start_stage_group(config, placement_group)
        strategy = None
        if placement_group is not None:
            strategy = PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=0
            )
        scheduler = SchedulerActor.options(
            num_cpus=SCHEDULER_CPUS, scheduling_strategy=strategy
        ).remote(config, group)
        replica = cls(group, scheduler)
        try:
            await _ask_scheduler(scheduler.start.remote())
        except BaseException:
            await replica.close()
            raise
        replica._repairs = asyncio.create_task(replica._repair_for_ever(config, placement_group))
        return replica

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request; see `EngineEndpoint.add`."""
        await _ask_scheduler(self._scheduler.add.remote(request))

    async def abort(self, request_id: str) -> None:
        """End a request early; see `EngineEndpoint.abort`."""
        await _ask_scheduler(self._scheduler.abort.remote(request_id))

    async def next_events(self) -> list[TokenEvent]:
        """Wait for events; see `EngineEndpoint.next_events`."""
        events = await _ask_scheduler(self._scheduler.next_events.remote())
        return [TokenEvent(*event) for event in events]

    async def load(self) -> EngineLoad:
        """How much the pipeline holds now.

        Raises:
            PipelineError: The pipeline is broken.
        """
        return await _ask_scheduler(self._scheduler.load.remote())

    async def check_health(self) -> None:
        """Find out whether the pipeline works, or is being repaired.

        Raises:
            PipelineError: The scheduler is gone, or the engine gave up.
        """
        if self._repairs is not None and self._repairs.done():
            await self._repairs
        await self.load()

    async def close(self) -> None:
        """End the scheduler and the stages, whichever of them still live."""
        if self._repairs is not None:
            self._repairs.cancel()
            await asyncio.wait([self._repairs])
        ray.kill(self._scheduler)
        await stop_stages(self.group.stages)

    async def _repair_for_ever(
        self, config: ServiceConfig, placement_group: PlacementGroup | None
    ) -> None:
        while True:
            watching = asyncio.create_task(self._watch(config.recovery))
            try:
                fault = await _ask_scheduler(self._scheduler.next_fault.remote())
            finally:
                watching.cancel()
            logger.warning("the pipeline stands still: %s", fault.cause)
            try:
                self.group = await repair_stage_group(config, self.group, fault, placement_group)
            except GllmRayError as error:
                outcome = PipelineError(str(error))
            else:
                outcome = self.group
            await _ask_scheduler(self._scheduler.resume.remote(outcome))

    async def _watch(self, config: RecoveryConfig) -> None:
        fault = await first_fault(self.group.stages, self.group.infos, config)
        with contextlib.suppress(PipelineError):  # without a scheduler nobody needs to know
            await _ask_scheduler(self._scheduler.report.remote(*fault))


async def _ask_scheduler(answer: Awaitable[T]) -> T:
    return await ask(answer, "the scheduler", lost=PipelineError)
