"""A `RayPipeline` whose stages are watched, and replaced by the process that owns them."""

import asyncio
import time
from dataclasses import dataclass

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import PipelineError, SchedulerLostError, StageTimeoutError
from gllm_ray.stages.heartbeat import max_step_s, name_stage
from gllm_ray.stages.ray_pipeline import RayPipeline, open_control_plane
from gllm_ray.stages.stage_group import StageGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What the owner of the stages is to repair.

    Attributes:
        cause: One line that names the stage, its node and what happened.
        broken: The stages to replace, others that turn out to be lost aside.
        detect_s: From the first sign to the cause.
    """

    cause: str
    broken: frozenset[int]
    detect_s: float


class SupervisedPipeline(RayPipeline):
    """A `RepairablePipeline`; its owner calls `report`, `next_fault`, and then `resume`.

    Args:
        group: Stages that no other pipeline drives.
        config: What counts as hanging.
    """

    def __init__(self, group: StageGroup, config: ServiceConfig) -> None:
        super().__init__(group)
        self._heartbeat_s = config.recovery.heartbeat_s
        # Each stage may use up the time of a step, if the largest micro-batch comes alone.
        self._result_timeout_s = len(group.stages) * max_step_s(
            config.scheduler.max_batch_tokens, config.recovery
        )
        self._reports: asyncio.Queue[tuple[int, PipelineError]] = asyncio.Queue()
        self._faults: asyncio.Queue[Fault] = asyncio.Queue()
        self._repaired: asyncio.Future[StageGroup] | None = None
        self._detect_s = 0.0

    async def watch(self) -> None:
        """See `RepairablePipeline.watch`."""
        tasks = [asyncio.create_task(self._reports.get()), asyncio.create_task(self._next_late())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            stage_id, error = done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
        if self._failure is not None:
            await asyncio.Event().wait()  # `next_result` has noticed it, and will tell
        await self._fail(error, frozenset({stage_id}))
        raise self._failure.with_traceback(None)

    async def _next_late(self) -> tuple[int, PipelineError]:
        """Wait until a result is overdue though no stage hangs: a call or its answer was lost.

        Returns:
            The stage that does not answer, and what happened.
        """
        oldest, since_s = None, 0.0
        while True:
            await asyncio.sleep(self._heartbeat_s)
            batch_id, now_s = self._control.oldest, time.monotonic()
            if batch_id != oldest:
                oldest, since_s = batch_id, now_s
            elif batch_id is not None and now_s - since_s > self._result_timeout_s:
                stage_id = await self._control.first_silent()
                return stage_id, StageTimeoutError(
                    f"{name_stage(self._group.infos[stage_id])} does not compute micro-batch "
                    f"{batch_id}, which has been under way for {now_s - since_s:.1f} s"
                )

    def report(self, stage_id: int, error: PipelineError) -> None:
        """The owner found that a stage died or hangs."""
        self._reports.put_nowait((stage_id, error))

    async def repair(self) -> None:
        """See `RepairablePipeline.repair`."""
        await self._control.end()
        self._repaired = asyncio.get_running_loop().create_future()
        cause = str(self._failure or "a result was not the one due")
        self._faults.put_nowait(Fault(cause=cause, broken=self._broken, detect_s=self._detect_s))
        try:
            self._group = await self._repaired
        except PipelineError as error:
            self._failure, self._broken = error, frozenset()  # the owner knows
            raise
        self._failure, self._broken = None, frozenset()
        self._control = open_control_plane(self._group)
        while not self._reports.empty():  # of the stages that were
            self._reports.get_nowait()

    async def next_fault(self) -> Fault:
        """Wait for a fault that is to be repaired."""
        return await self._faults.get()

    def resume(self, outcome: StageGroup | PipelineError) -> None:
        """Go on with repaired stages, or learn why they could not be repaired.

        Raises:
            SchedulerLostError: Who schedules for this pipeline cannot go on with these stages.
        """
        if isinstance(outcome, PipelineError):
            self._repaired.set_exception(outcome)
        elif outcome.num_blocks != self._group.num_blocks:
            raise SchedulerLostError(
                f"the stages have {outcome.num_blocks} KV blocks now, and the scheduler counts "
                f"{self._group.num_blocks}: another takes over"
            )
        else:
            self._repaired.set_result(outcome)

    async def _fail(self, error: PipelineError, broken: frozenset[int] = frozenset()) -> None:
        start_s = time.monotonic()
        await super()._fail(error, broken)
        self._detect_s = time.monotonic() - start_s
