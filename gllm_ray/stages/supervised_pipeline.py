"""A `RayPipeline` whose stages are watched, and replaced by the process that owns them."""

import asyncio
import time
from dataclasses import dataclass

from gllm_ray.config import RecoveryConfig
from gllm_ray.errors import PipelineError
from gllm_ray.stages.heartbeat import watch_stage
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
    """A `RepairablePipeline`; its owner calls `next_fault`, and then `resume`.

    Args:
        group: Stages that no other pipeline drives.
        config: How often to look at them, and when they hang.
    """

    def __init__(self, group: StageGroup, config: RecoveryConfig) -> None:
        super().__init__(group)
        self._config = config
        self._faults: asyncio.Queue[Fault] = asyncio.Queue()
        self._repaired: asyncio.Future[StageGroup] | None = None
        self._detect_s = 0.0

    async def watch(self) -> None:
        """See `RepairablePipeline.watch`."""
        watches = {
            asyncio.create_task(watch_stage(stage, name, self._config)): stage_id
            for stage_id, (stage, name) in enumerate(self._named_stages())
        }
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            if self._failure is not None:
                await asyncio.Event().wait()  # for `next_result`, which has noticed it too
            first = done.pop()
            await self._fail(first.exception(), frozenset({watches[first]}))
            raise self._failure
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def repair(self) -> None:
        """See `RepairablePipeline.repair`."""
        await self._drain()
        self._repaired = asyncio.get_running_loop().create_future()
        self._faults.put_nowait(
            Fault(cause=str(self._failure), broken=self._broken, detect_s=self._detect_s)
        )
        try:
            self._group = await self._repaired
        except PipelineError as error:
            self._failure = error
            raise
        self._failure, self._broken = None, frozenset()

    async def next_fault(self) -> Fault:
        """Wait for a fault that is to be repaired."""
        return await self._faults.get()

    def resume(self, outcome: StageGroup | PipelineError) -> None:
        """Go on with repaired stages, or learn why they could not be repaired."""
        if isinstance(outcome, StageGroup):
            self._repaired.set_result(outcome)
        else:
            self._repaired.set_exception(outcome)

    async def _fail(self, error: PipelineError, broken: frozenset[int] = frozenset()) -> None:
        start_s = time.monotonic()
        await super()._fail(error, broken)
        self._detect_s = time.monotonic() - start_s
