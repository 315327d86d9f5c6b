"""Quantized checkpoints are served with the values that their formats define."""

import functools

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gllm_ray.errors import ConfigError
from gllm_ray.model import dequantization
from gllm_ray.model.dequantization import dequantized, from_float8, from_mxfp4
from gllm_ray.model.quantized_checkpoint import quantized_format
from gllm_ray.stages.worker import StageWorker
from tests.numerics.models import save_checkpoint
from tests.numerics.quantized_models import CONFIGS, quantize
from tests.numerics.serving import service_config

CASES = [
    ("llama", "fp8"),
    ("llama", "fp8 per weight"),
    ("llama", "fp8 by another name"),
    ("llama", "compressed-tensors"),
    ("qwen3_moe", "fp8"),
    ("deepseek_v3", "fp8"),
    ("gpt_oss", "mxfp4"),
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Of an architecture and a method: the plain checkpoint with the same values, and the copy."""

    @functools.cache
    def make(name, method):
        torch.manual_seed(0)
        plain, path = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("quantized")
        save_checkpoint(name, plain)
        values = quantize(plain, method, path)
        tensors = load_file(plain / "model.safetensors")
        assert values.keys() < tensors.keys()
        save_file(tensors | values, plain / "model.safetensors", metadata={"format": "pt"})
        return plain, path

    return make


def load(path, *, num_stages=1, stage_id=0, **settings):
    config = service_config(path, num_stages=num_stages)
    model = config.model.model_copy(update={"dtype": "float32"} | settings)
    worker = StageWorker(config.model_copy(update={"model": model}), stage_id)
    info = worker.load()
    return worker, info


def weights(path, **options):
    worker, _ = load(path, **options)
    return dict(worker._shard.model.state_dict())


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_checkpoint_has_the_weights_of_its_values(name, method, dtype, quantized):
    plain, path = quantized(name, method)
    expected = weights(plain, dtype=dtype)
    found = weights(path, dtype=dtype)
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        assert torch.equal(weight, expected[key]), key


@pytest.mark.parametrize(
    ("name", "method"),
    [case for case in CASES if case[1] not in ("compressed-tensors", "fp8 by another name")],
)
def test_transformers_reads_the_same_values(name, method, quantized):
    plain, path = quantized(name, method)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected, found = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(prompt).logits
        for each in (plain, path)
    )
    assert torch.equal(found, expected)


def test_dummy_weights_do_not_depend_on_how_real_ones_are_stored(quantized):
    expected, found = (
        weights(path, load_format="dummy") for path in quantized("deepseek_v3", "fp8")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in found.items())


def test_stages_read_the_quantized_bytes_and_together_each_once(quantized):
    _, path = quantized("qwen3_moe", "fp8")
    _, whole = load(path)
    stages = [load(path, num_stages=2, stage_id=stage_id) for stage_id in range(2)]
    stored = load_file(path / "model.safetensors").values()
    assert sum(worker.bytes_read for worker, _ in stages) == sum(each.nbytes for each in stored)
    assert all(info.num_parameters < 0.6 * whole.num_parameters for _, info in stages)
    assert sum(info.num_parameters for _, info in stages) == whole.num_parameters


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_the_shape_of_a_weight_is_known_before_it_is_read(method):
    stored = quantized_format(CONFIGS[method])
    tensors = {
        f"w{stored.weight_suffix}": torch.zeros(3, 16, 2, 16, dtype=torch.uint8),
        f"w{stored.scale_suffixes[0]}": torch.ones(3, 16, 2, dtype=torch.uint8),
        "other": torch.zeros(2, 3),
    }
    if method == "fp8":
        tensors |= {"w": torch.zeros(16, 24), "w_scale_inv": torch.ones(2, 3)}
    weights = dequantized(tensors, stored, torch.float32)
    assert weights.keys() == {"w", "other"}
    assert all(weight.shape == weight[...].shape for weight in weights.values())


@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize("workspace", [1, 100, 2**20])
def test_a_block_may_be_cut_off_by_the_end_of_its_weight(leading, workspace, monkeypatch):
    monkeypatch.setattr(dequantization, "_MAX_WORKSPACE", workspace)
    weight = torch.randn(*leading, 21, 10).to(torch.float8_e4m3fn)
    scales = torch.rand(*leading, 6, 2)
    expected = torch.empty(*leading, 21, 10)
    for row in range(21):
        for column in range(10):
            scale = scales[..., row // 4, column // 8]
            expected[..., row, column] = weight[..., row, column].float() * scale
    assert torch.equal(from_float8(weight, scales, (4, 8), torch.float32), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1), (1, 5)])
def test_scales_may_be_one_for_all_or_one_for_each_row_or_column(shape):
    weight = torch.randn(6, 5).to(torch.float8_e4m3fn)
    scales = torch.rand(shape, dtype=torch.bfloat16)
    column = scales.float().view(6, 1) if shape == (6,) else scales.float()
    expected = weight.float() * column
    assert torch.equal(from_float8(weight, scales, None, torch.float32), expected)


@pytest.mark.parametrize(
    ("shape", "block"), [((4, 1), None), ((5, 1), (4, 8)), ((7, 1), (4, 8)), ((6, 3), (4, 8))]
)
def test_scales_that_do_not_fit_the_blocks_are_refused(shape, block):
    weight = torch.zeros(21, 10, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="scales of"):
        from_float8(weight, torch.ones(shape), block, torch.float32)


def test_a_weight_whose_scales_do_not_fit_is_refused_by_name():
    tensors = {"w": torch.zeros(21, 10), "w_scale_inv": torch.ones(4, 2)}
    weights = dequantized(tensors, quantized_format(CONFIGS["fp8"]), torch.float32)
    with pytest.raises(ConfigError, match="'w': 4 scales of 21 rows or columns, in blocks of 8"):
        weights["w"][...]


def test_all_groups_of_a_checkpoint_are_looked_at_for_the_size_of_a_block():
    groups = {"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"block_structure": [128, 64]}}}
    stored = quantized_format(CONFIGS["compressed-tensors"] | {"config_groups": groups})
    assert stored.block == (128, 64)


@pytest.mark.parametrize("workspace", [1, 200, 2**20])
def test_four_bits_are_the_same_however_many_rows_go_at_once(workspace, monkeypatch):
    blocks = torch.randint(0, 256, (2, 7, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 7, 3), dtype=torch.uint8)
    whole = from_mxfp4(blocks, scales, torch.bfloat16)
    assert whole.shape == (2, 96, 7)
    monkeypatch.setattr(dequantization, "_MAX_WORKSPACE", workspace)
    assert torch.equal(from_mxfp4(blocks, scales, torch.bfloat16), whole)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_weight_without_its_scales_is_refused_by_name(is_known, quantized, tmp_path):
    plain, path = quantized("llama", "fp8")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if is_known:
        del tensors[f"{name}_scale_inv"]
    config = (path if is_known else plain) / "config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is stored as torch.float8_e4m3fn, but its scales"):
        load(tmp_path)
