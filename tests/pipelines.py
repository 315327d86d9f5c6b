"""Small pipelines that compute a real model, and micro-batches for them."""

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup

from gllm_ray.config import ServiceConfig, parse_service_config
from gllm_ray.interfaces import Pipeline
from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.stages.placement import start_stage
from gllm_ray.stages.ray_pipeline import RayPipeline
from gllm_ray.stages.stage_group import (
    StageGroup,
    connect_stages,
    start_stage_group,
    stop_stages,
)

BLOCK_SIZE = 4
MAX_MODEL_LEN = 128
GREEDY = SamplingParams()


def make_service_config(model: Path, **pipeline: Any) -> ServiceConfig:
    return parse_service_config(
        {
            "model": {"path": str(model), "max_model_len": MAX_MODEL_LEN},
            "pipeline": {"device": "cpu", **pipeline},
            "kv_cache": {"block_size": BLOCK_SIZE, "kv_cache_bytes": "4MiB"},
        }
    )


def make_batch(
    batch_id: int,
    token_ids: Sequence[int],
    *,
    seq_id: int = 0,
    start: int = 0,
    sampling: SamplingParams | None = GREEDY,
    continues: int | None = None,
) -> MicroBatch:
    """One sequence's chunk; every sequence owns the blocks of `MAX_MODEL_LEN` tokens."""
    first_block = seq_id * (MAX_MODEL_LEN // BLOCK_SIZE)
    num_blocks = -(-(start + len(token_ids)) // BLOCK_SIZE)
    sequence = ScheduledSequence(
        seq_id=seq_id,
        epoch=0,
        start=start,
        token_ids=tuple(token_ids),
        block_table=tuple(range(first_block, first_block + num_blocks)),
        sampling=sampling,
    )
    return MicroBatch(batch_id=batch_id, sequences=(sequence,), continues=continues)


@dataclass(frozen=True)
class Reference:
    """Prompts, and the tokens that transformers generates greedily from each."""

    prompts: list[list[int]]
    outputs: list[list[int]]


async def generate_greedily(
    pipeline: Pipeline, reference: Reference, *, ring: bool = False
) -> list[list[int]]:
    """As many output tokens as the reference has, from the same prompts.

    Each sequence runs in micro-batches of its own, all sequences are in flight at the same time,
    and prompts go in two chunks. With the ring, a decode is submitted before its token has come.
    """
    prompts, num_tokens = reference.prompts, len(reference.outputs[0])
    batch_ids = itertools.count()
    in_flight: deque[tuple[int, int, int]] = deque()
    outputs: list[list[int]] = [[] for _ in prompts]

    def submit(seq_id: int, start: int, token_ids: Sequence[int], **kwargs: Any) -> None:
        batch = make_batch(next(batch_ids), token_ids, seq_id=seq_id, start=start, **kwargs)
        pipeline.submit(batch)
        in_flight.append((batch.batch_id, seq_id, start + len(token_ids)))

    for seq_id, prompt in enumerate(prompts):
        half = len(prompt) // 2
        submit(seq_id, 0, prompt[:half], sampling=None)
        submit(seq_id, half, prompt[half:])
    while in_flight:
        batch_id, seq_id, end = in_flight.popleft()
        num_output = max(0, end + 1 - len(prompts[seq_id]))
        goes_on = 0 < num_output < num_tokens
        if goes_on and ring:
            submit(seq_id, end, [~0], continues=batch_id)
        result = await pipeline.next_result()
        assert result.batch_id == batch_id
        outputs[seq_id] += result.token_ids
        assert len(outputs[seq_id]) == num_output
        if goes_on and not ring:
            submit(seq_id, end, result.token_ids)
    return outputs


class RayStages:
    """Stage actors that serve many tests; each test gets a pipeline of a new epoch."""

    def __init__(
        self, config: ServiceConfig, placement_group: PlacementGroup | None = None
    ) -> None:
        self.config = config
        self.group: StageGroup | None = None
        self._placement_group = placement_group

    async def pipeline(self) -> RayPipeline:
        """A working pipeline, whatever an earlier test did to its stages."""
        return RayPipeline(await self.connect())

    async def connect(self) -> StageGroup:
        """Living stages that are connected anew."""
        if self.group is None:
            self.group = await start_stage_group(self.config, self._placement_group)
        else:
            stages = await asyncio.gather(*map(self._revive, range(len(self.group.stages))))
            group = replace(self.group, stages=tuple(stages), epoch=self.group.epoch + 1)
            self.group = await connect_stages(group)
        return self.group

    def stop(self) -> None:
        if self.group is not None:
            asyncio.run(stop_stages(self.group.stages))
            self.group = None

    async def _revive(self, stage_id: int) -> ActorHandle:
        stage = self.group.stages[stage_id]
        try:
            await stage.ping.remote()
        except RayActorError:
            stage = start_stage(self.config, stage_id, self._placement_group)
            await stage.load.remote()
            await stage.allocate_kv_cache.remote(self.group.num_blocks)
        return stage
