"""Costs told from micro-batches that were served: those of a service that is known are found."""

from math import exp, fsum
from random import Random

import pytest

from gllm_ray.bench.recording import RecordedStep
from gllm_ray.bench.service_costs import ServedStep, fit_service_costs
from gllm_ray.errors import ConfigError
from gllm_ray.messages import StepInterval
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from tests.unit.simulation.tiny import SHAPE, TOKEN_BYTES

LAYOUT = PipelineLayout.split(SHAPE, 2)
SCHEDULE_S, SEQUENCE_S, DISPATCH_S, STEP_S, HOP_S, ROW_S, RESULT_S = (
    0.001, 0.0001, 0.002, 0.0005, 0.003, 0.00002, 0.004
)  # fmt: skip


def serve(loads, *, jitter=0.0, slowness=1.0, num_in_flight=2):
    """The moments of a pipeline of two stages; the second takes half as long again as the first."""
    rng = Random(0)
    served, results, free_s = [], [0.0] * num_in_flight, [0.0, 0.0]
    for batch_id, load in enumerate(loads):
        num_sequences = load.num_decodes
        decided_s = results[-num_in_flight]
        submitted_s = decided_s + SCHEDULE_S + SEQUENCE_S * num_sequences
        sent_s, delay_s, intervals = submitted_s, DISPATCH_S, []
        for stage_id, share in enumerate((1.0, 1.5)):
            start_s = max(sent_s + delay_s, free_s[stage_id] + STEP_S)
            time_s = slowness * share * stage_time_s(load) * exp(rng.gauss(0, jitter))
            sent_s = free_s[stage_id] = start_s + time_s
            intervals.append(StepInterval(batch_id=batch_id, start_s=start_s, end_s=sent_s))
            delay_s = HOP_S + ROW_S * load.num_tokens
        results.append(sent_s + RESULT_S)
        step = RecordedStep(batch_id, load, num_sequences, decided_s, submitted_s, results[-1])
        served.append(ServedStep(step, tuple(intervals)))
    return served


def stage_time_s(load):
    return 0.01 + 0.001 * load.num_tokens + 1e-6 * load.num_context_tokens


def loads(num=400):
    rng = Random(1)
    sizes = [rng.choice((1, 8, 20, 48)) for _ in range(num)]
    return [StepLoad(size, size * rng.randrange(50, 500)) for size in sizes]


def test_every_cost_of_a_known_service_is_found():
    cost, costs = fit_service_costs(LAYOUT, [serve(loads())])
    assert costs.schedule_s == pytest.approx(SCHEDULE_S)
    assert costs.schedule_sequence_s == pytest.approx(SEQUENCE_S)
    assert costs.dispatch_s == pytest.approx(DISPATCH_S)
    assert costs.step_s == pytest.approx(STEP_S)
    assert costs.hop_s == pytest.approx(HOP_S)
    assert costs.hop_byte_s == pytest.approx(ROW_S / TOKEN_BYTES)
    assert costs.result_s == pytest.approx(RESULT_S)
    assert costs.jitter == pytest.approx(0, abs=1e-6)
    for load in (StepLoad(1, 100), StepLoad(20, 2000), StepLoad(48, 20_000)):
        assert cost.stage_time_s(0, load) == pytest.approx(stage_time_s(load) + STEP_S)
        assert cost.stage_time_s(1, load) == pytest.approx(1.5 * stage_time_s(load) + STEP_S)


def test_what_a_service_is_simulated_with_adds_up_to_what_was_measured():
    timing = fit_service_costs(LAYOUT, [serve(loads())])[1].timing(2)
    (link,) = timing.links
    assert timing.schedule_s + timing.dispatch_s == pytest.approx(SCHEDULE_S + DISPATCH_S)
    assert link.transfer_time_s(TOKEN_BYTES) + STEP_S == pytest.approx(HOP_S + ROW_S)
    assert timing.result_s + STEP_S == pytest.approx(RESULT_S)


def test_jitter_is_found_and_leaves_the_sum_of_stage_times_as_it_was():
    served = serve(loads(2000), jitter=0.2)
    cost, costs = fit_service_costs(LAYOUT, [served])
    assert costs.jitter == pytest.approx(0.2, rel=0.05)
    for stage_id in (0, 1):
        served_s = fsum(
            each.stages[stage_id].end_s - each.stages[stage_id].start_s for each in served
        )
        usual_s = fsum(
            cost.stage_time_s(stage_id, each.step.load) - costs.step_s for each in served
        )
        assert exp(costs.jitter**2 / 2) * usual_s == pytest.approx(served_s, rel=1e-3)


def test_a_machine_that_turns_slow_once_is_not_one_that_varies():
    fast, slow = serve(loads()), serve(loads(), slowness=1.5)
    assert fit_service_costs(LAYOUT, [fast, slow])[1].jitter < 0.03


def test_a_service_that_was_never_free_is_refused():
    with pytest.raises(ConfigError, match=r"stage 1 never waited .* replay a lower load"):
        fit_service_costs(LAYOUT, [serve([StepLoad(48, 100)] * 20, num_in_flight=8)[8:]])
