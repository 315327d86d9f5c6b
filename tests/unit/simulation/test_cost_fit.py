from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_fit import least_squares, linear_fit
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hosts import find_host
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from tests.unit.simulation.configs import QWEN2_5_32B

LAYOUT = PipelineLayout.split(parse_model_shape(QWEN2_5_32B), 4)


@dataclass
class LinearCost:
    """A pipeline whose stages are linear, each a little slower than the one before."""

    coefficients: dict[str, float]
    layout: PipelineLayout = LAYOUT

    def stage_time_s(self, stage_id, load):
        return (1 + stage_id) / 4 * linear_time_s(self.coefficients, load)


def linear_time_s(c, load):
    rows = max(-(-load.num_tokens // c["tile"]) * c["tile"], c["min_rows"])
    return (
        c["floor_s"]
        + c["token_s"] * rows
        + c["context_token_s"] * load.num_context_tokens
        + c["attention_pair_s"] * load.num_attention_pairs
    )


@given(
    st.floats(1e-3, 1e-1),
    st.floats(1e-5, 1e-3),
    st.floats(1e-8, 1e-6),
    st.floats(1e-10, 1e-8),
    st.sampled_from([(1, 1), (64, 1), (128, 1), (1, 96), (128, 192)]),
)
def test_a_linear_pipeline_gives_the_coefficients_of_its_slowest_stage(
    floor_s, token_s, context_token_s, attention_pair_s, shape
):
    coefficients = {
        "floor_s": floor_s,
        "token_s": token_s,
        "context_token_s": context_token_s,
        "attention_pair_s": attention_pair_s,
        "tile": shape[0],
        "min_rows": shape[1],
    }
    assert linear_fit(LinearCost(coefficients)) == pytest.approx(coefficients, rel=1e-4)


def test_a_roofline_is_met_within_5_percent_on_its_tile():
    cost = RooflineCost(LAYOUT, find_device("L20"), find_host("graphs"))
    fit = linear_fit(cost)
    assert fit["tile"] == 128
    errors = []
    for decodes, chunk in product((0, 16, 64, 200), (0, 128, 300, 1000)):
        if decodes + chunk:
            load = StepLoad(decodes, 800 * decodes, chunk, chunk * chunk)
            slowest_s = max(cost.stage_time_s(stage, load) for stage in range(4))
            errors.append(abs(linear_time_s(fit, load) / slowest_s - 1))
    assert sum(errors) / len(errors) < 0.05


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
