"""The pipeline as a chain of Ray actors.

The owner, whose death ends the stages, calls `start_stage_group`; the process that schedules builds
a `RayPipeline` on the group, which may cross a process border in between.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import GllmRayError, PipelineError, StageLostError
from gllm_ray.messages import (
    MicroBatch,
    MicroBatchResult,
    SampledTokens,
    StageInfo,
    StageTime,
)
from gllm_ray.model.checkpoint import open_checkpoint
from gllm_ray.partition import describe_stage, size_kv_cache
from gllm_ray.stages.heartbeat import name_stage
from gllm_ray.stages.metadata import MetadataEncoder
from gllm_ray.stages.placement import start_stage
from gllm_ray.stages.ray_errors import ask, translate_ray_error
from gllm_ray.stages.timeline import PhaseClock

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long a failed pipeline waits for the survivors' steps.
_DRAIN_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGroup:
    """Loaded and connected stages: everything a `RayPipeline` needs, and picklable.

    Attributes:
        stages: The stage actors, in order. They die with the process that started them.
        infos: What each stage holds.
        num_blocks: KV blocks of every stage.
        max_model_len: Tokens of prompt and output a sequence may have.
        epoch: The epoch the stages are connected for.
        startup_s: How long each phase of their common start took, in order.
    """

    stages: tuple[ActorHandle, ...]
    infos: tuple[StageInfo, ...]
    num_blocks: int
    max_model_len: int
    epoch: int
    startup_s: Mapping[str, float] = field(default_factory=dict)


async def start_stage_group(
    config: ServiceConfig, placement_group: PlacementGroup | None = None
) -> StageGroup:
    """Start the stage actors, load every shard at the same time, and connect the stages.

    Args:
        config: The replica's configuration.
        placement_group: Laid out as `placement.bundles` says; None for anywhere in the cluster.

    Raises:
        ConfigError: The model cannot be served as configured. No actor is left behind.
        PipelineError: A stage failed or died. No actor is left behind.
    """
    clock = PhaseClock()
    max_model_len = (await asyncio.to_thread(open_checkpoint, config.model)).max_model_len
    clock.end("checkpoint")
    stages = tuple(
        start_stage(config, stage_id, placement_group)
        for stage_id in range(config.pipeline.num_stages)
    )
    try:
        infos = await asyncio.gather(*map(_load, range(len(stages)), stages))
        clock.end("stages")
        block_size = config.kv_cache.block_size
        num_blocks = size_kv_cache(infos, block_size, max_model_len)
        logger.info(
            "KV cache of each stage: %d blocks of %d tokens, the fewest that fit on any of them",
            num_blocks,
            block_size,
        )
        await _ask_all(stage.allocate_kv_cache.remote(num_blocks) for stage in stages)
        clock.end("kv_cache")
        await connect_stages(stages, epoch=0)
        clock.end("connect")
    except BaseException:
        await stop_stages(stages)
        raise
    return StageGroup(
        stages=stages,
        infos=tuple(infos),
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        epoch=0,
        startup_s=clock.times_s,
    )


async def connect_stages(stages: Sequence[ActorHandle], epoch: int) -> None:
    """Join neighbours by new edges; from then on the stages take steps of `epoch` only.

    Raises:
        PipelineError: A stage failed or died.
    """
    await _ask_all(stage.leave_edges.remote() for stage in stages)
    addresses = await _ask_all(stage.open_edge.remote() for stage in stages[:-1])
    await _ask_all(
        stage.connect.remote(epoch, previous)
        for stage, previous in zip(stages, [None, *addresses], strict=True)
    )


async def stop_stages(stages: Sequence[ActorHandle]) -> None:
    """Kill the stage actors and wait until they are gone."""
    for stage in stages:
        ray.kill(stage)
    await asyncio.gather(*map(_wait_until_gone, stages))


class RayPipeline:
    """Runs micro-batches through the stages of a group.

    A micro-batch is one actor call per stage. The object ref of a stage's call is an argument of
    the next stage's call, so Ray carries order and failures down the chain. Where a micro-batch
    continues another, the ref of that one's last call closes the ring, and its tokens reach the
    first stage without waiting for this process to see them.

    Args:
        group: Stages that no other `RayPipeline` drives.
    """

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._encoder = MetadataEncoder()
        self._in_flight: deque[tuple[int, list[ray.ObjectRef]]] = deque()
        self._failure: GllmRayError | None = None
        self._broken: frozenset[int] = frozenset()

    def submit(self, batch: MicroBatch) -> None:
        """Call every stage. A broken pipeline drops the micro-batch; `next_result` says why."""
        if self._failure is not None:
            return
        metadata = self._encoder.encode(batch)  # once for all stages
        ref, refs = self._source_of(batch), []
        for stage in self._group.stages:
            ref = stage.step.remote(self._group.epoch, metadata, ref)
            refs.append(ref)
        self._in_flight.append((batch.batch_id, refs))

    async def next_result(self) -> MicroBatchResult:
        """Wait for the last stage's answer to the oldest micro-batch.

        Raises:
            StageLostError: A stage died; the message says which, and why.
            PipelineError: A step failed, or the pipeline is closed.
        """
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        batch_id, refs = self._in_flight[0]
        try:
            sampled, times = await refs[-1]
        except RayError as error:
            if self._failure is None:
                await self._fail(translate_ray_error(error))
            raise self._failure from error
        self._in_flight.popleft()
        return MicroBatchResult(
            batch_id=batch_id,
            **SampledTokens(*map(tuple, sampled))._asdict(),
            stage_times=tuple(StageTime(*time) for time in times),
        )

    def _source_of(self, batch: MicroBatch) -> ray.ObjectRef | None:
        """What the last stage answers to the micro-batch that this one continues."""
        if batch.continues is None:
            return None
        return next(refs[-1] for batch_id, refs in self._in_flight if batch_id == batch.continues)

    async def close(self) -> None:
        """Kill the stages; what is in flight is lost."""
        if self._failure is None:
            self._failure = PipelineError("the pipeline is closed")
        await stop_stages(self._group.stages)
        await self._drain()

    async def _fail(self, error: GllmRayError, broken: frozenset[int] = frozenset()) -> None:
        """End every call in flight, and find the stages that broke.

        Args:
            error: What went wrong; the death of a stage is preferred to its consequences.
            broken: The stages at fault, if they are known.
        """
        self._failure, self._broken = error, broken
        failures = await self._drain()
        if broken or not failures:
            return
        # A stage's own step fails before those that wait for it.
        losses = (failure for failure in failures if isinstance(failure[1], StageLostError))
        stage_id, self._failure = next(losses, failures[0])
        self._broken = frozenset({stage_id})

    async def _drain(self) -> list[tuple[int, GllmRayError]]:
        """Consume every ref in flight: survivors fall idle, and no error stays unread.

        Returns:
            The steps that failed, in their order: the stage of each, and what happened.
        """
        steps = {
            asyncio.ensure_future(ref): stage_id
            for _, refs in self._in_flight
            for stage_id, ref in enumerate(refs)
        }
        if not steps:
            return []
        done, late = await asyncio.wait(steps, timeout=_DRAIN_TIMEOUT_S)
        for step in late:
            step.cancel()
        self._in_flight.clear()
        failed = ((i, step.exception()) for step, i in steps.items() if step in done)
        return [
            (i, translate_ray_error(error, name_stage(self._group.infos[i])))
            for i, error in failed
            if error is not None
        ]


async def _load(stage_id: int, stage: ActorHandle) -> StageInfo:
    logger.info("loading shard %d", stage_id)
    clock = PhaseClock()
    info = await ask(stage.load.remote(), f"stage {stage_id}")
    clock.end("stage")
    logger.info("loaded %s", describe_stage(info))
    # What the stage could not measure: Ray found it a place and started its process.
    process_s = clock.times_s["stage"] - sum(info.startup_s.values())
    return replace(info, startup_s={"process": process_s, **info.startup_s})


async def _wait_until_gone(stage: ActorHandle) -> None:
    with contextlib.suppress(RayError):
        while True:
            await stage.ping.remote()
            await asyncio.sleep(0.01)


async def _ask_all(refs: Iterable[Awaitable[T]]) -> list[T]:
    """Await one answer of each stage, in order."""
    return await asyncio.gather(*(ask(ref, f"stage {i}") for i, ref in enumerate(refs)))
