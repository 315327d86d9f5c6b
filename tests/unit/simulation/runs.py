"""A small run of two replicas of two stages, written down by hand."""

from gllm_ray.messages import FinishReason
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.metrics import (
    BatchMetrics,
    IdleCause,
    PipelineMetrics,
    RequestMetrics,
    RequestProgress,
    Slo,
    StageInterval,
)
from gllm_ray.simulation.report import Report, make_report

INTERVALS = [
    StageInterval(0, 0, 0.0, 1.0, "12 tokens"),
    StageInterval(1, 0, 1.0, 2.0, "12 tokens"),
    StageInterval(0, 1, 2.5, 3.0),
    StageInterval(0, 2, 0.5, 1.25, "4 tokens", replica_id=1),
]


def small_run(slo: Slo | None = None) -> Report:
    """Four requests in ten seconds, of which one expires."""
    requests = RequestMetrics(slo)
    for index, num_tokens in enumerate((1, 3, 5)):
        request = RequestProgress(arrival_s=float(index), num_prompt_tokens=100)
        request.first_scheduled_s = index + 0.25
        request.num_preemptions = index
        for position in range(num_tokens):
            requests.on_tokens([request], index + 1.0 + 0.5 * position)
        requests.on_end(request, FinishReason.STOP if index else FinishReason.LENGTH)
    requests.on_end(RequestProgress(arrival_s=0.0, num_prompt_tokens=9), FinishReason.EXPIRED)
    pipelines = [PipelineMetrics(2), PipelineMetrics(2, start_s=5.0)]
    for pipeline, time_s in zip(pipelines, (10.0, 5.0), strict=True):
        for stage, share in zip(pipeline.stages, (0.5, 0.75), strict=True):
            stage.busy_s = share * time_s
            stage.idle_s[IdleCause.UPSTREAM] = (1 - share) * time_s / 2
            stage.idle_s[IdleCause.NO_WORK] = (1 - share) * time_s / 2
        pipeline.kv_utilization.set(0.0, 10.0 - time_s)
        pipeline.kv_utilization.set(0.25, 10.0 - time_s / 2)
        pipeline.kv_utilization.set(0.75, 10.0)
    batches = BatchMetrics()
    for load in 2 * (StepLoad(2, 0, 10), StepLoad(4)):
        batches.add(load)
    return make_report(
        requests,
        batches,
        pipelines,
        wall_s=10.0,
        ideal_ratio=0.5,
        prefix_hit_ratio=0.25,
        replica_counts=[(0.0, 1), (5.0, 2)],
    )
