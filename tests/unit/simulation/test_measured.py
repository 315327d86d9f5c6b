import json
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hosts import find_host
from gllm_ray.simulation.measured import MeasuredCost, MonotoneTable
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from gllm_ray.simulation.stage_profile import parse_prefill_times, parse_stage_profile
from tests.unit.simulation.configs import LLAMA_2_13B, QWEN2_5_32B
from tests.unit.simulation.shared_data import profile_path

L20 = find_device("L20")
LAYOUT = PipelineLayout.explicit(parse_model_shape(QWEN2_5_32B), [16] * 4)
POINTS = [(1, 0.0855), (64, 0.1039), (96, 0.1173), (128, 0.1165), (256, 0.1559), (512, 0.3135)]
# A grid as a profiler walks it: for each number of rows, several contexts.
GRID = [
    StepLoad(decodes, decodes * context, chunk, chunk * (start + chunk))
    for decodes, context, chunk, start in product(
        (0, 8, 64), (100, 3000), (0, 64, 192, 448), (0, 4000)
    )
    if decodes + chunk
]

counts = st.integers(0, 3000)
loads = st.builds(StepLoad, counts, st.integers(0, 10**7), counts, st.integers(0, 10**9))
points = st.dictionaries(st.integers(1, 4096), st.floats(1e-4, 1.0), min_size=1)


def alone(num_tokens):
    return StepLoad(0, 0, num_tokens, num_tokens**2)


@given(points, st.integers(0, 10_000), st.integers(0, 1000))
def test_a_table_never_falls(measured, num_rows, more):
    table = MonotoneTable(measured.items())
    assert table.time_s(num_rows) <= table.time_s(num_rows + more) * (1 + 1e-12)


@given(points)
def test_a_table_keeps_points_in_order_and_the_sum_of_all(measured):
    table = MonotoneTable(measured.items())
    assert sum(map(table.time_s, measured)) == pytest.approx(sum(measured.values()))
    rising = dict(zip(sorted(measured), sorted(measured.values()), strict=True))
    kept = MonotoneTable(rising.items())
    assert {rows: kept.time_s(rows) for rows in rising} == pytest.approx(rising)


def test_a_table_is_linear_between_points_and_proportional_beyond_the_last():
    table = MonotoneTable([(10, 1.0), (20, 2.0), (40, 6.0)])
    assert [table.time_s(n) for n in (1, 10, 15, 30, 40, 80)] == [1.0, 1.0, 1.5, 4.0, 6.0, 12.0]


def test_points_out_of_order_give_way_to_their_mean():
    table = MonotoneTable([(1, 1.0), (2, 4.0), (3, 2.0), (4, 5.0)])
    assert [table.time_s(n) for n in (1, 2, 3, 4)] == [1.0, 3.0, 3.0, 5.0]


@given(st.integers(0, 3), loads, loads)
def test_a_measured_stage_never_takes_less_time_when_any_part_of_the_load_grows(
    stage_id, load, growth
):
    cost = MeasuredCost.from_prefills(LAYOUT, POINTS, L20)
    time_s = cost.stage_time_s(stage_id, load)
    for part, value in zip(StepLoad._fields, growth, strict=True):
        grown = load._replace(**{part: getattr(load, part) + value})
        assert time_s <= cost.stage_time_s(stage_id, grown) * (1 + 1e-12)


def test_a_prompt_alone_takes_what_was_measured_shared_out_over_the_stages():
    rising = [point for point in POINTS if point[0] != 96]
    cost = MeasuredCost.from_prefills(LAYOUT, rising, L20)
    uneven = MeasuredCost.from_prefills(LAYOUT, rising, L20, stage_weights=[1, 2, 2, 3])
    for num_tokens, time_s in rising:
        load = alone(num_tokens)
        assert [cost.stage_time_s(i, load) for i in range(4)] == pytest.approx([time_s / 4] * 4)
        shares = [uneven.stage_time_s(i, load) / time_s for i in range(4)]
        assert shares == pytest.approx([1 / 8, 2 / 8, 2 / 8, 3 / 8])


def test_context_adds_the_bytes_of_a_stages_layers_at_the_bandwidth_reached():
    cost = MeasuredCost.from_prefills(LAYOUT, POINTS, L20)
    short, long = (cost.stage_time_s(2, StepLoad(64, n, 0, 0)) for n in (10_000, 110_000))
    expected_s = 100_000 * 16 * 4096 / (L20.bandwidth_bytes_s * L20.decode_efficiency)
    assert long - short == pytest.approx(expected_s)


def test_weights_that_do_not_match_the_stages_are_refused():
    for weights in ([1, 1], [1, 1, 1, 0]):
        with pytest.raises(ConfigError, match="must be 4 positive numbers"):
            MeasuredCost.from_prefills(LAYOUT, POINTS, L20, stage_weights=weights)


