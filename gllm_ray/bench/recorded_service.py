"""A service whose scheduler notes what it does, and that is sent workloads."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

import ray
from ray.actor import ActorHandle

from gllm_ray.assembly.remote_scheduler import RemoteScheduler
from gllm_ray.bench.engine_load import engine_sender
from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.prompts import LoadRequest
from gllm_ray.bench.recording import Record, RecordingSchedulerActor
from gllm_ray.bench.request_figures import RequestFigures
from gllm_ray.bench.service_costs import ServedStep
from gllm_ray.bundles import SCHEDULER_CPUS
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch
from gllm_ray.stages.ray_errors import ask
from gllm_ray.stages.stage_group import StageGroup, start_stage_group, stop_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedReplay:
    """A workload as it was served.

    Attributes:
        seen: What clients saw.
        served: The micro-batches, in order, that the stages still know.
        batches: All micro-batches, in order.
        client_s: How much longer clients waited for a first token than the scheduler took.
    """

    seen: RequestFigures
    served: list[ServedStep]
    batches: list[MicroBatch]
    client_s: float


class RecordedService:
    """Stages with a recording scheduler, and its client.

    Attributes:
        group: Its stages.
    """

    def __init__(self, group: StageGroup, scheduler: ActorHandle) -> None:
        self.group = group
        self._scheduler = scheduler
        self._client = EngineClient(RemoteScheduler(scheduler))

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

    async def replay(
        self, requests: Sequence[LoadRequest], *, max_concurrency: int | None = None
    ) -> RecordedReplay:
        """Let requests come and end; see `send_load`.

        Raises:
            PipelineError: A request did not get all of its tokens.
        """
        load = await send_load(
            engine_sender(self._client), requests, max_concurrency=max_concurrency
        )
        seen = RequestFigures.of(load)
        if seen.num_failed:
            raise PipelineError(f"{seen.num_failed} requests failed: {next(iter(seen.errors))}")
        record: Record = await self._scheduler.take.remote()
        stages = await asyncio.gather(*(stage.intervals.remote() for stage in self.group.stages))
        intervals = [{each.batch_id: each for each in stage} for stage in stages]
        return RecordedReplay(
            seen=seen,
            batches=record.batches,
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
        ray.kill(self._scheduler)
        await stop_stages(self.group.stages)
