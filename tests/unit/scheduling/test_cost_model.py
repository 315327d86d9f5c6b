import random
from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.scheduling.cost_model import LinearCostModel, most_prefill_tokens
from gllm_ray.scheduling.learnt_cost_model import LearntCostModel
from gllm_ray.scheduling.load import StepLoad

TRUTH = LinearCostModel(
    floor_s=0.01,
    token_s=1e-4,
    context_token_s=4e-7,
    attention_pair_s=1e-8,
    tile=1,
)
LOADS = st.builds(
    StepLoad,
    num_decodes=st.integers(0, 600),
    num_context_tokens=st.integers(0, 10**6),
    num_prefill_tokens=st.integers(0, 2048),
    num_attention_pairs=st.integers(0, 10**7),
)


def any_load(draw):
    num_decodes, chunk = draw.randrange(1, 64), draw.choice([0, draw.randrange(1, 1024)])
    return StepLoad(
        num_decodes=num_decodes,
        num_context_tokens=num_decodes * draw.randrange(100, 2000),
        num_prefill_tokens=chunk,
        num_attention_pairs=chunk * (chunk + draw.choice([0, 512, 2048])),
    )


def samples(truth, count, *, noise=0.0, seed=0):
    """Loads of a busy pipeline and their times, with a log-normal error."""
    draw = random.Random(seed)
    loads = [any_load(draw) for _ in range(count)]
    return [(load, truth.stage_time(load) * draw.lognormvariate(0, noise)) for load in loads]


def learnt(samples_):
    model = LearntCostModel()
    for load, time_s in samples_:
        model.observe(load, time_s)
    return model


def mean_error(model, truth):
    loads = [load for load, _ in samples(truth, 300, seed=99)]
    return sum(abs(model.stage_time(x) / truth.stage_time(x) - 1) for x in loads) / len(loads)


@pytest.mark.parametrize("tile", [1, 128])
def test_known_coefficients_are_recovered_from_noisy_samples(tile):
    model = learnt(samples(replace(TRUTH, tile=tile), 4000, noise=0.05))
    for name in ("floor_s", "token_s", "context_token_s", "attention_pair_s"):
        assert getattr(model.calibration, name) == pytest.approx(getattr(TRUTH, name), rel=0.1)


@pytest.mark.parametrize("tile", [1, 64, 128, 256])
def test_the_tile_is_recovered_from_stepped_times(tile):
    truth = replace(TRUTH, tile=tile)
    model = learnt(samples(truth, 4000, noise=0.03))
    assert model.tile == tile
    assert mean_error(model, truth) < 0.02


def test_a_small_model_on_a_cpu_calibrates_though_most_micro_batches_are_small():
    draw = random.Random(3)
    cpu = replace(TRUTH, floor_s=2.4e-3, token_s=4.2e-5, context_token_s=1.3e-6)
    model = LearntCostModel()
    for index in range(2000):
        num_decodes = draw.randrange(4, 9)
        chunk = draw.randrange(5, 300) if index % 8 == 0 else 0
        load = StepLoad(num_decodes, num_decodes * draw.randrange(200, 350), chunk, chunk * chunk)
        model.observe(load, cpu.stage_time(load) * draw.lognormvariate(0, 0.1))
    assert model.is_calibrated
    assert model.tile == 1
    chunk = StepLoad(num_decodes=6, num_context_tokens=1800, num_prefill_tokens=200)
    assert model.stage_time(chunk) == pytest.approx(cpu.stage_time(chunk), rel=0.15)


def test_slow_first_samples_and_a_busy_machine_do_no_harm():
    slowed = [
        (load, time_s * (100 if i < 20 else 30 if i % 25 == 0 else 1))
        for i, (load, time_s) in enumerate(samples(TRUTH, 3000, noise=0.05))
    ]
    model = learnt(slowed)
    assert model.is_calibrated
    assert mean_error(model, TRUTH) < 0.05


@pytest.mark.parametrize("factor", [1000, 30, 0.1])
def test_one_outlier_moves_predictions_by_less_than_2_percent(factor):
    model = learnt(samples(TRUTH, 1000, noise=0.05))
    load = StepLoad(num_decodes=20, num_context_tokens=20_000, num_prefill_tokens=300)
    before = model.stage_time(load)
    model.observe(load, before * factor)
    assert model.stage_time(load) == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("time_s", [0.0, -1.0, nan, inf])
def test_an_impossible_measurement_changes_nothing(time_s):
    model = learnt(samples(TRUTH, 500))
    before = model.calibration
    model.observe(StepLoad(num_decodes=5, num_context_tokens=500), time_s)
    assert model.calibration == before