@pytest.mark.parametrize(
    ("name", "config"), [("L20-Llama-13B", LLAMA_2_13B), ("L20-Qwen2.5-32B", QWEN2_5_32B)]
)
def test_the_l20_profile_is_met_within_half_a_percent(name, config):
    times_s = parse_prefill_times(profile_path(f"l20/{name}.csv").read_text())
    layout = PipelineLayout.split(parse_model_shape(config), 4)
    cost = MeasuredCost.from_prefills(layout, times_s, L20)
    errors = [
        abs(sum(cost.stage_time_s(i, alone(n)) for i in range(4)) / time_s - 1)
        for n, time_s in times_s
    ]
    assert sum(errors) / len(errors) < 0.005


def profile_text(cost, **changes):
    samples = [
        load._asdict() | {"stage_times_s": [cost.stage_time_s(stage, load) for stage in range(4)]}
        for load in GRID
    ]
    profile = {
        "format": "gllm_ray.stage_profile.v1",
        "provenance": "a test",
        "layers": LAYOUT.num_layers,
        "samples": samples,
    }
    return json.dumps(profile | changes)


def test_a_profile_gives_back_the_stage_times_it_was_taken_from():
    source = RooflineCost(LAYOUT, L20, find_host("graphs"))
    cost = MeasuredCost.from_profile(LAYOUT, parse_stage_profile(profile_text(source)))
    errors = [
        abs(cost.stage_time_s(stage, load) / source.stage_time_s(stage, load) - 1)
        for stage, load in product(range(4), GRID)
    ]
    assert max(errors) < 0.05
    assert sum(errors) / len(errors) < 0.005


def test_a_profile_of_other_stages_is_refused():
    profile = parse_stage_profile(profile_text(RooflineCost(LAYOUT, L20, find_host("graphs"))))
    first, *middle, last = LAYOUT.num_layers
    for other in (
        PipelineLayout.split(LAYOUT.model, 2),
        PipelineLayout.explicit(LAYOUT.model, [first + 1, *middle, last - 1]),
    ):
        message = re.escape(f"{LAYOUT.num_layers} layers; must be of {other.num_layers}, those")
        with pytest.raises(ConfigError, match=message):
            MeasuredCost.from_profile(other, profile)


def sample(**changes):
    return dict.fromkeys(StepLoad._fields, 1) | {"stage_times_s": [0.1]} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": []}, r"^samples=\[\]: must be"),
        ({"samples": [sample(num_decodes=-1)]}, r"^samples\[0\]\.num_decodes=-1: must be"),
        ({"samples": [sample(stage_times_s=[0])]}, r"stage_times_s\[0\]=0: must be"),
        ({"samples": [sample(stage_time_s=[1])]}, r"stage_time_s=.*did you mean stage_times_s"),
        (
            {"samples": [sample(), sample(stage_times_s=[1, 2])]},
            r"1 stage_times_s each.*, not 1, 2",
        ),
        ({"layers": [8, 8]}, r"2 stage_times_s each, one for each of layers=\[8, 8\], not 1"),
        ({"layers": [0]}, r"^layers\[0\]=0: must be"),
        ({"format": "v2"}, r"^format='v2': must be gllm_ray.stage_profile.v1"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_the_key(changes, message):
    whole = {
        "format": "gllm_ray.stage_profile.v1",
        "provenance": "a test",
        "layers": [16],
        "samples": [sample()],
    }
    parse_stage_profile(json.dumps(whole))
    with pytest.raises(ConfigError, match=message):
        parse_stage_profile(json.dumps(whole | changes))


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        parse_stage_profile("{")


def test_prefill_times_are_read_in_seconds():
    text = "Total Length,Execute Time\n1,85.5\n128,116.5\n"
    assert parse_prefill_times(text) == [(1, 0.0855), (128, 0.1165)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens,ms\n1,85.5\n", "line 1: .*must be the header"),
        ("Total Length,Execute Time\n", "must be at least one"),
        ("Total Length,Execute Time\n1,85.5\n1,86\n", "line 3: .*tokens must rise"),
        ("Total Length,Execute Time\n1,-1\n", "line 2: .*the time must be above 0"),
        ("Total Length,Execute Time\n1,nan\n", "line 2: .*the time must be above 0"),
        ("Total Length,Execute Time\n1,2,3\n", "line 2: .*a number of tokens and milliseconds"),
        ("Total Length,Execute Time\n1.5,2\n", "line 2: .*a number of tokens and milliseconds"),
    ],
)
def test_a_file_that_holds_no_prefill_times_is_refused_with_the_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_prefill_times(text)
