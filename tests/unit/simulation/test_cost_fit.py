from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.cost_model import LinearCostModel
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_fit import fit_scheduler_cost, least_squares
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hosts import find_host
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from tests.unit.simulation.configs import GPT_2, QWEN2_5_32B

LAYOUT = PipelineLayout.split(parse_model_shape(QWEN2_5_32B), 4)


@dataclass
class UnevenPipeline:
    """A pipeline whose stages cost what a model says, each a little more than the one before."""

    cost: LinearCostModel
    layout: PipelineLayout = LAYOUT

    def stage_time_s(self, stage_id, load):
        return (1 + stage_id) / 4 * self.cost.stage_time(load)


@given(
    st.floats(1e-3, 1e-1),
    st.floats(1e-5, 1e-3),
    st.floats(1e-8, 1e-6),
    st.floats(1e-10, 1e-8),
    st.sampled_from([1, 32, 64, 128]),
)
def test_a_linear_pipeline_is_met_on_its_slowest_stage_and_its_tile_is_found(
    floor_s, token_s, context_token_s, attention_pair_s, tile
):
    truth = LinearCostModel(
        floor_s=floor_s,
        token_s=token_s,
        context_token_s=context_token_s,
        attention_pair_s=attention_pair_s,
        tile=tile,
    )
    fit = fit_scheduler_cost(UnevenPipeline(truth), "made up")
    assert fit.tile == tile
    for load in (StepLoad(1, 900), StepLoad(100, 10**5, 200, 10**5), StepLoad(0, 0, 512, 10**6)):
        assert fit.stage_time(load) == pytest.approx(truth.stage_time(load), rel=5e-3)


def test_a_roofline_is_met_within_5_percent_at_every_load():
    cost = RooflineCost(LAYOUT, find_device("L20"), find_host("graphs"))
    fit = fit_scheduler_cost(cost, "a roofline")
    assert fit.tile == 128
    for decodes, chunk in product((0, 1, 16, 64, 100, 200), (0, 1, 60, 128, 200, 300, 1000)):
        if decodes + chunk:
            load = StepLoad(decodes, 800 * decodes, chunk, chunk * chunk)
            slowest_s = max(cost.stage_time_s(stage, load) for stage in range(4))
            assert fit.stage_time(load) == pytest.approx(slowest_s, rel=0.05)


def test_where_the_host_takes_longest_any_micro_batch_does_until_rows_take_longer():
    host = find_host("sarathi-serve")
    cost = RooflineCost(
        PipelineLayout.split(parse_model_shape(GPT_2), 1), find_device("H100-80GB-SXM"), host
    )
    fit = fit_scheduler_cost(cost, "made up")
    assert fit.stage_time(StepLoad(num_decodes=256)) == 12 * host.layer_launch_s + host.sequence_s
    assert fit.row_times_s[-1] > fit.row_times_s[0]


def test_measurements_that_do_not_rise_with_the_rows_are_refused():
    flat = LinearCostModel(
        floor_s=1.0, token_s=0.0, context_token_s=0.0, attention_pair_s=0.0, tile=1
    )
    with pytest.raises(ConfigError, match="must rise with the rows"):
        fit_scheduler_cost(UnevenPipeline(flat), "made up")


features = st.lists(st.floats(0, 1e6), min_size=3, max_size=3)


@given(st.lists(st.tuples(features, st.floats(1e-3, 1e3)), min_size=3, max_size=8))
def test_weights_are_never_negative_and_no_single_one_can_be_bettered(samples):
    rows, targets = zip(*samples, strict=True)
    weights = least_squares(rows, targets, targets)
    assert min(weights) >= 0

    def squares(candidate):
        return sum(
            (sum(w * x for w, x in zip(candidate, row, strict=True)) / target - 1) ** 2
            for row, target in samples
        )

    for i, factor in product(range(3), (0, 0.9, 1.1)):
        other = [w * factor if i == j else w for j, w in enumerate(weights)]
        assert squares(weights) <= squares(other) + 1e-6


def test_a_feature_that_would_take_a_negative_weight_is_left_out():
    rows, targets = [(1, 0), (1, 1), (1, 2)], [3.0, 2.0, 1.0]
    assert least_squares(rows, targets, [1.0] * 3) == pytest.approx([2.0, 0.0])
