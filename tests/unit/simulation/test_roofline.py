from statistics import fmean
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hosts import Host, find_host
from gllm_ray.simulation.links import find_link
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from gllm_ray.simulation.stage_profile import parse_prefill_times
from tests.unit.simulation.configs import (
    DEEPSEEK_V2_LITE,
    FALCON_180B,
    GEMMA_2_9B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    MIXTRAL_8X7B,
    QWEN2_5_32B,
    YI_34B,
)
from tests.unit.simulation.shared_data import profile_path, profile_rows

GRAPHS = find_host("graphs")
NVLINK = find_link("a100-nvlink-pairs")


def roofline(config, num_stages=1, *, device="A100-80GB-PCIe", host=GRAPHS, tensor_parallel=1):
    layout = PipelineLayout.split(parse_model_shape(config), num_stages, tensor_parallel)
    link = NVLINK if tensor_parallel > 1 else None
    return RooflineCost(layout, find_device(device), host, link)


def prefill(num_tokens, start=0):
    return StepLoad(0, 0, num_tokens, num_tokens * (start + num_tokens))


def decodes(count, context):
    return StepLoad(count, count * context, 0, 0)


COSTS = [
    roofline(QWEN2_5_32B, 4, device="L20"),
    roofline(LLAMA_2_70B, 2, tensor_parallel=4),
    roofline(FALCON_180B, 2, tensor_parallel=4, host=find_host("sarathi-serve")),
    roofline(MIXTRAL_8X7B, 2, device="H100-80GB-SXM"),
    roofline(DEEPSEEK_V2_LITE, 1),
    roofline(GEMMA_2_9B, 2, device="L20"),
]
counts = st.integers(0, 3000)
loads = st.builds(StepLoad, counts, st.integers(0, 10**7), counts, st.integers(0, 10**9))


@given(st.sampled_from(COSTS), loads, loads)
def test_a_stage_never_takes_less_time_when_any_part_of_the_load_grows(cost, load, growth):
    for stage_id in range(cost.layout.num_stages):
        time_s = cost.stage_time_s(stage_id, load)
        for part, value in zip(StepLoad._fields, growth, strict=True):
            grown = load._replace(**{part: getattr(load, part) + value})
            assert time_s <= cost.stage_time_s(stage_id, grown) * (1 + 1e-12)


def test_stages_of_equal_layers_take_equal_time_and_the_ends_more():
    layout = PipelineLayout.explicit(parse_model_shape(QWEN2_5_32B), [16] * 4)
    cost = RooflineCost(layout, find_device("L20"), GRAPHS)
    first, second, third, last = (cost.stage_time_s(i, decodes(64, 1000)) for i in range(4))
    assert second == third
    assert second < first < last


def test_decodes_of_a_large_batch_add_the_bytes_of_their_cache_at_the_bandwidth_reached():
    cost, device = roofline(QWEN2_5_32B), find_device("A100-80GB-PCIe")
    more_s = cost.stage_time_s(0, decodes(64, 5000)) - cost.stage_time_s(0, decodes(64, 1000))
    num_bytes = 64 * 4000 * 64 * 4096
    expected_s = num_bytes / (device.bandwidth_bytes_s * device.decode_efficiency)
    assert more_s == pytest.approx(expected_s)


def test_a_longer_prefix_adds_its_pairs_at_the_efficiency_of_attention():
    cost, device = roofline(QWEN2_5_32B), find_device("A100-80GB-PCIe")
    more_s = cost.stage_time_s(0, prefill(512, 4096)) - cost.stage_time_s(0, prefill(512))
    operations = 4 * 512 * 4096 * 40 * 128 * 64
    assert more_s == pytest.approx(operations / (312e12 * device.prefill_efficiency))


def test_a_window_bounds_what_its_layers_read():
    cost, device = roofline(GEMMA_2_9B, device="A100-80GB-PCIe"), find_device("A100-80GB-PCIe")
    more_s = cost.stage_time_s(0, decodes(8, 9000)) - cost.stage_time_s(0, decodes(8, 4096))
    num_bytes = 8 * (9000 - 4096) * 21 * 2 * 8 * 256 * 4  # the 21 layers that see everything
    expected_s = num_bytes / (device.bandwidth_bytes_s * device.decode_efficiency)
    assert more_s == pytest.approx(expected_s)
    wide = cost.stage_time_s(0, prefill(100, 9000)) - cost.stage_time_s(0, prefill(100, 5000))
    operations = 4 * 100 * 4000 * 16 * 256 * 21
    assert wide == pytest.approx(operations / (19.5e12 * device.prefill_efficiency))


def test_few_tokens_read_few_experts_and_many_read_all():
    cost, device = roofline(MIXTRAL_8X7B), find_device("A100-80GB-PCIe")
    expert_s = 32 * 2 * 3 * 4096 * 14336 / (device.bandwidth_bytes_s * device.bandwidth_efficiency)
    one, two, many = (cost.stage_time_s(0, decodes(n, 1)) for n in (1, 2, 40))
    # The second token picks two of eight experts again: one and a half of them are new.
    assert two - one == pytest.approx(1.5 * expert_s, rel=0.05)
    assert many - one == pytest.approx(6 * expert_s, rel=0.05)


