"""The global scheduler of one pipeline as a Ray actor."""

from collections.abc import Sequence
from typing import NoReturn

import ray

from gllm_ray.assembly.engines import build_engine
from gllm_ray.assembly.event_stream import send_events
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.supervisor import Supervisor
from gllm_ray.errors import PipelineError
from gllm_ray.garbage import relax_garbage_collector
from gllm_ray.messages import EngineLoad, GenerationRequest, InboxAddress, OpenRequest
from gllm_ray.stages.stage_group import StageGroup
from gllm_ray.stages.supervised_pipeline import Fault, SupervisedPipeline


# A process of its own, so that HTTP work never holds the lock that the engine loop needs. One that
# Ray restarted would know none of its requests.
@ray.remote(max_restarts=0, max_task_retries=0, enable_task_events=False)
class SchedulerActor:
    """Owns the engine; offers its `EngineEndpoint` to the replica.

    Args:
        config: The replica's configuration.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config

    async def start(self, group: StageGroup) -> None:
        """Begin to serve; called once, before anything else.

        Args:
            group: The stages to schedule for.

        Raises:
            ConfigError: A file that the configuration names cannot be used.
        """
        self._pipeline = SupervisedPipeline(group, self._config)
        self._engine = build_engine(
            self._config,
            self._pipeline,
            num_blocks=group.num_blocks,
            max_model_len=group.max_model_len,
            supervisor=Supervisor(self._pipeline, self._config.recovery),
        )
        relax_garbage_collector()
        self._engine.start()

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request; see `EngineEndpoint.add`."""
        await self._engine.add(request)

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """Go on with requests of a lost scheduler; see `EngineEndpoint.restore`."""
        await self._engine.restore(requests)

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        """End a request early; see `EngineEndpoint.abort`."""
        await self._engine.abort(request_id, num_output_tokens)

    async def send_events(self, address: InboxAddress) -> NoReturn:
        """Send events to the owner as they come; see `event_stream.send_events`."""
        await send_events(self._engine.next_events, address)

    async def load(self) -> EngineLoad:
        """How much the engine holds; raises what broke it."""
        return self._engine.load()

    async def report(self, stage_id: int, error: PipelineError) -> None:
        """Their owner found that a stage died or hangs."""
        self._pipeline.report(stage_id, error)

    async def next_fault(self) -> Fault:
        """Wait for a fault of the stages that their owner is to repair."""
        return await self._pipeline.next_fault()

    async def resume(self, outcome: StageGroup | PipelineError) -> None:
        """See `SupervisedPipeline.resume`."""
        self._pipeline.resume(outcome)
