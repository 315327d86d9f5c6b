"""One pipeline on a Ray cluster, owned by the process that starts it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from ray.util.placement_group import PlacementGroup

from gllm_ray.assembly.remote_scheduler import RemoteScheduler
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.journal import JournaledEndpoint
from gllm_ray.engine.recovery import CrashLoop
from gllm_ray.errors import GllmRayError, PipelineError, SchedulerLostError
from gllm_ray.messages import EngineLoad, GenerationRequest, OpenRequest, TokenEvent
from gllm_ray.stages.repair import RepairTimes, StageKeeper
from gllm_ray.stages.stage_group import StageGroup, start_stage_group, stop_stages
from gllm_ray.stages.supervised_pipeline import Fault
from gllm_ray.stages.timeline import PhaseClock

logger = logging.getLogger(__name__)

_STANDS_STILL = "the pipeline stands still: %s"


class PipelineReplica:
    """The stage actors and the scheduler actor of one pipeline; implements `EngineEndpoint`.

    The actors die with the process that made this. It replaces stages when the scheduler tells of a
    fault, and the scheduler when it dies or hangs.

    Args:
        config: What is served, and how.
        group: Connected stages.
        scheduler: Theirs.
        placement_group: As for `start`.
    """

    def __init__(
        self,
        config: ServiceConfig,
        group: StageGroup,
        scheduler: RemoteScheduler,
        placement_group: PlacementGroup | None,
    ) -> None:
        self._config = config
        self._placement_group = placement_group
        self._scheduler = scheduler
        self._stages = StageKeeper(config, group, placement_group)
        self._endpoint = JournaledEndpoint(scheduler)
        self._crash_loop = CrashLoop(config.recovery)
        self._stopped_s: float | None = None  # since when the pipeline stands still
        self._supervision = asyncio.create_task(self._supervise())

    @classmethod
    async def start(
        cls, config: ServiceConfig, placement_group: PlacementGroup | None = None
    ) -> Self:
        """Load the stages, connect them, and start their scheduler.

        Args:
            config: What to serve, and how.
            placement_group: Laid out as `gllm_ray.bundles.bundles` says; None for anywhere.

        Raises:
            ConfigError: The model cannot be served as configured; no actor is left behind.
            PipelineError: A process died; no actor is left behind.
        """
        scheduler = RemoteScheduler.launch(config, placement_group)
        try:
            group = await start_stage_group(config, placement_group)
        except BaseException:
            scheduler.kill()
            raise
        clock = PhaseClock()
        try:
            await scheduler.start(group)
        except BaseException:
            await stop_stages(group.stages)
            raise
        clock.end("scheduler")
        group = replace(group, startup_s={**group.startup_s, **clock.times_s})
        return cls(config, group, scheduler, placement_group)

    @property
    def group(self) -> StageGroup:
        """The stages and what they hold."""
        return self._stages.group

    @property
    def latest_repair(self) -> RepairTimes | None:
        """When the latest repair that replaced stages came how far."""
        return self._stages.latest_repair

    @property
    def standstill_s(self) -> float:
        """How long it has been under repair; 0: it runs."""
        return 0.0 if self._stopped_s is None else time.monotonic() - self._stopped_s

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request; see `EngineEndpoint.add`."""
        await self._endpoint.add(request)

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """Go on with requests of another pipeline, which is lost; see `EngineEndpoint.restore`."""
        await self._endpoint.restore(requests)

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        """End a request early; see `EngineEndpoint.abort`."""
        await self._endpoint.abort(request_id, num_output_tokens)

    async def next_events(self) -> list[TokenEvent]:
        """Wait for events; see `EngineEndpoint.next_events`."""
        return await self._endpoint.next_events()

    async def load(self) -> EngineLoad:
        """How much the pipeline holds; waits while its scheduler is being replaced.

        Raises:
            PipelineError: The pipeline is broken.
        """
        return await self._endpoint.ask(lambda _: self._scheduler.load())

    async def check_health(self) -> None:
        """Find out whether the pipeline works, or is being repaired.

        Raises:
            PipelineError: The engine gave up, or this did.
        """
        if self._supervision.done():
            await self._supervision
        try:
            await self._scheduler.load()
        except SchedulerLostError:
            if not self._config.recovery.enabled:
                raise

    async def close(self) -> None:
        """End the scheduler and the stages, whichever of them still live."""
        self._supervision.cancel()
        await asyncio.gather(self._supervision, return_exceptions=True)
        self._scheduler.kill()
        await self._stages.close()

    async def _supervise(self) -> None:
        try:
            while True:
                await self._replace_scheduler(await self._until_lost())
        except PipelineError as error:
            self._give_up(error)
            raise
        except Exception as error:
            logger.exception("supervision of the pipeline broke")
            failure = PipelineError(f"internal error: {type(error).__name__}")
            self._give_up(failure)
            raise failure from error

    def _give_up(self, error: PipelineError) -> None:
        self._endpoint.fail(error)
        self._scheduler.kill()  # it may live, and who waits for it would wait on

    async def _until_lost(self) -> SchedulerLostError:
        """Repair the stages until their scheduler is lost."""
        loss = self._endpoint.loss
        tasks = [
            asyncio.create_task(self._repair_for_ever()),
            asyncio.create_task(self._scheduler.until_lost(self._config.recovery)),
        ]
        try:
            await asyncio.wait([loss, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if not loss.done():
                error = next(task.result() for task in tasks if task.done())
                self._endpoint.note_loss(self._scheduler, error)
            return loss.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _repair_for_ever(self) -> SchedulerLostError:
        last_failure = ""
        try:
            while True:
                last_failure = await self._repair_once(last_failure)
        except SchedulerLostError as error:
            return error

    async def _repair_once(self, last_failure: str) -> str:
        """Repair the stages at the next fault, or try again.

        Args:
            last_failure: Why the latest repair failed; empty if it did not.

        Returns:
            Why this one failed; empty if it did not.
        """
        watching = asyncio.create_task(self._watch())
        try:
            fault = await self._scheduler.next_fault()
        finally:
            watching.cancel()
        self._note_stop()
        if fault.cause != last_failure:
            logger.warning(_STANDS_STILL, fault.cause)
        try:
            await self._stages.repair(fault)
        except GllmRayError as error:
            logger.warning("the repair failed: %s", error)
            await self._scheduler.resume(PipelineError(str(error)))
            return str(error)
        await self._scheduler.resume(self.group)
        self._stopped_s = None
        return ""

    def _note_stop(self) -> None:
        if self._stopped_s is None:
            self._stopped_s = time.monotonic()

    async def _watch(self) -> None:
        fault = await self._stages.next_fault()
        with contextlib.suppress(PipelineError):  # without a scheduler nobody needs to know
            await self._scheduler.report(*fault)

    async def _replace_scheduler(self, error: PipelineError) -> None:
        """Start another scheduler, and let it go on with every open request.

        Raises:
            PipelineError: It is not worth another attempt; tells the first cause.
        """
        self._note_stop()
        self._scheduler.kill()  # it may live, and who waits for it would wait on
        if not self._config.recovery.enabled:
            raise error
        logger.warning(_STANDS_STILL, error)
        while True:
            await asyncio.sleep(self._crash_loop.note_fault(error, time.monotonic()))
            try:
                await self._start_scheduler(str(error))
            except GllmRayError as another:
                error = PipelineError(str(another))
            else:
                break
        self._crash_loop.note_repair(time.monotonic())
        self._stopped_s = None

    async def _start_scheduler(self, cause: str) -> None:
        self._scheduler.kill()
        start_s = time.monotonic()
        # The stages may still compute for the lost one; a new epoch ends that.
        await self._stages.repair(Fault(cause=cause, broken=frozenset(), detect_s=0.0))
        reconnected_s = time.monotonic()
        limit_s = self._config.recovery.restart_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                scheduler = RemoteScheduler.launch(self._config, self._placement_group)
                await scheduler.start(self.group)
                self._scheduler = scheduler
                restarted_s = time.monotonic()
                await self._endpoint.resume(scheduler)
        except TimeoutError:
            error = SchedulerLostError(
                f"the scheduler did not take over in {limit_s:.0f} s (recovery.restart_timeout_s)"
            )
            self._endpoint.note_loss(self._scheduler, error)  # it may have begun to resume
            raise error from None
        logger.info(
            "recovered, with a new scheduler: reconnect %.2f s, restart %.2f s, resume %.2f s",
            reconnected_s - start_s,
            restarted_s - reconnected_s,
            time.monotonic() - restarted_s,
        )
