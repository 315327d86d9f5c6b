"""A service whose scheduler notes what it does, and that is sent workloads."""

import asyncio
from dataclasses import dataclass
from statistics import fmean
from typing import Self

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.bench.recording import Record, RecordingSchedulerActor
from gllm_ray.bench.replay import Replay, replay
from gllm_ray.bench.service_costs import ServedStep
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import PipelineError
from gllm_ray.simulation.workload import Workload
from gllm_ray.stages.placement import SCHEDULER_CPUS
from gllm_ray.stages.ray_pipeline import StageGroup, ask, start_stage_group


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedReplay:
    """A workload as it was served.

    Attributes:
        seen: What clients saw.
        served: The micro-batches, in order.
        client_s: How much longer clients waited for a first token than the scheduler took.
    """

    seen: Replay
    served: list[ServedStep]
    client_s: float


class RecordedService:
    """A `PipelineReplica` with a recording scheduler, and its client.

    Attributes:
        group: Its stages.
    """

    def __init__(self, group: StageGroup, scheduler: RecordingSchedulerActor) -> None:
        self.group = group
        self._scheduler = scheduler
        self._replica = PipelineReplica(group, scheduler)
        self._client = EngineClient(self._replica)
        self._num_replays = 0

    @classmethod
    async def start(cls, config: ServiceConfig) -> Self:
        """Start it on the cluster that Ray is connected to.

        Raises:
            ConfigError: The model cannot be served as configured; no actor is left behind.
            PipelineError: A process died; no actor is left behind.
        """
        group = await start_stage_group(config)
        scheduler = RecordingSchedulerActor.options(num_cpus=SCHEDULER_CPUS).remote(config, group)
        service = cls(group, scheduler)
        try:
            await ask(scheduler.start.remote(), "the scheduler", lost=PipelineError)
            await service._client.start()
        except BaseException:
            await service.close()
            raise
        return service

    async def replay(self, workload: Workload) -> RecordedReplay:
        """Let all requests of a workload come and end.

        Raises:
            PipelineError: The engine broke.
            InvalidRequestError: A request is too long for the engine.
        """
        self._num_replays += 1
        seen = await replay(self._client, workload, cache_salt=f"replay {self._num_replays}")
        record: Record = await self._scheduler.take.remote()
        stages = await asyncio.gather(*(stage.intervals.remote() for stage in self.group.stages))
        intervals = [{each.batch_id: each for each in stage} for stage in stages]
        return RecordedReplay(
            seen=seen,
            served=[
                ServedStep(step, tuple(stage[step.batch_id] for stage in intervals))
                for step in record.steps
                if all(step.batch_id in stage for stage in intervals)  # they forget old ones
            ],
            client_s=seen.ttft_s.mean - fmean(record.ttft_s),
        )

    async def close(self) -> None:
        """End all of its processes."""
        await self._client.close()
        await self._replica.close()