def test_constant_load_for_long_neither_forgets_nor_winds_up():
    draw = random.Random(1)
    model = learnt(samples(TRUTH, 2000, noise=0.05))
    constant = StepLoad(num_decodes=40, num_context_tokens=40_000)
    for _ in range(100_000):
        model.observe(constant, TRUTH.stage_time(constant) * draw.lognormvariate(0, 0.05))
    assert mean_error(model, TRUTH) < 0.05
    for load, time_s in samples(TRUTH, 5, noise=0.3, seed=2):
        model.observe(load, time_s)
        assert mean_error(model, TRUTH) < 0.05


def test_a_change_of_the_machine_is_followed_after_constant_load():
    constant = StepLoad(num_decodes=40, num_context_tokens=40_000)
    model = learnt(samples(TRUTH, 500) + [(constant, TRUTH.stage_time(constant))] * 10_000)
    slower = replace(TRUTH, floor_s=0.02, token_s=2e-4)
    for load, time_s in samples(slower, 3000, seed=5):
        model.observe(load, time_s)
    assert mean_error(model, slower) < 0.1


def test_equal_samples_give_equal_predictions():
    twins = [learnt(samples(TRUTH, 700, noise=0.2)) for _ in range(2)]
    assert twins[0].calibration == twins[1].calibration


def test_until_calibrated_time_is_a_token_count_with_a_weight_for_context_and_attention():
    model = LearntCostModel()
    load = StepLoad(
        num_decodes=8, num_context_tokens=2000, num_prefill_tokens=100, num_attention_pairs=30_000
    )
    assert not model.is_calibrated
    assert model.calibration is None
    assert (model.stage_time(load), model.tile) == (8 + 100 + 2 + 1, 1)


def test_equal_loads_alone_do_not_calibrate():
    model = learnt([(StepLoad(num_decodes=8, num_context_tokens=800), 0.02)] * 1000)
    assert not model.is_calibrated
    model.observe(StepLoad(num_prefill_tokens=64, num_attention_pairs=4096), 0.05)
    assert model.is_calibrated


def test_times_that_have_nothing_to_do_with_the_load_do_not_calibrate():
    draw = random.Random(3)
    loads = [load for load, _ in samples(TRUTH, 2000)]
    assert not learnt([(load, draw.choice([0.001, 0.03, 1.0])) for load in loads]).is_calibrated


@given(LOADS, LOADS, st.sampled_from([1, 64]))
def test_no_prediction_falls_when_a_part_of_the_load_grows(load, growth, tile):
    larger = StepLoad(*(a + b for a, b in zip(load, growth, strict=True)))
    for model in (replace(TRUTH, tile=tile), LEARNT, LearntCostModel()):
        assert model.stage_time(load) <= model.stage_time(larger)


LEARNT = learnt(samples(replace(TRUTH, tile=128), 1500, noise=0.2))


@given(
    LOADS,
    st.integers(0, 4096),
    st.floats(0, 1),
    st.integers(0, 700),
    st.sampled_from([1, 64, 128]),
)
def test_the_most_prefill_tokens_within_a_time_are_found(load, start, limit_s, most, tile):
    cost = replace(TRUTH, tile=tile)
    decodes = load._replace(num_prefill_tokens=0, num_attention_pairs=0)

    def time(chunk):
        pairs = chunk * (start + chunk)
        return cost.stage_time(
            decodes._replace(num_prefill_tokens=chunk, num_attention_pairs=pairs)
        )

    found = most_prefill_tokens(cost, decodes, start, limit_s, most)
    best = max((chunk for chunk in range(1, most + 1) if time(chunk) <= limit_s), default=0)
    assert 0 <= found <= best
    assert (found > 0) == (best > 0)
    if found < best:  # landed on the tile below
        assert (decodes.num_decodes + found) % tile == 0
        assert best - found < tile


@pytest.mark.parametrize(
    ("num_decodes", "most", "expected"),
    [
        (20, 400, 364),  # 384 rows: the 36 beyond would cost a tile of 128
        (20, 490, 490),  # 510 rows are cheaper a token than 384, the tile being nearly full
        (20, 60, 60),  # there is no tile below
        (128, 3, 3),  # landing would leave nothing
    ],
)
def test_the_total_lands_on_a_tile_where_tokens_are_cheaper_there(num_decodes, most, expected):
    cost = replace(TRUTH, tile=128)
    decodes = StepLoad(num_decodes=num_decodes, num_context_tokens=num_decodes * 100)
    assert most_prefill_tokens(cost, decodes, 0, 10.0, most) == expected


def test_fixed_coefficients_ignore_measurements():
    cost = replace(TRUTH)
    cost.observe(StepLoad(num_decodes=5), 3.0)
    assert cost == TRUTH
    assert cost.is_calibrated
