"""The time that the work of a simulation would take without bubbles."""

import pytest

from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hosts import find_host
from gllm_ray.simulation.ideal import IdealWork
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from tests.unit.simulation.configs import LLAMA_3_8B
from tests.unit.simulation.tiny import deployment, linear_cost, request, serial_scheduler, simulate

LOAD = StepLoad(
    num_decodes=10, num_context_tokens=1000, num_prefill_tokens=90, num_attention_pairs=9000
)


def test_work_without_a_floor_is_ideal_at_any_size():
    cost = linear_cost(2, 0.0, token_s=1e-3, context_token_s=1e-5, pair_s=1e-6)
    ideal = IdealWork(cost)
    ideal.add(LOAD)
    ideal.add(LOAD)
    assert ideal.time_s == pytest.approx(2 * cost.stage_time_s(0, LOAD))


def test_a_floor_is_shared_by_the_rows_of_the_best_size():
    ideal = IdealWork(linear_cost(1, floor_s=1.0))
    ideal.add(LOAD)
    assert ideal.time_s == pytest.approx(100 / 4096)


def test_the_slowest_stage_counts():
    class Uneven:
        layout = linear_cost(2).layout
        attention = linear_cost(2).attention

        def stage_time_s(self, stage_id, load):
            return (1 + stage_id) * 1e-3 * load.num_tokens

    ideal = IdealWork(Uneven())
    ideal.add(LOAD)
    assert ideal.time_s == pytest.approx(0.2)


def test_a_floor_is_shared_by_the_rows_of_the_largest_micro_batch_of_all():
    large = StepLoad(num_prefill_tokens=9000)
    ideal = IdealWork(linear_cost(1, floor_s=1.0))
    ideal.add_batch(LOAD)
    ideal.add_batch(large)
    assert ideal.time_s == pytest.approx(9100 / 9000)


@pytest.mark.parametrize("change", [{}, {"num_experts": 128, "num_experts_per_tok": 8}])
@pytest.mark.parametrize("window", [None, 512, 4096])
@pytest.mark.parametrize("num_tokens", [512, 4096, 16384])
def test_no_micro_batch_takes_less_than_its_ideal(change, window, num_tokens):
    model = {"model_type": "mixtral", "sliding_window": window} | change
    shape = parse_model_shape(LLAMA_3_8B | model)
    cost = RooflineCost(
        PipelineLayout.split(shape, 1), find_device("H100-80GB-SXM"), find_host("graphs")
    )
    ideal = IdealWork(cost)
    load = StepLoad(100, 100 * 20_000, num_tokens, num_tokens * 30_000)
    ideal.add_batch(load)
    assert ideal.time_s <= cost.stage_time_s(0, load)


def test_a_saturated_stage_without_a_floor_reaches_the_ideal_and_idle_time_keeps_it_from_it():
    cost = linear_cost(1, 0.0, token_s=1e-3)
    deployed = deployment(1, cost=cost, make=serial_scheduler(1))
    busy = simulate(deployed, [request(0.0)] * 20).report
    half = simulate(deployed, [request(0.032 * index) for index in range(20)]).report
    assert busy.ideal_ratio == pytest.approx(1)
    assert half.ideal_ratio == pytest.approx(20 * 0.016 / (19 * 0.032 + 0.016))
