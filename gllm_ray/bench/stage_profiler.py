"""Measures how long the stages of a running pipeline take for micro-batches of a grid."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

from gllm_ray.bench.profile_grid import ProfilePoint
from gllm_ray.interfaces import Pipeline
from gllm_ray.messages import MicroBatchResult
from gllm_ray.simulation.stage_profile import StageProfile, StageSample

# Called with how many points are measured, and how many there are.
OnProgress = Callable[[int, int], None]


class StageProfiler:
    """Submits micro-batches to a pipeline that nobody else uses, and gathers its stages' times.

    Args:
        pipeline: Fresh: it has run no micro-batch yet.
        block_size: Tokens of its KV blocks.
        repeats: Of each point, after one that warms up and does not count; fewer, where they would
            take more than a point's share of the time.
    """

    def __init__(self, pipeline: Pipeline, *, block_size: int, repeats: int = 5) -> None:
        self._pipeline = pipeline
        self._block_size = block_size
        self._repeats = repeats
        self._num_submitted = 0
        self._times_s: defaultdict[int, dict[int, float]] = defaultdict(dict)

    async def profile(
        self,
        grid: Sequence[ProfilePoint],
        *,
        max_s: float,
        provenance: str,
        layers: Sequence[int],
        on_progress: OnProgress | None = None,
    ) -> StageProfile:
        """Measure the points of a grid in order; those left when the time is up are left out.

        The first point is measured in any case. All repeats of a point are in flight together, so
        that stages in processes of their own compute side by side, as they do in service.

        Args:
            grid: At least one point.
            max_s: Seconds after which no point is begun.
            provenance: What is measured, where and how.
            layers: Those of each stage.
            on_progress: Told after each point.

        Raises:
            PipelineError: A stage failed.
        """
        deadline_s = time.monotonic() + max_s
        measured: list[tuple[ProfilePoint, range]] = []
        for point in grid:
            if measured and time.monotonic() > deadline_s:
                break
            measured.append((point, await self._measure(point, max_s / len(grid))))
            if on_progress is not None:
                on_progress(len(measured), len(grid))
        await self._run(grid[0], 1)  # devices that compute asynchronously tell late
        return StageProfile(
            format="gllm_ray.stage_profile.v1",
            provenance=f"{provenance}; {len(measured)} of {len(grid)} micro-batches of the grid, "
            f"median of up to {self._repeats}",
            layers=list(layers),
            samples=[self._sample(point, batch_ids) for point, batch_ids in measured],
        )

    async def _measure(self, point: ProfilePoint, share_s: float) -> range:
        start_s = time.monotonic()
        await self._run(point, 1)
        most = share_s / (time.monotonic() - start_s)
        return await self._run(point, max(1, min(self._repeats, int(most))))

    async def _run(self, point: ProfilePoint, num_batches: int) -> range:
        batch_ids = range(self._num_submitted, self._num_submitted + num_batches)
        self._num_submitted += num_batches
        for batch_id in batch_ids:
            self._pipeline.submit(point.batch(batch_id, self._block_size))
        for _ in batch_ids:
            self._note(await self._pipeline.next_result())
        return batch_ids

    def _note(self, result: MicroBatchResult) -> None:
        for stage_id, batch_id, time_s in result.stage_times:
            self._times_s[batch_id][stage_id] = time_s

    def _sample(self, point: ProfilePoint, batch_ids: range) -> StageSample:
        times_s = [self._times_s[batch_id] for batch_id in batch_ids]
        stages = sorted(times_s[0])
        return StageSample(
            **point.load._asdict(),
            stage_times_s=[median(times[stage] for times in times_s) for stage in stages],
        )
