"""What a micro-batch costs beside the computing of its stages, measured on idle stages."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from ray.actor import ActorHandle

from gllm_ray.assembly.engines import build_engine
from gllm_ray.bench.profile_grid import ProfilePoint
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.interfaces import Pipeline
from gllm_ray.messages import GenerationRequest, MicroBatch, MicroBatchResult, StepInterval
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_model import PipelineCost
from gllm_ray.simulation.links import Link
from gllm_ray.simulation.virtual_pipeline import Timing, uniform_links
from gllm_ray.stages.ray_pipeline import RayPipeline, StageGroup, connect_stages

_NUM_CONCURRENT = 16
_SHORTEST_S = 1e-9  # no time is told apart from 0
_NUM_LONG = 5  # micro-batches of the longest chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCosts:
    """Medians, in seconds unless said otherwise.

    Attributes:
        schedule_s: From a result, or the micro-batch before, to the end of the submission of one
            without sequences: commit, decision, and calls to the stages.
        schedule_sequence_s: On top, for each sequence.
        dispatch_s: From the end of the submission to the start on the first stage.
        step_s: From the end of a micro-batch on a stage to the start of the next that waits.
        hop_s: From the end of one row on a stage to its start on the next.
        hop_bandwidth_bytes_s: Bytes of longer hidden states on top, a second.
        result_s: From the end on the last stage to the result at the scheduler.
        stage_slowdown: A stage's time while scheduler and clients run beside it, over that without.
    """

    schedule_s: float
    schedule_sequence_s: float
    dispatch_s: float
    step_s: float
    hop_s: float
    hop_bandwidth_bytes_s: float
    result_s: float
    stage_slowdown: float

    def timing(self, num_stages: int) -> Timing:
        """All of it as the simulator has it, for stages whose times include `step_s`."""
        link = Link(
            name="measured",
            is_calibrated=True,
            provenance="between the stages of this pipeline",
            latency_s=max(0.0, self.hop_s - self.step_s),
            bandwidth_bytes_s=self.hop_bandwidth_bytes_s,
        )
        return Timing(
            links=uniform_links(link, num_stages),
            schedule_s=self.schedule_s,
            schedule_sequence_s=self.schedule_sequence_s,
            dispatch_s=self.dispatch_s,
            result_s=max(0.0, self.result_s - self.step_s),
        )


async def measure_host_costs(
    config: ServiceConfig, group: StageGroup, cost: PipelineCost, *, num_steps: int = 50
) -> HostCosts:
    """Run a few micro-batches and requests through stages on this machine that nobody else uses.

    Args:
        config: Of the stages.
        group: The stages; afterwards they are connected for a later epoch than the group's.
        cost: Of the stages while neither scheduler nor clients run beside them.
        num_steps: Micro-batches of each measurement.

    Raises:
        PipelineError: A stage failed.
    """
    step_s = await _measure_step(await _reconnected(group, 1), num_steps)
    short, long = ProfilePoint(num_decodes=1), _longest_chunk(config, group)
    short_hop_s = await _measure_hop(config, await _reconnected(group, 2), short, num_steps)
    long_hop_s = await _measure_hop(config, await _reconnected(group, 3), long, _NUM_LONG)
    alone, together, intervals = await _serve(config, await _reconnected(group, 4), num_steps)

    long_bytes = cost.layout.hop_bytes(long.load) - cost.layout.hop_bytes(short.load)
    schedule_s = median(step.schedule_s for step in alone.values())
    num_more = fmean(step.load.num_decodes for step in together.values()) - 1
    more_s = median(step.schedule_s for step in together.values()) - schedule_s
    sequence_s = max(0.0, more_s / num_more) if num_more else 0.0
    first, last = intervals[0], intervals[-1]
    return HostCosts(
        schedule_s=max(0.0, schedule_s - sequence_s),
        schedule_sequence_s=sequence_s,
        dispatch_s=_delay_s((step.submitted_s, first[i].start_s) for i, step in alone.items()),
        step_s=step_s,
        hop_s=short_hop_s,
        hop_bandwidth_bytes_s=long_bytes / max(long_hop_s - short_hop_s, _SHORTEST_S),
        result_s=_delay_s((last[i].end_s, step.result_s) for i, step in alone.items()),
        stage_slowdown=median(
            (stage[i].end_s - stage[i].start_s) / cost.stage_time_s(stage_id, step.load)
            for stage_id, stage in enumerate(intervals)
            for i, step in together.items()
        ),
    )


async def stage_intervals(stages: Sequence[ActorHandle[Any]]) -> list[tuple[StepInterval, ...]]:
    """When each stage computed its latest micro-batches."""
    return list(await asyncio.gather(*(stage.intervals.remote() for stage in stages)))


@dataclass(slots=True, kw_only=True)
class _Step:
    """A micro-batch of single rows as the engine sees it, in the wall clock of the stages."""

    load: StepLoad
    schedule_s: float
    submitted_s: float
    result_s: float = 0.0


class _RecordingPipeline:
    """Implements `Pipeline`, and notes when the engine submits and gets results."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._steps: dict[int, _Step] = {}
        self._latest_result_s: float | None = None

    def submit(self, batch: MicroBatch) -> None:
        self._pipeline.submit(batch)
        now_s = time.time()
        if self._latest_result_s is not None:  # else the engine was idle before
            self._steps[batch.batch_id] = _Step(
                load=_load_of_rows(batch),
                schedule_s=now_s - self._latest_result_s,
                submitted_s=now_s,
            )
            self._latest_result_s = None

    async def next_result(self) -> MicroBatchResult:
        result = await self._pipeline.next_result()
        self._latest_result_s = time.time()
        if (step := self._steps.get(result.batch_id)) is not None:
            step.result_s = self._latest_result_s
        return result

    async def close(self) -> None:
        await self._pipeline.close()

    def take(self) -> dict[int, _Step]:
        """What was noted since the last call, of an engine that is idle now."""
        self._latest_result_s = None
        steps, self._steps = self._steps, {}
        return steps


