"""What a simulation says in the end: as values, as JSON and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from gllm_ray.messages import FinishReason
from gllm_ray.simulation.metrics import (
    FINISHED,
    BatchMetrics,
    IdleCause,
    PipelineMetrics,
    RequestMetrics,
    Slo,
    StageTimeUse,
)
from gllm_ray.simulation.quantile_sketch import QuantileSketch

# Raised whenever a key of `to_json` changes its name, its place or its meaning.
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A distribution in four numbers; all 0 when nothing was measured."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, sketch: QuantileSketch) -> Self:
        """Summarize what a sketch has counted."""
        p50, p90, p99 = map(sketch.quantile, (0.5, 0.9, 0.99))
        return cls(mean=sketch.mean, p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """How a stage spent its time, over all replicas; the shares add up to 1.

    Attributes:
        utilization: Share in which it computed.
        bubble_ratio: Share in which it did not, by cause.
    """

    utilization: float
    bubble_ratio: dict[IdleCause, float]

    @classmethod
    def of(cls, use: StageTimeUse) -> Self:
        """The shares; of no time, all 0."""
        total_s = use.total_s or 1.0
        return cls(
            utilization=use.busy_s / total_s,
            bubble_ratio={cause: idle_s / total_s for cause, idle_s in use.idle_s.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """How many replicas there were; those that start count, those that only end what they hold not.

    Attributes:
        mean: Over the wall time.
        min: Fewest.
        max: Most.
        changes: When their number changed, the start included, and to what.
    """

    mean: float
    min: int
    max: int
    changes: tuple[tuple[float, int], ...]

    @classmethod
    def of(cls, changes: Sequence[tuple[float, int]], wall_s: float) -> Self:
        """Summarize the numbers from when on they held."""
        ends_s = [*(time_s for time_s, _ in changes[1:]), wall_s]
        counts = [count for _, count in changes]
        replica_s = sum(
            count * (end_s - start_s)
            for (start_s, count), end_s in zip(changes, ends_s, strict=True)
        )
        return cls(
            mean=replica_s / wall_s, min=min(counts), max=max(counts), changes=tuple(changes)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a simulation. Latencies are in seconds; see `RequestMetrics` for each.

    Attributes:
        wall_s: From the start of the workload to the last event, so the drain is part of it.
        num_ended: Requests by how they ended.
        num_input_tokens: Prompt tokens of requests that finished.
        num_output_tokens: Output tokens of requests that finished.
        requests_per_s: Requests that finished, over the wall time.
        input_tokens_per_s: Their prompt tokens, over the wall time.
        output_tokens_per_s: Their output tokens, over the wall time.
        slo: What a good request is; None: nothing was asked.
        goodput_per_s: Requests that finished and met the SLO, over the wall time.
        goodput_ratio: Those requests as a share of all that ended, in whatever way.
        ttft_s: Time to the first token.
        tpot_s: Time per output token after the first.
        itl_s: Time between consecutive tokens.
        e2e_s: Time to the last token.
        queue_s: Time to the first chunk.
        num_preemptions: Preemptions of requests that ended.
        num_micro_batches: Micro-batches submitted.
        batch_tokens: Their tokens.
        batch_decodes: Their decodes.
        pipeline: The mean over all stages.
        stages: Each stage.
        kv_utilization_mean: Share of the KV blocks in use, over time and replicas.
        kv_utilization_peak: Its highest value in any replica.
        ideal_ratio: The time of all that was computed, were it without a bubble and at the best
            tile, as a share of the time for which the replicas ran; what preemptions or losses make
            the stages compute again is part of it. None: nobody worked it out.
        prefix_hit_ratio: Share of the tokens of admitted prompts that were found in a prefix cache.
        replicas: How many there were.
        nominal_constants: Parts of the hardware whose constants nobody has fitted to measurements.
    """

    wall_s: float
    num_ended: dict[FinishReason, int]
    num_input_tokens: int
    num_output_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    slo: Slo | None
    goodput_per_s: float
    goodput_ratio: float
    ttft_s: Summary
    tpot_s: Summary
    itl_s: Summary
    e2e_s: Summary
    queue_s: Summary
    num_preemptions: int
    num_micro_batches: int
    batch_tokens: Summary
    batch_decodes: Summary
    pipeline: StageReport
    stages: tuple[StageReport, ...]
    kv_utilization_mean: float
    kv_utilization_peak: float
    ideal_ratio: float | None
    prefix_hit_ratio: float
    replicas: ReplicaReport
    nominal_constants: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types, under the names of the attributes."""
        return (
            {"schema_version": SCHEMA_VERSION}
            | asdict(self)
            | {"stages": [asdict(stage) for stage in self.stages]}
        )


def make_report(
    requests: RequestMetrics,
    batches: BatchMetrics,
    pipelines: Sequence[PipelineMetrics],
    *,
    wall_s: float,
    ideal_ratio: float | None = None,
    prefix_hit_ratio: float = 0.0,
    replica_counts: Sequence[tuple[float, int]] = ((0.0, 1),),
) -> Report:
    """Work out what was recorded.

    Args:
        requests: Of all replicas.
        batches: Of all replicas.
        pipelines: One for each replica, all of one depth.
        wall_s: See `Report`.
        ideal_ratio: See `Report`.
        prefix_hit_ratio: See `Report`.
        replica_counts: The `changes` of `ReplicaReport`.

    Raises:
        ValueError: No time has passed.
    """
    if not wall_s > 0:
        raise ValueError(f"wall_s={wall_s}: must be > 0")
    num_finished = sum(requests.num_ended[reason] for reason in FINISHED)
    num_ended = sum(requests.num_ended.values())
    stages = [_total_use(uses) for uses in zip(*(each.stages for each in pipelines), strict=True)]
    kv = [each.kv_utilization for each in pipelines]
    kv_duration_s = sum(each.duration_s for each in kv)
    return Report(
        wall_s=wall_s,
        num_ended=dict(requests.num_ended),
        num_input_tokens=requests.num_input_tokens,
        num_output_tokens=requests.num_output_tokens,
        requests_per_s=num_finished / wall_s,
        input_tokens_per_s=requests.num_input_tokens / wall_s,
        output_tokens_per_s=requests.num_output_tokens / wall_s,
        slo=requests.slo,
        goodput_per_s=requests.num_good / wall_s,
        goodput_ratio=requests.num_good / num_ended if num_ended else 0.0,
        ttft_s=Summary.of(requests.ttft_s),
        tpot_s=Summary.of(requests.tpot_s),
        itl_s=Summary.of(requests.itl_s),
        e2e_s=Summary.of(requests.e2e_s),
        queue_s=Summary.of(requests.queue_s),
        num_preemptions=requests.num_preemptions,
        num_micro_batches=batches.num_tokens.count,
        batch_tokens=Summary.of(batches.num_tokens),
        batch_decodes=Summary.of(batches.num_decodes),
        pipeline=StageReport.of(_total_use(stages)),
        stages=tuple(StageReport.of(stage) for stage in stages),
        kv_utilization_mean=sum(each.integral for each in kv) / (kv_duration_s or 1.0),
        kv_utilization_peak=max((each.peak for each in kv), default=0.0),
        ideal_ratio=ideal_ratio,
        prefix_hit_ratio=prefix_hit_ratio,
        replicas=ReplicaReport.of(replica_counts, wall_s),
    )


def _total_use(uses: Sequence[StageTimeUse]) -> StageTimeUse:
    total = StageTimeUse()
    for use in uses:
        total.add(use)
    return total
