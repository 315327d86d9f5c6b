"""The stages of one replica in virtual time: servers in a row, and links between them."""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from operator import itemgetter
from random import Random
from typing import NamedTuple

from gllm_ray.errors import ConfigError
from gllm_ray.messages import StageTime
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_model import PipelineCost
from gllm_ray.simulation.links import Link
from gllm_ray.simulation.metrics import IdleCause, PipelineMetrics, StageInterval


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """A stage that computes slower for a while.

    Attributes:
        stage_id: The stage.
        start_s: From when on; a micro-batch is as slow as the stage is when it begins.
        end_s: Until when.
        factor: On its times.
    """

    stage_id: int
    start_s: float
    end_s: float
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What takes time beside the stages' computing.

    Attributes:
        links: Between each stage and the next, in order.
        is_send_overlapped: Whether a stage computes while it sends.
        schedule_s: The scheduler's time for a micro-batch, in which it does nothing else.
        schedule_sequence_s: On top, for each of its sequences.
        dispatch_s: From the scheduler to the stages.
        result_s: From the last stage to the scheduler.
        jitter: Standard deviation of the logarithm of a stage's times.
        slowdowns: Stages that compute slower for a while.
    """

    links: tuple[Link, ...] = ()
    is_send_overlapped: bool = True
    schedule_s: float = 0.0
    schedule_sequence_s: float = 0.0
    dispatch_s: float = 0.0
    result_s: float = 0.0
    jitter: float = 0.0
    slowdowns: tuple[Slowdown, ...] = ()


_END = itemgetter(1)


class _Passage(NamedTuple):
    """When each stage computes a micro-batch."""

    batch_id: int
    label: str
    starts_s: list[float]
    ends_s: list[float]


class VirtualPipeline:
    """Runs micro-batches in the order of their submission.

    Each stage computes one at a time, each link transfers one at a time, and both take them in
    order. So all moments of a micro-batch follow from those of the one before, and are known when
    it is submitted. It is accounted for once it has left, for its stages may be lost before.

    Args:
        cost: The time of each stage.
        timing: Of everything else.
        metrics: Told what the stages do.
        rng: Draws the jitter.
        intervals: Gets when each stage computed; None: that is not kept.
        replica_id: Whose stages they are.
        start_s: When they begin.

    Attributes:
        timing: Of everything else.
        metrics: What the stages have done.

    Raises:
        ConfigError: There is not one link between each two neighbours.
    """

    def __init__(
        self,
        cost: PipelineCost,
        timing: Timing,
        metrics: PipelineMetrics,
        rng: Random,
        intervals: list[StageInterval] | None = None,
        replica_id: int = 0,
        start_s: float = 0.0,
    ) -> None:
        num_stages = cost.layout.num_stages
        if timing.links and len(timing.links) != num_stages - 1:
            raise ConfigError(
                f"{len(timing.links)} links for {num_stages} stages; give {num_stages - 1} "
                "links, or none for transfers that take no time"
            )
        self._cost = cost
        self.timing = timing
        self.metrics = metrics
        self._rng = rng
        self._intervals = intervals
        self._replica_id = replica_id
        self._free_s = [start_s] * num_stages
        self._link_free_s = [start_s] * num_stages
        self._counted_s = [start_s] * num_stages  # up to where the time of a stage is accounted for
        self._results: deque[tuple[int, float]] = deque()  # on their way, and when they come
        self._passages: deque[_Passage] = deque()
        self._causes: list[tuple[float, float, IdleCause]] = []  # by time, none at once

    def note_idle(self, start_s: float, end_s: float, cause: IdleCause) -> None:
        """Tell why nothing was submitted for a while; what is not told waits for an upstream."""
        if end_s > start_s:
            self._causes.append((start_s, end_s, cause))

    def advance(self, now_s: float) -> None:
        """Account for the micro-batches that have left."""
        passages = self._passages
        if not passages or passages[0].ends_s[-1] > now_s:
            return
        while passages and passages[0].ends_s[-1] <= now_s:
            self._count(passages.popleft())
        del self._causes[: bisect_right(self._causes, min(self._counted_s), key=_END)]

    def submit(
        self, batch_id: int, load: StepLoad, now_s: float, continues: int | None = None
    ) -> tuple[float, tuple[StageTime, ...]]:
        """Start a micro-batch, now or at a later time that is known already.

        The tokens of the micro-batch that it continues reach the first stage as soon as if the
        scheduler passed them on when they come.

        Returns:
            When its result reaches the scheduler, and how long each stage computes.
        """
        timing, free_s = self.timing, self._free_s
        num_bytes = self._cost.layout.hop_bytes(load) if timing.links else 0
        is_kept = self._intervals is not None
        label = f"{load.num_decodes}+{load.num_prefill_tokens}" if is_kept else ""
        stage_time_s, is_disturbed = self._cost.stage_time_s, timing.jitter or timing.slowdowns
        num_links = len(timing.links)
        ready_s = self._source_s(continues, now_s) + timing.dispatch_s
        starts_s, ends_s, times = [], [], []
        for stage_id, start_s in enumerate(free_s):
            if start_s < ready_s:
                start_s = ready_s
            time_s = stage_time_s(stage_id, load)
            if is_disturbed:
                time_s = self._disturbed_s(time_s, stage_id, start_s)
            ready_s = free_s[stage_id] = start_s + time_s
            starts_s.append(start_s)
            ends_s.append(ready_s)
            times.append(StageTime(stage_id, batch_id, time_s))
            if stage_id < num_links:
                ready_s = self._transfer(stage_id, num_bytes, ready_s)
        self._passages.append(_Passage(batch_id, label, starts_s, ends_s))
        result_s = ready_s + timing.result_s
        self._results.append((batch_id, result_s))
        return result_s, tuple(times)

    def restart(self, now_s: float) -> None:
        """Forget what is under way."""
        self.close(now_s)
        self._passages.clear()
        self._results.clear()
        self._causes.clear()
        self._free_s = [now_s] * len(self._free_s)
        self._link_free_s = [now_s] * len(self._free_s)

    def close(self, now_s: float) -> None:
        """Account for the time up to now."""
        self.advance(now_s)
        for passage in self._passages:
            starts_s = [start_s for start_s in passage.starts_s if start_s < now_s]
            ends_s = [min(end_s, now_s) for end_s in passage.ends_s[: len(starts_s)]]
            self._count(passage._replace(starts_s=starts_s, ends_s=ends_s))
        for stage_id in range(len(self._free_s)):
            self._count_idle(stage_id, now_s)

    def _source_s(self, batch_id: int | None, now_s: float) -> float:
        """When the result of a micro-batch comes that is on its way, at the earliest now."""
        results = self._results
        while results and results[0][1] <= now_s:
            results.popleft()
        return next((result_s for other, result_s in results if other == batch_id), now_s)

    def _disturbed_s(self, time_s: float, stage_id: int, start_s: float) -> float:
        """What jitter and slowdowns make of the time of a stage that begins now."""
        if self.timing.jitter:
            time_s *= exp(self._rng.gauss(0, self.timing.jitter))
        for slowdown in self.timing.slowdowns:
            is_now = slowdown.start_s <= start_s < slowdown.end_s
            if slowdown.stage_id == stage_id and is_now:
                time_s *= slowdown.factor
        return time_s

    def _transfer(self, stage_id: int, num_bytes: int, ready_s: float) -> float:
        """Send the output of a stage on; returns when it has arrived."""
        link = self.timing.links[stage_id]
        start_s = max(ready_s, self._link_free_s[stage_id])
        end_s = start_s + link.transfer_time_s(num_bytes)
        # The latency of a transfer overlaps with the next one, its bytes do not.
        self._link_free_s[stage_id] = end_s - link.latency_s
        if not self.timing.is_send_overlapped:
            self._free_s[stage_id] = end_s
        return end_s

    def _count(self, passage: _Passage) -> None:
        """Account for what stages have computed, and for their idle time before that."""
        batch_id, label, starts_s, ends_s = passage
        stages, counted_s = self.metrics.stages, self._counted_s
        for stage_id, start_s in enumerate(starts_s):
            if start_s > counted_s[stage_id]:
                self._count_idle(stage_id, start_s)
            end_s = counted_s[stage_id] = ends_s[stage_id]
            stages[stage_id].busy_s += end_s - start_s
        if self._intervals is not None:
            self._intervals += [
                StageInterval(stage_id, batch_id, *span, label, self._replica_id)
                for stage_id, span in enumerate(zip(starts_s, ends_s, strict=True))
            ]

    def _count_idle(self, stage_id: int, end_s: float) -> None:
        """Divide the time since a stage's latest work by cause."""
        start_s, idle_s = self._counted_s[stage_id], self.metrics.stages[stage_id].idle_s
        left_s, causes = end_s - start_s, self._causes
        if left_s <= 0:
            return
        for index in range(bisect_right(causes, start_s, key=_END), len(causes)):
            cause_start_s, cause_end_s, cause = causes[index]
            if cause_start_s >= end_s:
                break
            overlap_s = min(end_s, cause_end_s) - max(start_s, cause_start_s)
            idle_s[cause] += overlap_s
            left_s -= overlap_s
        idle_s[IdleCause.UPSTREAM] += max(0.0, left_s)
        self._counted_s[stage_id] = end_s


def uniform_links(link: Link | None, num_stages: int) -> tuple[Link, ...]:
    """The same link between all neighbours; None: transfers take no time."""
    return () if link is None else (link,) * (num_stages - 1)


def mixed_links(intra: Link, inter: Link, stages_per_node: Sequence[int]) -> tuple[Link, ...]:
    """Links within nodes, given the number of stages on each, and between these nodes."""
    links: list[Link] = []
    for num_stages in stages_per_node:
        links += [intra] * (num_stages - 1) + [inter]
    return tuple(links[:-1])
