"""The stage actors of one pipeline: started, loaded, connected and stopped.

The owner, whose death ends the stages, calls `start_stage_group`; the process that schedules builds
a `RayPipeline` on the group, which may cross a process border in between.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import GllmRayError, StagesFailedError, StageTimeoutError
from gllm_ray.messages import InboxAddress, StageInfo
from gllm_ray.model.checkpoint import open_checkpoint
from gllm_ray.partition import describe_stage, size_kv_cache
from gllm_ray.stages.placement import start_stage
from gllm_ray.stages.ray_errors import ask
from gllm_ray.stages.timeline import PhaseClock

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Connecting takes milliseconds, or as long as one end of an edge waits for the other.
CONNECT_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGroup:
    """Loaded and connected stages: everything a `RayPipeline` needs, and picklable.

    Attributes:
        stages: The stage actors, in order. They die with the process that started them.
        infos: What each stage holds.
        num_blocks: KV blocks of every stage.
        max_model_len: Tokens of prompt and output a sequence may have.
        epoch: The epoch the stages are connected for.
        inboxes: Where each stage reads messages in that epoch; none: it is called instead.
        ring: Whether the last stage tells its tokens to the first one, too.
        startup_s: How long each phase of their common start took, in order.
    """

    stages: tuple[ActorHandle, ...]
    infos: tuple[StageInfo, ...]
    num_blocks: int
    max_model_len: int
    epoch: int
    inboxes: tuple[InboxAddress, ...] = ()
    ring: bool = False
    startup_s: Mapping[str, float] = field(default_factory=dict)


async def start_stage_group(
    config: ServiceConfig, placement_group: PlacementGroup | None = None
) -> StageGroup:
    """Start the stage actors, load every shard at the same time, and connect the stages.

    Args:
        config: The replica's configuration.
        placement_group: Laid out as `gllm_ray.bundles.bundles` says; None for anywhere.

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
        await ask_all(stage.allocate_kv_cache.remote(num_blocks) for stage in stages)
        clock.end("kv_cache")
        group = StageGroup(
            stages=stages,
            infos=tuple(infos),
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            epoch=0,
            ring=config.pipeline.ring,
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                group = await connect_stages(group)
        except TimeoutError:
            raise StageTimeoutError(
                f"the stages were not connected in {CONNECT_TIMEOUT_S:.0f} s; can the nodes reach "
                "each other on every port, and NCCL on the interface that it chose "
                "(NCCL_SOCKET_IFNAME)?"
            ) from None
        clock.end("connect")
    except BaseException:
        await stop_stages(stages)
        raise
    return replace(group, startup_s=clock.times_s)


async def connect_stages(group: StageGroup) -> StageGroup:
    """Join neighbours by new edges; from then on the stages take steps of the group's epoch only.

    Returns:
        The group with its new inboxes.

    Raises:
        StagesFailedError: A stage failed or died; one whose neighbour did may be the first to.
    """
    stages = group.stages
    await ask_all(stage.leave_edges.remote() for stage in stages)
    addresses = await ask_all(stage.open_edge.remote() for stage in stages[:-1])
    inboxes = await ask_all(
        stage.connect.remote(group.epoch, previous)
        for stage, previous in zip(stages, [None, *addresses], strict=True)
    )
    return replace(group, inboxes=tuple(inbox for inbox in inboxes if inbox is not None))


async def stop_stages(stages: Sequence[ActorHandle]) -> None:
    """Kill the stage actors and wait until they are gone."""
    for stage in stages:
        ray.kill(stage)
    await asyncio.gather(*map(_wait_until_gone, stages))


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


async def ask_all(refs: Iterable[Awaitable[T]]) -> list[T]:
    """Await one answer of each stage, in order; see `all_stages`."""
    return await all_stages(ask(ref, f"stage {i}") for i, ref in enumerate(refs))


async def all_stages(answers: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await one answer of each stage, in order, or until one of them fails.

    Raises:
        StagesFailedError: One failed.
    """
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    except GllmRayError as error:
        failed = (i for i, task in enumerate(tasks) if task.done() and task.exception() is not None)
        raise StagesFailedError(str(error), frozenset(failed)) from error
    finally:
        for task in tasks:
            task.cancel()
