import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.devices import find_device, known_devices
from gllm_ray.simulation.hosts import find_host, known_hosts
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.model_shape import Gemm
from tests.unit.simulation.configs import CODELLAMA_34B, LLAMA_2_7B, LLAMA_2_70B
from tests.unit.simulation.shared_data import profile_rows

MODELS = {
    "Llama-2-7b-hf": LLAMA_2_7B,
    "CodeLlama-34b-Instruct-hf": CODELLAMA_34B,
    "Llama-2-70b-hf": LLAMA_2_70B,
}
GEMMS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
A100, H100 = find_device("A100-80GB-PCIe"), find_device("H100-80GB-SXM")
devices = st.sampled_from(list(known_devices().values()))
gemms = st.builds(Gemm, st.integers(64, 20_000), st.integers(64, 60_000))
rows = st.integers(0, 10_000)


def layer_errors(device, folder):
    """For each row of Vidur's profiles, the error of the sum of a layer's four products."""
    errors = []
    for model, config in MODELS.items():
        layer = parse_model_shape(config).layers[0]
        for row in profile_rows(f"{folder}/{model}.csv"):
            num_shards = int(row["num_tensor_parallel_workers"])
            measured_ms = sum(float(row[f"time_stats.{name}.median"]) for name in GEMMS)
            predicted_s = sum(
                device.gemm_time_s(gemm, int(row["num_tokens"]), "float16")
                for gemm in layer.gemms(num_shards)
            )
            errors.append(1000 * predicted_s / measured_ms - 1)
    return errors


@pytest.mark.parametrize(
    ("device", "folder", "limit"), [(A100, "a100", 0.04), (H100, "h100", 0.06)]
)
def test_the_products_of_a_layer_are_within_the_limit_of_the_profiles(device, folder, limit):
    errors = layer_errors(device, folder)
    assert len(errors) == 3 * 1044
    assert fmean(map(abs, errors)) < limit
    assert abs(fmean(errors)) < 0.02


def test_the_products_of_a_layer_on_an_a40_are_within_4_percent_of_those_published():
    # Layer sums of Llama-2-70B at 4 ranks in Vidur's profiles (7d47513, MIT), milliseconds by rows.
    measured_ms = {
        1: 0.778,
        128: 0.899,
        256: 1.329,
        512: 2.077,
        1024: 4.017,
        2048: 7.945,
        4096: 15.11,
    }
    device, layer = find_device("A40"), parse_model_shape(LLAMA_2_70B).layers[0]
    errors = [
        sum(device.gemm_time_s(gemm, num_rows, "float16") for gemm in layer.gemms(4)) * 1000 / ms
        - 1
        for num_rows, ms in measured_ms.items()
    ]
    assert fmean(map(abs, errors)) < 0.04


def attention_errors(phase, predict):
    return [
        predict(row) / (float(row["time_ms_median"]) / 1000) - 1
        for row in profile_rows("a100/attention_CodeLlama34B-shape_tp2_sampled.csv")
        if row["phase"] == phase
    ]


def test_prefill_attention_is_within_5_percent_of_the_profile():
    attention = parse_model_shape(CODELLAMA_34B).layers[0].attention
    flops = A100.flops("float16") * A100.prefill_efficiency

    def predict(row):
        chunk, prefix = int(row["prefill_chunk_size"]), int(row["kv_cache_size"])
        num_pairs = chunk * (prefix + chunk)
        return A100.prefill_launch_s + num_pairs * attention.prefill_pair_flops(2) / flops

    assert fmean(map(abs, attention_errors("prefill", predict))) < 0.05


def test_decode_attention_is_within_20_percent_of_the_profile():
    attention = parse_model_shape(CODELLAMA_34B).layers[0].attention
    bandwidth = A100.bandwidth_bytes_s * A100.decode_efficiency

    def predict(row):
        num_context_tokens = int(row["batch_size"]) * int(row["kv_cache_size"])
        num_bytes = 2 * num_context_tokens * attention.cached_values(2)
        return A100.decode_launch_s + num_bytes / bandwidth

    assert fmean(map(abs, attention_errors("decode", predict))) < 0.20


@given(devices, gemms, rows, st.integers(0, 1000), st.floats(1, 64), st.floats(0, 64))
def test_more_rows_and_more_matrices_never_take_less_time(device, gemm, num_rows, more, n, others):
    time_s = device.gemm_time_s(gemm, num_rows, "bfloat16", n)
    assert time_s <= device.gemm_time_s(gemm, num_rows + more, "bfloat16", n) * (1 + 1e-12)
    assert time_s <= device.gemm_time_s(gemm, num_rows, "bfloat16", n + others) * (1 + 1e-12)


@given(devices, gemms, rows)
def test_a_product_takes_longer_than_its_bytes_and_than_its_operations_at_the_peak(
    device, gemm, num_rows
):
    weights = gemm.inputs * gemm.outputs
    time_s = device.gemm_time_s(gemm, num_rows, "bfloat16")
    assert time_s >= 2 * weights / device.bandwidth_bytes_s
    assert time_s >= 2 * num_rows * weights / device.flops("bfloat16")


@given(devices, st.integers(1, 100_000))
def test_rows_are_rounded_up_to_a_tile_or_below_it_to_a_power_of_two(device, num_rows):
    tiled = device.tiled_rows(num_rows)
    assert tiled >= num_rows
    if num_rows > device.tile:
        assert tiled % device.tile == 0
        assert tiled - num_rows < device.tile
    else:
        assert math.log2(tiled).is_integer()
        assert tiled < max(2 * num_rows, 17)


def test_one_row_past_a_tile_costs_about_the_next_tile():
    gemm = Gemm(8192, 57344)
    at, past, next_tile = (A100.gemm_time_s(gemm, n, "bfloat16") for n in (512, 513, 640))
    assert past / at > 1.2
    assert next_tile / past < 1.01


def test_a_large_product_takes_its_operations_at_the_efficiency_reached():
    gemm = Gemm(16384, 16384)
    operations = 2 * 16384**3
    expected = operations / (312e12 * A100.compute_efficiency)
    assert A100.gemm_time_s(gemm, 16384, "bfloat16") == pytest.approx(expected, rel=0.01)


def test_only_devices_that_were_measured_are_calibrated():
    calibrated = {name for name, device in known_devices().items() if device.is_calibrated}
    assert calibrated == {"A100-80GB-PCIe", "H100-80GB-SXM", "A40", "L20"}
    for name, device in known_devices().items():
        assert ("Not measured" in device.provenance) == (name not in calibrated)


def test_unknown_names_and_missing_data_types_are_refused_with_those_known():
    with pytest.raises(ConfigError, match=r"device='B300': not known; must be one of A100-80GB"):
        find_device("B300")
    with pytest.raises(ConfigError, match=r"'A10G': peak_flops has no float32; .*bfloat16"):
        find_device("A10G").flops("float32")
    with pytest.raises(ConfigError, match=f"must be one of {', '.join(known_hosts())}"):
        find_host("fast")
