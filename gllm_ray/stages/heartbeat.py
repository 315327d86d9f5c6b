"""Whether a stage lives, and whether its step makes progress; asked apart from the data.

A process that does not answer hangs; one that answers and computes for long is slow, and that is no
fault until the deadline of its step.

Ray keeps the order of one caller's calls of an actor, so a ping from the process that schedules
would wait for a step that waits for an earlier stage. Hence the owner asks.
"""

import asyncio
from collections.abc import Sequence
from typing import NoReturn

from ray.actor import ActorHandle

from gllm_ray.config import RecoveryConfig
from gllm_ray.errors import PipelineError, StageTimeoutError
from gllm_ray.messages import StageInfo, StepUnderWay
from gllm_ray.stages.ray_errors import ask

# The tokens of a micro-batch to which `step_timeout_s` refers.
_STEP_TOKENS = 1024


def name_stage(info: StageInfo) -> str:
    """How messages name a stage."""
    layers = f"layers {info.first_layer}-{info.last_layer - 1}"
    return f"stage {info.stage_id} ({layers}, {info.node})"


async def ping(stage: ActorHandle, name: str, timeout_s: float) -> StepUnderWay | None:
    """Ask a stage what it computes.

    Raises:
        StageLostError: Its process is dead.
        TimeoutError: It does not answer.
    """
    async with asyncio.timeout(timeout_s):
        return await ask(stage.step_under_way.remote(), name)


async def first_fault(
    stages: Sequence[ActorHandle], infos: Sequence[StageInfo], config: RecoveryConfig
) -> tuple[int, PipelineError]:
    """Wait until a stage dies or hangs; returns its id and what happened."""
    watches = [
        asyncio.create_task(_watch_stage(stage, name_stage(info), config))
        for stage, info in zip(stages, infos, strict=True)
    ]
    try:
        await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        stage_id = next(i for i, watch in enumerate(watches) if watch.done())
        return stage_id, watches[stage_id].exception()
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


async def _watch_stage(stage: ActorHandle, name: str, config: RecoveryConfig) -> NoReturn:
    """Ask a stage again and again.

    Raises:
        StageLostError: Its process is dead.
        StageTimeoutError: It does not answer, or its step takes too long.
    """
    while True:
        await asyncio.sleep(config.heartbeat_s)
        step = await _ping_twice(stage, name, config.heartbeat_timeout_s)
        if step is None:
            continue
        limit_s = config.step_timeout_s * max(1.0, step.num_tokens / _STEP_TOKENS)
        if step.elapsed_s > limit_s:
            raise StageTimeoutError(
                f"{name} hangs: micro-batch {step.batch_id} of {step.num_tokens} tokens takes "
                f"{step.elapsed_s:.1f} s, more than {limit_s:.1f} s (recovery.step_timeout_s)"
            )


async def _ping_twice(stage: ActorHandle, name: str, timeout_s: float) -> StepUnderWay | None:
    # Once more, because the process that asks may have been the one that stood still.
    for _ in range(2):
        try:
            return await ping(stage, name, timeout_s / 2)
        except TimeoutError:
            pass
    raise StageTimeoutError(
        f"{name} hangs: it has not answered for {timeout_s:.1f} s (recovery.heartbeat_timeout_s)"
    )
