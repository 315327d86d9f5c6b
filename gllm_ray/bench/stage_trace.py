"""What the stages of a running pipeline did, as a trace for Perfetto."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from gllm_ray.messages import StepInterval
from gllm_ray.simulation.chrome_trace import HopInterval, write_chrome_trace
from gllm_ray.simulation.metrics import StageInterval
from gllm_ray.stages.stage_group import StageGroup


async def write_stage_trace(group: StageGroup, path: Path) -> None:
    """Write when each stage computed its latest micro-batches, and their hops between stages.

    Times begin with the first of it. Hops between hosts are as right as their clocks agree.
    """
    stages = await asyncio.gather(*(stage.intervals.remote() for stage in group.stages))
    origin_s = min(each.start_s for intervals in stages for each in intervals)
    intervals = [
        StageInterval(stage_id, each.batch_id, each.start_s - origin_s, each.end_s - origin_s)
        for stage_id, intervals in enumerate(stages)
        for each in intervals
    ]
    with path.open("w", encoding="utf-8") as file:
        write_chrome_trace(intervals, file, hops=_hops(stages, origin_s))


def _hops(stages: Sequence[Sequence[StepInterval]], origin_s: float) -> list[HopInterval]:
    """Of the micro-batches that both stages of a pair still know."""
    hops = []
    for stage_id, (here, there) in enumerate(pairwise(stages)):
        starts_s = {each.batch_id: each.start_s for each in there}
        hops += [
            HopInterval(
                stage_id, each.batch_id, each.end_s - origin_s, starts_s[each.batch_id] - origin_s
            )
            for each in here
            if each.batch_id in starts_s
        ]
    return hops
