"""Whether a stage lives, and whether its step makes progress; asked apart from the data.

A process that does not answer hangs; one that answers and computes for long is slow, and that is no
fault until the deadline of its step.

Ray keeps the order of one caller's calls of an actor, so a ping from the process that schedules
would wait for a step that waits for an earlier stage. Hence the owner asks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

from ray.actor import ActorHandle

from gllm_ray.config import RecoveryConfig
from gllm_ray.errors import PipelineError, StageTimeoutError
from gllm_ray.messages import StageInfo, StepUnderWay
from gllm_ray.stages.ray_errors import ask
from gllm_ray.stages.stage_group import CONNECT_TIMEOUT_S

T = TypeVar("T")

# The tokens of a micro-batch to which `step_timeout_s` refers.
_STEP_TOKENS = 1024


def name_stage(info: StageInfo) -> str:
    """How messages name a stage."""
    layers = f"layers {info.first_layer}-{info.last_layer - 1}"
    return f"stage {info.stage_id} ({layers}, {info.node})"


def max_step_s(num_tokens: int, config: RecoveryConfig) -> float:
    """How long a stage may compute a micro-batch."""
    return config.step_timeout_s * max(1.0, num_tokens / _STEP_TOKENS)


async def ask_step(stage: ActorHandle, name: str, timeout_s: float) -> StepUnderWay | None:
    """Ask a stage what it computes.

    Raises:
        StageLostError: Its process is dead.
        TimeoutError: It does not answer.
    """
    return await answer_in_time(lambda: ask(stage.step_under_way.remote(), name), timeout_s)


async def settle(stage: ActorHandle, name: str, timeout_s: float) -> None:
    """Wait until a stage that refuses steps has ended the one under way.

    Args:
        stage: The stage.
        name: How messages name it.
        timeout_s: How long it may compute nothing and yet not answer.

    Raises:
        StageLostError: Its process is dead.
        StageTimeoutError: It hangs, and not in a step.
    """
    settled = asyncio.ensure_future(ask(stage.settle.remote(), name))
    try:
        while not (await asyncio.wait([settled], timeout=timeout_s))[0]:
            if await ask_step(stage, name, timeout_s) is None:
                raise StageTimeoutError(
                    f"{name} hangs: it computes nothing and took no call for {timeout_s:.1f} s "
                    "(recovery.heartbeat_timeout_s)"
                )
        await settled
    except TimeoutError:
        raise StageTimeoutError(f"{name} hangs: it does not answer") from None
    finally:
        settled.cancel()


async def first_fault(
    stages: Mapping[int, ActorHandle], infos: Sequence[StageInfo], config: RecoveryConfig
) -> tuple[int, PipelineError]:
    """Wait until one of some stages dies or hangs; returns its id and what happened.

    Args:
        stages: The stages to watch, by id.
        infos: What each stage of the pipeline holds.
        config: What counts as hanging.
    """
    if not stages:
        await asyncio.Event().wait()
    watches = {
        asyncio.create_task(_watch_stage(stage, name_stage(infos[i]), config)): i
        for i, stage in stages.items()
    }
    try:
        done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        watch = done.pop()
        return watches[watch], watch.exception()
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


async def answer_in_time(ask_once: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """An answer to a question that is asked twice, because who asks may have stood still itself.

    Raises:
        TimeoutError: There is none.
    """
    try:
        async with asyncio.timeout(timeout_s / 2):
            return await ask_once()
    except TimeoutError:
        async with asyncio.timeout(timeout_s / 2):
            return await ask_once()


async def _watch_stage(stage: ActorHandle, name: str, config: RecoveryConfig) -> NoReturn:
    """Ask a stage again and again.

    Raises:
        StageLostError: Its process is dead.
        StageTimeoutError: It does not answer, or its step takes too long.
    """
    while True:
        await asyncio.sleep(config.heartbeat_s)
        timeout_s = config.heartbeat_timeout_s
        try:
            step = await ask_step(stage, name, timeout_s)
        except TimeoutError:
            raise StageTimeoutError(
                f"{name} hangs: it has not answered for {timeout_s:.1f} s "
                "(recovery.heartbeat_timeout_s)"
            ) from None
        if step is None:
            continue
        if step.batch_id < 0:
            what, limit_s, key = "joining its edges", CONNECT_TIMEOUT_S, ""
        else:
            what = f"micro-batch {step.batch_id} of {step.num_tokens} tokens"
            limit_s, key = max_step_s(step.num_tokens, config), " (recovery.step_timeout_s)"
        if step.elapsed_s > limit_s:
            raise StageTimeoutError(
                f"{name} hangs: {what} takes {step.elapsed_s:.1f} s, more than {limit_s:.1f} s{key}"
            )
