"""`gllm-ray bench transport`: what it costs to hand hidden states from stage to stage."""

import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise

from gllm_ray.bench.conditions import tree_cpu_s, watch_conditions
from gllm_ray.bench.request_figures import summarize
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.transport_stage import TransportStageActor
from gllm_ray.config import ServiceConfig, parse_service_config
from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence, StepInterval
from gllm_ray.simulation.report import Summary
from gllm_ray.stages.placement import stage_environment
from gllm_ray.stages.ray_pipeline import RayPipeline
from gllm_ray.stages.stage_group import StageGroup, connect_stages, stop_stages

# What carries hidden states, and what tells of micro-batches: the settings of a pipeline.
TRANSPORTS = {
    "gloo": {"activation_transport": "gloo"},
    "object_store": {"activation_transport": "object_store"},
    "direct": {"activation_transport": "gloo", "control_plane": "direct"},
}
_NUM_WARMUPS = 5
_ONE_TOKEN = ScheduledSequence(
    seq_id=0, epoch=0, start=0, token_ids=(0,), block_table=(0,), sampling=SamplingParams()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopCost:
    """What a hop costs.

    Attributes:
        transport: One of `TRANSPORTS`.
        num_stages: Depth of the pipeline.
        num_bytes: Of the hidden states of a micro-batch.
        hop_s: From the end of a stage's work on a micro-batch to the beginning of the next one's.
        step_s: From the submission of a micro-batch to its result.
        cpu_s: CPU seconds of all processes, Ray's daemons and the submitting one included, for
            each micro-batch and hop.
        load_average: Of the last minute, at the end.
    """

    transport: str
    num_stages: int
    num_bytes: int
    hop_s: Summary
    step_s: Summary
    cpu_s: float
    load_average: float


async def bench_transport(
    *,
    transports: Sequence[str],
    depths: Sequence[int],
    sizes: Sequence[int],
    num_steps: int,
    on_step: Callable[[str], None],
) -> Result:
    """Send micro-batches, one at a time, through stages that compute nothing, on CPU.

    Sizes are taken in turns by the transports, so that what disturbs the machine disturbs all.

    Args:
        transports: Some of `TRANSPORTS`.
        depths: Numbers of stages, 2 or more each.
        sizes: Bytes of hidden states, multiples of 4.
        num_steps: Micro-batches of each transport, depth and size.
        on_step: Told what is done next.

    Raises:
        PipelineError: A stage died.
    """
    costs = []
    for depth in depths:
        async with _chains(transports, depth) as chains:
            for size, (transport, chain) in itertools.product(sizes, chains.items()):
                on_step(f"{depth} stages, {size} bytes, {transport}")
                costs.append(await chain.measure(size, num_steps))
    return make_result("transport", num_steps=num_steps, hops=[asdict(cost) for cost in costs])


class _Chain:
    """Stages that are connected by one transport."""

    def __init__(self, transport: str, group: StageGroup) -> None:
        self._transport = transport
        self._stages = group.stages
        self._pipeline = RayPipeline(group)
        self._batch_ids = itertools.count()

    async def measure(self, num_bytes: int, num_steps: int) -> HopCost:
        for stage in self._stages:
            await stage.resize.remote(num_bytes)
        for _ in range(_NUM_WARMUPS):
            await self._step()
        with watch_conditions({"all": partial(tree_cpu_s, os.getpid())}) as conditions:
            steps = [await self._step() for _ in range(num_steps)]
        num_hops = len(self._stages) - 1
        return HopCost(
            transport=self._transport,
            num_stages=len(self._stages),
            num_bytes=num_bytes,
            hop_s=summarize(await self._hops_s({batch_id for batch_id, _ in steps})),
            step_s=summarize(step_s for _, step_s in steps),
            cpu_s=conditions.cpu_s["all"] / num_steps / num_hops,
            load_average=conditions.load_average_after,
        )

    async def close(self) -> None:
        """Stop the stages."""
        await self._pipeline.close()

    async def _step(self) -> tuple[int, float]:
        """Run a micro-batch; its id, and the seconds it took."""
        batch = MicroBatch(batch_id=next(self._batch_ids), sequences=(_ONE_TOKEN,))
        start_s = time.perf_counter()
        self._pipeline.submit(batch)
        await self._pipeline.next_result()
        return batch.batch_id, time.perf_counter() - start_s

    async def _hops_s(self, batch_ids: Container[int]) -> list[float]:
        stages: list[Sequence[StepInterval]] = [
            [each for each in await stage.intervals.remote() if each.batch_id in batch_ids]
            for stage in self._stages
        ]
        return [
            max(0.0, after.start_s - before.end_s)
            for stage, next_stage in pairwise(stages)
            for before, after in zip(stage, next_stage, strict=True)
        ]


@asynccontextmanager
async def _chains(transports: Sequence[str], num_stages: int) -> AsyncIterator[dict[str, _Chain]]:
    """A chain of each transport; those that wait take no CPU."""
    groups = {transport: _start(_config(transport, num_stages)) for transport in transports}
    chains: dict[str, _Chain] = {}
    try:
        for name, group in groups.items():
            chains[name] = _Chain(name, await connect_stages(group))
        yield chains
    finally:
        for chain in chains.values():
            await chain.close()
        for group in groups.values():
            await stop_stages(group.stages)


def _start(config: ServiceConfig) -> StageGroup:
    actor = TransportStageActor.options(
        num_cpus=0, runtime_env={"env_vars": stage_environment(config.pipeline)}
    )
    stages = tuple(actor.remote(config, index) for index in range(config.pipeline.num_stages))
    return StageGroup(stages=stages, infos=(), num_blocks=1, max_model_len=1, epoch=0)


def _config(transport: str, num_stages: int) -> ServiceConfig:
    return parse_service_config(
        {
            "model": {"path": "none"},
            "pipeline": {"device": "cpu", "num_stages": num_stages, **TRANSPORTS[transport]},
            "kv_cache": {"kv_cache_bytes": 1},
        }
    )
