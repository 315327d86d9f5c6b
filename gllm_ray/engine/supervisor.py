"""Keeps the pipeline of an engine going, whatever happens to its stages."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

from gllm_ray.config import RecoveryConfig
from gllm_ray.engine.recovery import CrashLoop, PoisonSearch
from gllm_ray.errors import PipelineError
from gllm_ray.interfaces import RepairablePipeline
from gllm_ray.messages import TokenEvent
from gllm_ray.scheduling import Scheduler

_POISON = (
    "a stage of the pipeline failed each time it computed the request, and when it ran alone too; "
    "it would probably fail again"
)


class Supervisor:
    """Notices that a pipeline broke, has it repaired, and requeues what it held.

    Args:
        pipeline: The pipeline of the engine.
        config: When to try again, and when to give up.
    """

    def __init__(self, pipeline: RepairablePipeline, config: RecoveryConfig) -> None:
        self._pipeline = pipeline
        self._config = config
        self._crash_loop = CrashLoop(config)
        self._search = PoisonSearch()

    async def run_until_broken(self, steps: Coroutine[Any, Any, NoReturn]) -> PipelineError:
        """Take the steps of an engine until they, or a look at the stages, tell of a fault.

        Returns:
            The fault.
        """
        tasks = [asyncio.create_task(steps), asyncio.create_task(self._pipeline.watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:  # an error of the steps themselves goes first
                if task.done():
                    await task
        except PipelineError as error:
            return error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise AssertionError("neither the steps nor the watch end but by an error")

    async def recover(
        self,
        error: PipelineError,
        scheduler: Scheduler,
        deliver: Callable[[list[TokenEvent]], None],
    ) -> None:
        """Requeue what is alive, end the request that is to blame if it is found, and repair.

        Args:
            error: The fault.
            scheduler: The engine's; nothing may be scheduled meanwhile.
            deliver: Takes the events of those that end.

        Raises:
            PipelineError: It is not worth another attempt; tells the first cause.
        """
        if not self._config.enabled:
            raise error
        events, lost = scheduler.requeue_all()
        blamed = self._search.note_fault(lost)
        deliver(events)
        if blamed is not None:
            deliver(scheduler.fail(blamed, _POISON))
        self._apply(scheduler)
        delay_s = self._crash_loop.note_fault(
            error, _now_s(), is_explained=self._search.is_explained
        )
        while True:
            await asyncio.sleep(delay_s)
            try:
                await self._pipeline.repair()
            except PipelineError as another:
                delay_s = self._crash_loop.note_fault(another, _now_s())
            else:
                break
        self._crash_loop.note_repair(_now_s())

    def observe(self, events: Sequence[TokenEvent], scheduler: Scheduler) -> None:
        """Learn from what became of the requests who is not to blame."""
        if self._search.note_events(events):
            self._apply(scheduler)

    def _apply(self, scheduler: Scheduler) -> None:
        if self._search.alone is None:
            scheduler.hold_back(self._search.held_back)
        else:
            scheduler.admit_only(self._search.alone)
        if self._search.is_solved:
            self._crash_loop.forgive()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
