"""A `RayPipeline` whose stages are watched, and replaced by the process that owns them."""

import asyncio
import time
from dataclasses import dataclass

from gllm_ray.errors import PipelineError, SchedulerLostError
from gllm_ray.stages.metadata import MetadataEncoder
from gllm_ray.stages.ray_pipeline import RayPipeline, StageGroup


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
    """

    def __init__(self, group: StageGroup) -> None:
        super().__init__(group)
        self._reports: asyncio.Queue[tuple[int, PipelineError]] = asyncio.Queue()
        self._faults: asyncio.Queue[Fault] = asyncio.Queue()
        self._repaired: asyncio.Future[StageGroup] | None = None
        self._detect_s = 0.0

    async def watch(self) -> None:
        """See `RepairablePipeline.watch`."""
        while True:
            stage_id, error = await self._reports.get()
            if self._failure is None:  # else `next_result` has noticed it
                await self._fail(error, frozenset({stage_id}))
                raise self._failure

    def report(self, stage_id: int, error: PipelineError) -> None:
        """The owner found that a stage died or hangs."""
        self._reports.put_nowait((stage_id, error))

    async def repair(self) -> None:
        """See `RepairablePipeline.repair`."""
        await self._drain()
        self._repaired = asyncio.get_running_loop().create_future()
        cause = str(self._failure or "a result was not the one due")
        self._faults.put_nowait(
            Fault(
                cause=cause,
                broken=self._broken,
                detect_s=self._detect_s,
            )
        )
        try:
            self._group = await self._repaired
        except PipelineError as error:
            self._failure, self._broken = error, frozenset()  # the owner knows
            raise
        self._failure, self._broken = None, frozenset()
        self._encoder = MetadataEncoder()  # the stages forgot what they were told
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