async def _serve(
    config: ServiceConfig, group: StageGroup, num_steps: int
) -> tuple[dict[int, _Step], dict[int, _Step], list[dict[int, StepInterval]]]:
    """The micro-batches of one request, those of several at a time, and the stages' intervals."""
    pipeline = _RecordingPipeline(RayPipeline(group))
    engine = build_engine(
        config, pipeline, num_blocks=group.num_blocks, max_model_len=group.max_model_len
    )
    client = EngineClient(engine)
    engine.start()
    await client.start()

    async def generate(index: int) -> None:
        request = GenerationRequest(
            request_id=str(index),
            prompt_token_ids=(index,),
            max_tokens=min(num_steps, group.max_model_len - 1),
        )
        async for _ in client.generate(request):
            pass

    try:
        await generate(0)
        alone = pipeline.take()
        await asyncio.gather(*map(generate, range(1, 1 + _NUM_CONCURRENT)))
        together = pipeline.take()
        stages = await stage_intervals(group.stages)
        return alone, together, [{each.batch_id: each for each in stage} for stage in stages]
    finally:
        await client.close()
        await engine.close()


async def _measure_step(group: StageGroup, num_steps: int) -> float:
    """All micro-batches wait for the first stage together, so it never waits for one."""
    pipeline = RayPipeline(group)
    for batch_id in range(num_steps):
        pipeline.submit(ProfilePoint(num_decodes=1).batch(batch_id, block_size=1))
    for _ in range(num_steps):
        await pipeline.next_result()
    first = (await stage_intervals(group.stages))[0]
    return _delay_s((before.end_s, after.start_s) for before, after in pairwise(first))


async def _measure_hop(
    config: ServiceConfig, group: StageGroup, point: ProfilePoint, num_steps: int
) -> float:
    """One micro-batch at a time, from the first stage to the second; 0 if there is none."""
    pipeline = RayPipeline(group)
    for batch_id in range(num_steps):
        pipeline.submit(point.batch(batch_id, config.kv_cache.block_size))
        await pipeline.next_result()
    intervals = await stage_intervals(group.stages)
    return _delay_s(
        (sent.end_s, received.start_s)
        for upstream, downstream in pairwise(intervals[:2])
        for sent, received in zip(upstream, downstream, strict=True)
    )


def _longest_chunk(config: ServiceConfig, group: StageGroup) -> ProfilePoint:
    capacity = group.num_blocks * config.kv_cache.block_size
    return ProfilePoint(
        chunks=(min(config.scheduler.max_batch_tokens, group.max_model_len, capacity),)
    )


async def _reconnected(group: StageGroup, num_times: int) -> StageGroup:
    """The group after so many new epochs, in which the ids of micro-batches begin at 0."""
    group = replace(group, epoch=group.epoch + num_times)
    await connect_stages(group.stages, group.epoch)
    return group


def _load_of_rows(batch: MicroBatch) -> StepLoad:
    """The load of a micro-batch whose sequences have one token each."""
    return StepLoad(len(batch.sequences), sum(item.end for item in batch.sequences))


def _delay_s(spans: Iterable[tuple[float, float]]) -> float:
    """The median from start to end; 0 of none, and where clocks differ by more than it takes."""
    delays_s = [end_s - start_s for start_s, end_s in spans]
    return max(0.0, median(delays_s)) if delays_s else 0.0
