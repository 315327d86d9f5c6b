"""What micro-batches cost in service, told from replays in which all processes run side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, fsum, log, sqrt
from statistics import fmean
from typing import NamedTuple

from gllm_ray.bench.recording import RecordedStep
from gllm_ray.errors import ConfigError
from gllm_ray.messages import StepInterval
from gllm_ray.simulation.cost_fit import least_squares
from gllm_ray.simulation.links import Link
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.stage_profile import StageProfile, StageSample
from gllm_ray.simulation.virtual_pipeline import Timing, uniform_links

_SHORTEST_S = 1e-15  # a byte takes no less


class ServedStep(NamedTuple):
    """A micro-batch, and when each stage computed it, in one clock."""

    step: RecordedStep
    stages: tuple[StepInterval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceCosts:
    """What a micro-batch costs beside the computing of its stages; means, in seconds.

    Attributes:
        schedule_s: From a result to the submission of a micro-batch without sequences: commit and
            decision.
        schedule_sequence_s: On top, for each sequence.
        dispatch_s: From the submission to the start on a first stage that waits for it.
        step_s: From the end of a micro-batch on a stage to the start of the next that waits.
        hop_s: From the end of a micro-batch without rows to its start on a next stage that waits.
        hop_byte_s: On top, for each byte of hidden states.
        result_s: From the end on the last stage to the result at the scheduler.
        jitter: Standard deviation of the logarithm of a stage's times of one load; not in seconds.
    """

    schedule_s: float
    schedule_sequence_s: float
    dispatch_s: float
    step_s: float
    hop_s: float
    hop_byte_s: float
    result_s: float
    jitter: float

    def timing(self, num_stages: int) -> Timing:
        """All of it as the simulator has it, for stages whose times include `step_s`."""
        link = Link(
            name="measured",
            is_calibrated=True,
            provenance="between the stages of this pipeline",
            latency_s=max(0.0, self.hop_s - self.step_s),
            bandwidth_bytes_s=1 / max(self.hop_byte_s, _SHORTEST_S),
        )
        return Timing(
            links=uniform_links(link, num_stages),
            schedule_s=self.schedule_s,
            schedule_sequence_s=self.schedule_sequence_s,
            dispatch_s=self.dispatch_s,
            result_s=max(0.0, self.result_s - self.step_s),
            jitter=self.jitter,
        )


def fit_service_costs(
    layout: PipelineLayout, replays: Sequence[Sequence[ServedStep]]
) -> tuple[MeasuredCost, ServiceCosts]:
    """The time of each stage for any load, and what comes on top.

    Args:
        layout: The pipeline.
        replays: The micro-batches of each replay, in order.

    Returns:
        The stages' times with `step_s` in them, as `ServiceCosts.timing` expects, and the rest.

    Raises:
        ConfigError: A stage was never free, so that delays cannot be told from queueing.
    """
    served = [each for replay in replays for each in replay]
    pairs = [pair for replay in replays for pair in pairwise(replay)]
    dispatch = _delays(pairs, 0)
    hops = [_delays(pairs, stage_id) for stage_id in range(1, layout.num_stages)]
    hop_s, hop_byte_s = _line(
        (layout.hop_bytes(step.load), delay_s) for hop in hops for step, delay_s in hop.free
    )
    schedule_s, schedule_sequence_s = _line(
        (each.step.num_sequences, each.step.submitted_s - each.step.free_s)
        for each in served
        if each.step.free_s is not None
    )
    queued_s = [delay_s for delays in (dispatch, *hops) for delay_s in delays.queued]
    step_s = fmean(queued_s) if queued_s else 0.0
    scales, jitter = _spread(_stage_cost(layout, served, 0.0, [1.0] * layout.num_stages), served)
    return _stage_cost(layout, served, step_s, scales), ServiceCosts(
        schedule_s=schedule_s,
        schedule_sequence_s=schedule_sequence_s,
        dispatch_s=fmean(delay_s for _, delay_s in dispatch.free),
        step_s=step_s,
        hop_s=hop_s,
        hop_byte_s=hop_byte_s,
        result_s=fmean(each.step.result_s - each.stages[-1].end_s for each in served),
        jitter=jitter,
    )


class _Delays(NamedTuple):
    """How long micro-batches took to start on a stage.

    Attributes:
        free: Since they were sent, where the stage was free already.
        queued: Since the end of the one before, where they had come well before it.
    """

    free: list[tuple[RecordedStep, float]]
    queued: list[float]


def _delays(pairs: Sequence[tuple[ServedStep, ServedStep]], stage_id: int) -> _Delays:
    moments = []
    for before, (step, stages) in pairs:
        sent_s = stages[stage_id - 1].end_s if stage_id else step.submitted_s
        moments.append((step, sent_s, before.stages[stage_id].end_s, stages[stage_id].start_s))
    free = [
        (step, start_s - sent_s) for step, sent_s, free_s, start_s in moments if free_s < sent_s
    ]
    if not free:
        raise ConfigError(f"stage {stage_id} never waited for a micro-batch; replay a lower load")
    usual_s = fmean(delay_s for _, delay_s in free)
    return _Delays(
        free,
        [start_s - free_s for _, sent_s, free_s, start_s in moments if free_s > sent_s + usual_s],
    )


def _spread(cost: MeasuredCost, served: Sequence[ServedStep]) -> tuple[list[float], float]:
    """By what to scale each stage's time so that with jitter its sum is the served one.

    The jitter is told from neighbouring micro-batches, so that a machine that slows down for
    seconds does not count as one whose every micro-batch varies.
    """
    sums, errors = [], []
    for stage_id in range(cost.layout.num_stages):
        times_s = [each.stages[stage_id].end_s - each.stages[stage_id].start_s for each in served]
        usual_s = [cost.stage_time_s(stage_id, each.step.load) for each in served]
        sums.append(fsum(times_s) / fsum(usual_s))
        logs = [log(time_s / usual) for time_s, usual in zip(times_s, usual_s, strict=True)]
        errors += [after - before for before, after in pairwise(logs)]
    jitter = sqrt(fmean(error * error for error in errors) / 2)
    return [total / exp(jitter * jitter / 2) for total in sums], jitter


def _stage_cost(
    layout: PipelineLayout, served: Iterable[ServedStep], step_s: float, scales: Sequence[float]
) -> MeasuredCost:
    samples = [
        StageSample(
            **each.step.load._asdict(),
            stage_times_s=[
                scale * (stage.end_s - stage.start_s) + step_s
                for scale, stage in zip(scales, each.stages, strict=True)
            ],
        )
        for each in served
    ]
    profile = StageProfile(
        format="gllm_ray.stage_profile.v1",
        provenance="replays",
        layers=layout.num_layers,
        samples=samples,
    )
    return MeasuredCost.from_profile(layout, profile)


def _line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The constant and the slope, neither negative, of the nearest line."""
    rows, targets = [], []
    for x, y in points:
        rows.append((1.0, x))
        targets.append(y)
    constant, slope = least_squares(rows, targets, [1.0] * len(rows)) if rows else (0.0, 0.0)
    return constant, slope
