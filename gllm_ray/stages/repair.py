"""Puts a pipeline's stages together again: only what broke is replaced."""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import PipelineError, StageLostError, StageTimeoutError
from gllm_ray.messages import StageInfo
from gllm_ray.stages.heartbeat import name_stage, ping
from gllm_ray.stages.placement import start_stage
from gllm_ray.stages.ray_errors import ask
from gllm_ray.stages.ray_pipeline import StageGroup, connect_stages, stop_stages
from gllm_ray.stages.supervised_pipeline import Fault

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Connecting takes milliseconds, and waits at most for the step that a stage computes.
_CONNECT_TIMEOUT_S = 90.0


async def repair_stage_group(
    config: ServiceConfig,
    group: StageGroup,
    fault: Fault,
    placement_group: PlacementGroup | None = None,
) -> StageGroup:
    """Replace the stages that broke, and connect all of them anew.

    The others keep their process and their weights. A new stage starts in the bundle of the old
    one; Ray gives that bundle another node when its own is gone. Called by the owner of the stages.

    Args:
        config: The replica's configuration.
        group: The stages as they were.
        fault: What broke.
        placement_group: As when the group was started.

    Raises:
        ConfigError: The model cannot be loaded any more; no new actor is left behind.
        PipelineError: A stage failed, died or did not come up in time; no new actor is left behind.
    """
    limit_s = config.recovery.restart_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await _repair(config, group, fault, placement_group)
    except TimeoutError:
        raise StageTimeoutError(
            f"stages {sorted(fault.broken)} were not replaced in {limit_s:.0f} s "
            "(recovery.restart_timeout_s); is there a node with free resources for them?"
        ) from None


async def _repair(
    config: ServiceConfig,
    group: StageGroup,
    fault: Fault,
    placement_group: PlacementGroup | None,
) -> StageGroup:
    start_s = time.monotonic()
    broken = sorted(fault.broken | await _find_lost(config, group, fault.broken))
    await stop_stages([group.stages[stage_id] for stage_id in broken])
    fresh = {stage_id: start_stage(config, stage_id, placement_group) for stage_id in broken}
    try:
        await _on_each(fresh, lambda stage: stage.ping.remote())
        restarted_s = time.monotonic()
        infos = await _load(fresh, group.num_blocks)
        reloaded_s = time.monotonic()
        stages = tuple(fresh.get(i, stage) for i, stage in enumerate(group.stages))
        await _connect(stages, group.epoch + 1)
    except BaseException:
        await stop_stages(tuple(fresh.values()))
        raise
    if broken:
        logger.info(
            "recovered, with a new %s: detect %.2f s, restart %.2f s, reload %.2f s, "
            "reconnect %.2f s",
            " and ".join(map(name_stage, infos.values())),
            fault.detect_s,
            restarted_s - start_s,
            reloaded_s - restarted_s,
            time.monotonic() - reloaded_s,
        )
    return replace(
        group,
        stages=stages,
        infos=tuple(infos.get(i, info) for i, info in enumerate(group.infos)),
        epoch=group.epoch + 1,
    )


async def _connect(stages: tuple[ActorHandle, ...], epoch: int) -> None:
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await connect_stages(stages, epoch)
    except TimeoutError:
        raise StageTimeoutError(
            f"the stages were not connected in {_CONNECT_TIMEOUT_S:.0f} s: one of them hangs"
        ) from None


async def _find_lost(
    config: ServiceConfig, group: StageGroup, known: frozenset[int]
) -> frozenset[int]:
    """The stages that are dead or do not answer, those apart that are known to be broken."""
    others = [i for i in range(len(group.stages)) if i not in known]
    timeout_s = config.recovery.heartbeat_timeout_s
    pings = (ping(group.stages[i], name_stage(group.infos[i]), timeout_s) for i in others)
    answers = await asyncio.gather(*pings, return_exceptions=True)
    is_lost = [isinstance(answer, (StageLostError, TimeoutError)) for answer in answers]
    return frozenset(itertools.compress(others, is_lost))


async def _load(stages: Mapping[int, ActorHandle], num_blocks: int) -> dict[int, StageInfo]:
    """Load the shards of new stages, with as large a KV cache as the others have."""
    infos = await _on_each(stages, lambda stage: stage.load.remote())
    for info in infos.values():
        if info.max_kv_blocks < num_blocks:
            raise PipelineError(
                f"{name_stage(info)} has room for {info.max_kv_blocks} KV blocks now, and the "
                f"other stages have {num_blocks}"
            )
    await _on_each(stages, lambda stage: stage.allocate_kv_cache.remote(num_blocks))
    return infos


async def _on_each(
    stages: Mapping[int, ActorHandle], call: Callable[[ActorHandle], Awaitable[T]]
) -> dict[int, T]:
    """The answers of some stages to the same call, made at the same time."""
    answers = (ask(call(stage), f"stage {stage_id}") for stage_id, stage in stages.items())
    return dict(zip(stages, await asyncio.gather(*answers), strict=True))
