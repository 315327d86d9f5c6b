"""Puts a pipeline's stages together again: only what broke is replaced."""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from ray.util.placement_group import PlacementGroup

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import PipelineError, StageLostError, StagesFailedError, StageTimeoutError
from gllm_ray.messages import StageInfo
from gllm_ray.partition import size_kv_cache
from gllm_ray.stages.heartbeat import ask_step, first_fault, name_stage, settle
from gllm_ray.stages.placement import start_stage
from gllm_ray.stages.ray_errors import ask
from gllm_ray.stages.stage_group import (
    CONNECT_TIMEOUT_S,
    StageGroup,
    all_stages,
    ask_all,
    connect_stages,
    stop_stages,
)
from gllm_ray.stages.supervised_pipeline import Fault

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairTimes:
    """When a repair came how far, on the clock of `time.monotonic`.

    Attributes:
        begun_s: The fault was known to the owner of the stages.
        restarted_s: The processes of all new stages were up.
        reloaded_s: They had their weights and their KV cache.
        connected_s: All stages were connected.
    """

    begun_s: float
    restarted_s: float
    reloaded_s: float
    connected_s: float


class StageKeeper:
    """Owns the stages of a pipeline, watches them, and replaces those that break.

    The others keep their process and their weights. A new stage starts in the bundle of the old
    one; Ray gives that bundle another node when its own is gone.

    Args:
        config: The replica's configuration.
        group: Connected stages.
        placement_group: As when the group was started.

    Attributes:
        group: The stages and what they hold.
        latest_repair: The latest one that replaced stages; None: none has.
    """

    def __init__(
        self,
        config: ServiceConfig,
        group: StageGroup,
        placement_group: PlacementGroup | None = None,
    ) -> None:
        self.group = group
        self.latest_repair: RepairTimes | None = None
        self._config = config
        self._placement_group = placement_group
        self._broken: frozenset[int] = frozenset()  # known to be, and not yet replaced

    async def next_fault(self) -> tuple[int, PipelineError]:
        """Wait until a stage breaks that is not known to be broken.

        Returns:
            Its id, and what happened.
        """
        stages = {i: s for i, s in enumerate(self.group.stages) if i not in self._broken}
        return await first_fault(stages, self.group.infos, self._config.recovery)

    async def repair(self, fault: Fault) -> None:
        """Replace the stages that broke, those too that break meanwhile, and connect all anew.

        If that fails, the next call goes on with the stages that have been replaced. A stage that
        has room for fewer KV blocks than the one that it replaces lowers `num_blocks` of the group.

        Raises:
            ConfigError: The model cannot be loaded any more.
            PipelineError: A stage failed, died or did not come up in time.
        """
        self._broken |= fault.broken
        limit_s = self._config.recovery.restart_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._repair(fault.detect_s)
        except TimeoutError:
            raise StageTimeoutError(
                f"stages {sorted(self._broken)} were not replaced in {limit_s:.0f} s "
                "(recovery.restart_timeout_s); is there a node with free resources for them?"
            ) from None

    async def close(self) -> None:
        """Kill the stages."""
        await stop_stages(self.group.stages)

    async def _repair(self, detect_s: float) -> None:
        begun_s = time.monotonic()
        self._broken = self._broken or await self._find_lost()
        leaving = asyncio.create_task(self._leave_edges())
        try:
            restarts_s = await self._replace_broken()
        finally:
            await _cancel(leaving)
        reloaded_s = time.monotonic()
        await self._connect()
        if restarts_s:
            times = self.latest_repair = RepairTimes(
                begun_s=begun_s,
                restarted_s=max(restarts_s.values()),
                reloaded_s=reloaded_s,
                connected_s=time.monotonic(),
            )
            logger.info(
                "recovered, with a new %s: detect %.2f s, restart %.2f s, reload %.2f s, "
                "reconnect %.2f s",
                " and ".join(name_stage(self.group.infos[i]) for i in sorted(restarts_s)),
                detect_s,
                times.restarted_s - times.begun_s,
                times.reloaded_s - times.restarted_s,
                times.connected_s - times.reloaded_s,
            )

    async def _leave_edges(self) -> None:
        """End at once what the other stages wait for: NCCL would wait for ever."""
        others = [stage for i, stage in enumerate(self.group.stages) if i not in self._broken]
        with suppress(PipelineError):  # who is lost is found when the stages are connected
            await ask_all(stage.leave_edges.remote() for stage in others)

    async def _find_lost(self) -> frozenset[int]:
        """The stages that are dead or do not answer."""
        timeout_s = self._config.recovery.heartbeat_timeout_s
        named = zip(self.group.stages, map(name_stage, self.group.infos), strict=True)
        asked = (ask_step(stage, name, timeout_s) for stage, name in named)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        is_lost = [isinstance(answer, (StageLostError, TimeoutError)) for answer in answers]
        return frozenset(itertools.compress(range(len(is_lost)), is_lost))

    async def _replace_broken(self) -> dict[int, float]:
        """Replace all broken stages at the same time.

        Returns:
            When the process of each new stage was up.
        """
        tasks: dict[int, asyncio.Task[float]] = {}
        try:
            while True:
                for stage_id in self._broken - tasks.keys():
                    tasks[stage_id] = asyncio.create_task(self._replace(stage_id))
                pending = [task for task in tasks.values() if not task.done()]
                if not pending:
                    return {stage_id: task.result() for stage_id, task in tasks.items()}
                await self._fault_before_end(pending)
        finally:
            await _cancel(*tasks.values())

    async def _replace(self, stage_id: int) -> float:
        await stop_stages([self.group.stages[stage_id]])
        stage = start_stage(self._config, stage_id, self._placement_group)
        answer = partial(ask, actor=f"stage {stage_id}")
        try:
            await answer(stage.ping.remote())
            restarted_s = time.monotonic()
            info = await answer(stage.load.remote())
            num_blocks = min(self.group.num_blocks, self._room(info))
            await answer(stage.allocate_kv_cache.remote(num_blocks))
        except BaseException:
            await stop_stages([stage])
            raise
        self.group = replace(
            self.group,
            stages=_with(self.group.stages, stage_id, stage),
            infos=_with(self.group.infos, stage_id, info),
            num_blocks=min(self.group.num_blocks, num_blocks),
        )
        self._broken -= {stage_id}
        return restarted_s

    def _room(self, info: StageInfo) -> int:
        """KV blocks for which a stage has room; fewer than before if memory is held elsewhere."""
        return size_kv_cache([info], self._config.kv_cache.block_size, self.group.max_model_len)

    async def _connect(self) -> None:
        self.group = replace(self.group, epoch=self.group.epoch + 1)
        connecting = asyncio.create_task(self._settle_and_connect())
        try:
            fault = await self._fault_before_end([connecting])
        finally:
            if not connecting.done():
                await _cancel(connecting)
        if fault is not None:
            raise fault
        self.group = await connecting

    async def _settle_and_connect(self) -> StageGroup:
        """Connect stages that all take calls; a neighbour would wait long for one that does not."""
        stages = [*zip(self.group.stages, map(name_stage, self.group.infos), strict=True)]
        timeout_s = self._config.recovery.heartbeat_timeout_s
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await ask_all(stage.leave_edges.remote() for stage, _ in stages)
            await all_stages(settle(stage, name, timeout_s) for stage, name in stages)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await connect_stages(self.group)
        except TimeoutError:
            raise StageTimeoutError(
                f"the stages were not connected in {CONNECT_TIMEOUT_S:.0f} s: one of them hangs"
            ) from None
        except StagesFailedError as error:
            # A stage whose neighbour is lost fails, too.
            self._broken |= await self._find_lost() or error.stage_ids
            raise

    async def _fault_before_end(self, tasks: Sequence[asyncio.Task[Any]]) -> PipelineError | None:
        """Wait until one of some tasks ends, or until another stage breaks.

        Returns:
            What broke it.
        """
        watch = asyncio.create_task(self.next_fault())
        try:
            await asyncio.wait([*tasks, watch], return_when=asyncio.FIRST_COMPLETED)
            if not watch.done():
                return None
            stage_id, error = watch.result()
            logger.warning("another stage broke during the repair: %s", error)
            self._broken |= {stage_id}
            return error
        finally:
            await _cancel(watch)


def _with(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
