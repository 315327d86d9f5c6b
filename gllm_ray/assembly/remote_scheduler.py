"""A scheduler actor as the process sees it that owns it."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gllm_ray.assembly.event_stream import EventStream
from gllm_ray.assembly.scheduler_actor import SchedulerActor
from gllm_ray.bundles import SCHEDULER_CPUS
from gllm_ray.config import RecoveryConfig, ServiceConfig
from gllm_ray.errors import PipelineError, SchedulerLostError
from gllm_ray.messages import EngineLoad, GenerationRequest, OpenRequest, TokenEvent
from gllm_ray.stages.heartbeat import answer_in_time
from gllm_ray.stages.ray_errors import ask
from gllm_ray.stages.stage_group import StageGroup
from gllm_ray.stages.supervised_pipeline import Fault

T = TypeVar("T")


class RemoteScheduler:
    """The methods of a `SchedulerActor`, with our errors for Ray's; an `EngineEndpoint`.

    Once the actor is lost, every call raises `SchedulerLostError`.

    Args:
        actor: Dies with the process that started it.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor
        self._events: EventStream | None = None
        self._submissions: dict[str, asyncio.Future[None]] = {}  # under way, by request

    @classmethod
    def launch(cls, config: ServiceConfig, placement_group: PlacementGroup | None = None) -> Self:
        """Ask Ray for the process; it may come up while the stages load."""
        strategy = None
        if placement_group is not None:
            strategy = PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=0
            )
        options = SchedulerActor.options(num_cpus=SCHEDULER_CPUS, scheduling_strategy=strategy)
        return cls(options.remote(config))

    async def start(self, group: StageGroup) -> None:
        """Schedule for connected stages; see `SchedulerActor.start`.

        Raises:
            ConfigError: A file that the configuration names cannot be used; no actor is left.
            PipelineError: The process died; no actor is left.
        """
        try:
            await _ask(self._actor.start.remote(group))
        except BaseException:
            self.kill()
            raise

    async def until_lost(self, config: RecoveryConfig) -> SchedulerLostError:
        """Wait until the process dies or hangs; returns what happened."""
        timeout_s = config.heartbeat_timeout_s
        while True:
            await asyncio.sleep(config.heartbeat_s)
            try:
                await answer_in_time(self.load, timeout_s)
            except SchedulerLostError as error:
                return error
            except TimeoutError:
                return SchedulerLostError(
                    f"the scheduler hangs: it has not answered for {timeout_s:.1f} s "
                    "(recovery.heartbeat_timeout_s)"
                )
            except PipelineError:
                pass  # it lives, and says that its engine gave up

    def kill(self) -> None:
        """End the process, if it still lives."""
        ray.kill(self._actor)

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request; see `EngineEndpoint.add`."""
        await self._submit([request.request_id], self._actor.add.remote(request))

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        """End a request early; see `EngineEndpoint.abort`."""
        # Ray does not keep the order of calls here, and large requests take a slower way.
        if (submission := self._submissions.get(request_id)) is not None:
            await asyncio.wait([submission])
        await _ask(self._actor.abort.remote(request_id, num_output_tokens))

    async def next_events(self) -> list[TokenEvent]:
        """Wait for events; see `EngineEndpoint.next_events`."""
        if self._events is None:
            self._events = EventStream(
                ray.util.get_node_ip_address(),
                lambda address: _ask(self._actor.send_events.remote(address)),
            )
        return await self._events.next()

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """Go on with requests of a lost scheduler; see `EngineEndpoint.restore`."""
        request_ids = [request.request.request_id for request in requests]
        await self._submit(request_ids, self._actor.restore.remote(requests))

    async def load(self) -> EngineLoad:
        """How much the engine holds; raises what broke it."""
        return await _ask(self._actor.load.remote())

    async def report(self, stage_id: int, error: PipelineError) -> None:
        """See `SchedulerActor.report`."""
        await _ask(self._actor.report.remote(stage_id, error))

    async def next_fault(self) -> Fault:
        """See `SchedulerActor.next_fault`."""
        return await _ask(self._actor.next_fault.remote())

    async def resume(self, outcome: StageGroup | PipelineError) -> None:
        """See `SchedulerActor.resume`."""
        await _ask(self._actor.resume.remote(outcome))

    async def _submit(self, request_ids: Sequence[str], answer: Awaitable[None]) -> None:
        """Await the answer to requests; who is cancelled meanwhile aborts them after it."""
        submission = asyncio.ensure_future(_ask(answer))
        self._submissions |= dict.fromkeys(request_ids, submission)
        submission.add_done_callback(lambda _: self._note_answer(request_ids))
        await asyncio.shield(submission)

    def _note_answer(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._submissions.pop(request_id, None)


async def _ask(answer: Awaitable[T]) -> T:
    return await ask(answer, "the scheduler", lost=SchedulerLostError)