def test_all_reduces_come_on_top_twice_a_layer_and_once_where_blocks_are_parallel():
    for config, num_reduces in ((LLAMA_2_70B, 160), (FALCON_180B, 80)):
        cost = roofline(config, tensor_parallel=4)
        slow_link = NVLINK.model_copy(update={"all_reduces": [], "latency_s": 1.0})
        slow = RooflineCost(cost.layout, find_device("A100-80GB-PCIe"), GRAPHS, slow_link)
        latency_s = num_reduces * 2 * 3 * 1.0
        assert slow.stage_time_s(0, decodes(1, 1)) == pytest.approx(latency_s, rel=0.001)


def test_more_ranks_take_less_time_but_not_in_proportion():
    alone, shared = roofline(YI_34B), roofline(YI_34B, tensor_parallel=2)
    for load in (decodes(8, 1000), prefill(2048)):
        ratio = alone.stage_time_s(0, load) / shared.stage_time_s(0, load)
        assert 1.3 < ratio < 2


def make_host(layer_launch_s=0.0, step_s=0.0, sequence_s=0.0):
    return Host(
        name="test",
        is_calibrated=False,
        provenance="made up",
        layer_launch_s=layer_launch_s,
        step_s=step_s,
        sequence_s=sequence_s,
    )


def test_a_stage_waits_for_launches_only_while_they_take_longer_than_the_device():
    free, slow = roofline(YI_34B), roofline(YI_34B, host=make_host(layer_launch_s=2e-3))
    assert slow.stage_time_s(0, decodes(1, 10)) == 60 * 2e-3
    assert slow.stage_time_s(0, prefill(2048)) == free.stage_time_s(0, prefill(2048))


def test_the_host_adds_its_time_for_each_step_and_each_sequence():
    free, slow = roofline(YI_34B), roofline(YI_34B, host=make_host(step_s=0.5, sequence_s=0.1))
    for load, expected_s in ((decodes(7, 100), 1.2), (prefill(99), 0.6)):
        added_s = slow.stage_time_s(0, load) - free.stage_time_s(0, load)
        assert added_s == pytest.approx(expected_s)


def test_several_ranks_need_a_link_and_the_model_a_data_type_the_device_has():
    layout = PipelineLayout.split(parse_model_shape(YI_34B), 1, tensor_parallel=2)
    with pytest.raises(ConfigError, match="tensor_parallel=2: must be 1 where no link"):
        RooflineCost(layout, find_device("L20"), GRAPHS)
    with pytest.raises(ConfigError, match="'A10G': peak_flops has no float32"):
        roofline(GEMMA_2_9B, device="A10G")


def test_a_price_takes_less_than_5_microseconds():
    # A bound for a busy machine is the least of several rounds.
    for cost in COSTS:
        mixed = [StepLoad(n, 900 * n, 3 * n, 5000 * n) for n in range(1, 200)]
        rounds = []
        for _ in range(20):
            start = perf_counter()
            for load in mixed:
                cost.stage_time_s(0, load)
            rounds.append((perf_counter() - start) / len(mixed))
        assert min(rounds) < 5e-6


L20_PROFILES = {"L20-Llama-13B": LLAMA_2_13B, "L20-Qwen2.5-32B": QWEN2_5_32B}


@pytest.mark.parametrize("name", L20_PROFILES)
def test_whole_prefills_on_an_l20_are_within_3_percent_of_the_profile(name):
    points = parse_prefill_times(profile_path(f"l20/{name}.csv").read_text())
    cost = roofline(L20_PROFILES[name], device="L20")
    errors = [cost.stage_time_s(0, prefill(n)) / time_s - 1 for n, time_s in points]
    assert len(errors) > 2000
    assert fmean(map(abs, errors)) < 0.03


def test_long_prefills_of_yi_34b_on_two_a100_are_within_7_percent_of_the_measured():
    cost = roofline(YI_34B, tensor_parallel=2)
    rows = profile_rows("yi34b_a100/figure-2_prefill.csv")
    measured_s = {int(row["batch_num_tokens"]): float(row["batch_execution_time"]) for row in rows}
    long = {n: time_s for n, time_s in measured_s.items() if n >= 2048}
    assert len(long) == 4
    for num_tokens, time_s in long.items():
        assert cost.stage_time_s(0, prefill(num_tokens)) == pytest.approx(time_s, rel=0.07)


def test_decodes_of_a_slow_host_are_within_10_percent_of_the_measured():
    cost = roofline(YI_34B, tensor_parallel=2, host=find_host("sarathi-serve"))
    errors = [
        cost.stage_time_s(0, decodes(int(row["batch_num_tokens"]), 1000))
        / float(row["batch_execution_time"])
        - 1
        for row in profile_rows("yi34b_a100/figure-2_decode.csv")
    ]
    assert len(errors) == 8
    assert fmean(map(abs, errors)) < 0.10
