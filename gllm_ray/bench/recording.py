"""A scheduler in service that notes what it does when."""

import time
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

import ray

from gllm_ray.assembly.engines import build_engine
from gllm_ray.assembly.event_stream import send_events
from gllm_ray.config import ServiceConfig
from gllm_ray.garbage import relax_garbage_collector
from gllm_ray.interfaces import Pipeline
from gllm_ray.messages import (
    GenerationRequest,
    InboxAddress,
    MicroBatch,
    MicroBatchResult,
    TokenEvent,
)
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.stages.ray_pipeline import RayPipeline
from gllm_ray.stages.stage_group import StageGroup


class RecordedStep(NamedTuple):
    """A micro-batch as the scheduler sees it, in seconds of the node's wall clock.

    Attributes:
        batch_id: The micro-batch.
        load: What the stages compute.
        num_sequences: Its sequences.
        free_s: The result after which it was formed at once; None: there was none.
        submitted_s: The beginning of its submission.
        result_s: When its result came.
    """

    batch_id: int
    load: StepLoad
    num_sequences: int
    free_s: float | None
    submitted_s: float
    result_s: float


class Record(NamedTuple):
    """What a scheduler did.

    Attributes:
        steps: Its micro-batches, in order.
        batches: The same, as the stages got them.
        ttft_s: Of each request, from its arrival at the scheduler to the delivery of its first
            token.
    """

    steps: list[RecordedStep]
    batches: list[MicroBatch]
    ttft_s: list[float]


class RecordingPipeline:
    """Implements `Pipeline` on top of another, and notes when the engine submits and gets results.

    Attributes:
        steps: Micro-batches whose results have come.
        batches: All micro-batches.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._open: dict[int, RecordedStep] = {}
        self._latest_result_s: float | None = None
        self.steps: list[RecordedStep] = []
        self.batches: list[MicroBatch] = []

    def submit(self, batch: MicroBatch) -> None:
        """See `Pipeline`."""
        self._open[batch.batch_id] = RecordedStep(
            batch.batch_id,
            load_of(batch),
            len(batch.sequences),
            self._latest_result_s,
            time.time(),
            0.0,
        )
        self._latest_result_s = None
        self.batches.append(batch)
        self._pipeline.submit(batch)

    async def next_result(self) -> MicroBatchResult:
        """See `Pipeline`."""
        self._latest_result_s = None  # what is formed from here on follows a request instead
        result = await self._pipeline.next_result()
        self._latest_result_s = time.time()
        step = self._open.pop(result.batch_id)
        self.steps.append(step._replace(result_s=self._latest_result_s))
        if not self._open:  # the engine may not come back before there is a request
            self._latest_result_s = None
        return result

    async def close(self) -> None:
        """See `Pipeline`."""
        await self._pipeline.close()


def load_of(batch: MicroBatch) -> StepLoad:
    """What a micro-batch makes each stage compute; a row alone counts as a decode, as it costs."""
    rows = [item for item in batch.sequences if item.num_scheduled_tokens == 1]
    chunks = [item for item in batch.sequences if item.num_scheduled_tokens > 1]
    return StepLoad(
        len(rows),
        sum(row.end for row in rows),
        sum(chunk.num_scheduled_tokens for chunk in chunks),
        sum(chunk.num_scheduled_tokens * chunk.end for chunk in chunks),
    )


class RecordingScheduler:
    """Serves as `SchedulerActor` does, whose methods these are, and notes when it did what."""

    def __init__(self, config: ServiceConfig, group: StageGroup) -> None:
        self._config = config
        self._group = group
        self._added_s: dict[str, float] = {}
        self._ttft_s: list[float] = []

    async def start(self) -> None:
        """See `SchedulerActor.start`."""
        self._pipeline = RecordingPipeline(RayPipeline(self._group))
        self._engine = build_engine(
            self._config,
            self._pipeline,
            num_blocks=self._group.num_blocks,
            max_model_len=self._group.max_model_len,
        )
        relax_garbage_collector()
        self._engine.start()

    async def add(self, request: GenerationRequest) -> None:
        """See `EngineEndpoint.add`."""
        self._added_s[request.request_id] = time.time()
        await self._engine.add(request)

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        """See `EngineEndpoint.abort`."""
        await self._engine.abort(request_id, num_output_tokens)

    async def send_events(self, address: InboxAddress) -> NoReturn:
        """See `SchedulerActor.send_events`."""
        await send_events(self._next_events, address)

    def take(self) -> Record:
        """What was noted since the last call, by an engine that is idle now."""
        pipeline = self._pipeline
        record = Record(pipeline.steps, pipeline.batches, self._ttft_s)
        pipeline.steps, pipeline.batches, self._ttft_s = [], [], []
        return record

    async def _next_events(self) -> list[TokenEvent]:
        events = await self._engine.next_events()
        self._note_first(events)
        return events

    def _note_first(self, events: Iterable[TokenEvent]) -> None:
        now_s = time.time()
        for event in events:
            if (added_s := self._added_s.pop(event.request_id, None)) is not None:
                self._ttft_s.append(now_s - added_s)


RecordingSchedulerActor = ray.remote(max_restarts=0, max_task_retries=0, enable_task_events=False)(
    RecordingScheduler
)
