import json
from dataclasses import replace
from itertools import pairwise
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.calibrated_cost_model import CalibratedCostModel
from gllm_ray.scheduling.load import StepLoad

COST = CalibratedCostModel(
    rows=(1, 128, 129, 256),
    row_times_s=(0.02, 0.024, 0.04, 0.05),
    context_token_s=1e-7,
    attention_pair_s=1e-9,
    tile=128,
    provenance="made up",
)


@pytest.mark.parametrize(
    ("rows", "time_s"),
    [(0, 0.02), (1, 0.02), (128, 0.024), (129, 0.04), (256, 0.05), (512, 0.1)],
)
def test_the_time_of_rows_is_the_table_and_proportional_beyond_it(rows, time_s):
    assert COST.stage_time(StepLoad(num_prefill_tokens=rows)) == pytest.approx(time_s)
    assert COST.stage_time(StepLoad(num_decodes=rows)) == pytest.approx(time_s)


def test_between_two_rows_of_the_table_time_is_linear():
    assert COST.stage_time(StepLoad(num_decodes=33)) == pytest.approx(0.02 + 0.004 * 32 / 127)


def test_attention_comes_on_top():
    load = StepLoad(8, 50_000, 120, 240_000)
    assert COST.stage_time(load) == pytest.approx(0.024 + 0.005 + 0.00024)


@given(
    st.sets(st.integers(0, 3000), min_size=2, max_size=20),
    st.lists(st.floats(0, 1), min_size=20, max_size=20),
)
def test_more_rows_never_take_less(rows, times_s):
    cost = replace(COST, rows=tuple(sorted(rows)), row_times_s=tuple(sorted(times_s[: len(rows)])))
    times_s = [cost.stage_time(StepLoad(num_decodes=n)) for n in range(0, 4000, 7)]
    assert all(b >= a - 1e-12 for a, b in pairwise(times_s))


def test_a_calibration_survives_json():
    calibration = json.loads(json.dumps(COST.to_calibration()))
    assert CalibratedCostModel.from_calibration(calibration) == COST


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": [1, 129, 128, 256]}, ["rows=[1, 129, 128, 256]", "ascend"]),
        ({"rows": [1, 2, 3]}, ["row_times_s=", "3 rows"]),
        ({"rows": [1], "row_times_s": [1.0]}, ["rows=[1]"]),
        ({"row_times_s": [0.02, 0.04, 0.03, 0.05]}, ["row_times_s=", "rise"]),
        ({"row_times_s": [0.02, 0.02, 0.02, 0.02]}, ["row_times_s=", "rise"]),
        ({"row_times_s": [-0.02, 0.02, 0.02, 0.03]}, ["row_times_s", ">= 0"]),
        ({"tile": 1.5}, ["tile=1.5", "integer"]),
        ({"context_token_s": nan}, ["context_token_s=nan"]),
        ({"context_token_ms": 1.0}, ["context_token_ms", "context_token_s"]),
        ({"provenance": ""}, ["provenance"]),
    ],
)
def test_a_calibration_that_cannot_be_is_refused_with_the_key(changes, words):
    with pytest.raises(ConfigError) as error:
        CalibratedCostModel.from_calibration(
            json.loads(json.dumps(COST.to_calibration())) | changes
        )
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("key", sorted(COST.to_calibration()))
def test_a_calibration_needs_every_key(key):
    calibration = json.loads(json.dumps(COST.to_calibration()))
    del calibration[key]
    with pytest.raises(ConfigError, match=key):
        CalibratedCostModel.from_calibration(calibration)


def test_a_calibration_does_not_follow_measurements():
    cost = replace(COST)
    cost.observe(StepLoad(num_decodes=5), 3.0)
    assert cost == COST
    assert cost.is_calibrated
