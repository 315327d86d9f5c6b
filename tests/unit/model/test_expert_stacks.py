"""Stacks of experts that a checkpoint stores one by one are those that transformers makes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from gllm_ray.errors import ConfigError
from gllm_ray.model.expert_stacks import stack_experts
from gllm_ray.model.shard import Shard
from gllm_ray.model.weights import SafetensorsReader
from tests.numerics.models import CONFIGS

CPU = torch.device("cpu")
NUM_EXPERTS = 12  # by their names as text, 10 comes before 2
MIXTURES = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "qwen3_moe": {"num_local_experts": NUM_EXPERTS},
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS},
    "phimoe": {"num_local_experts": NUM_EXPERTS},
    "beam": {"num_experts": NUM_EXPERTS},
}
UP = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture
def checkpoint(tmp_path):
    def save(name):
        config = CONFIG_MAPPING[name](**(CONFIGS[name] | MIXTURES[name]))
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        return tmp_path

    return save


def load(path, layers, dtype=torch.float32):
    reader = SafetensorsReader([path / "model.safetensors"])
    shard = Shard(AutoConfig.from_pretrained(path), layers, dtype, CPU)
    shard.load(reader.tensors)
    return shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURES)
def test_every_weight_is_the_one_that_transformers_loads(name, dtype, checkpoint):
    path = checkpoint(name)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()
    loaded = load(path, (0, 4), dtype).model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, weight in expected.items():
        assert weight.dtype == loaded[key].dtype
        assert torch.equal(weight, loaded[key])


@pytest.mark.parametrize("name", MIXTURES)
def test_no_expert_is_left_to_be_stacked_by_transformers(name, checkpoint):
    path = checkpoint(name)
    stored = load_file(path / "model.safetensors")
    assert any(".experts.11." in key for key in stored)
    stacked = stack_experts(stored, AutoConfig.from_pretrained(path), torch.float32, CPU)
    assert not any(".experts.11." in key for key in stacked)


def test_a_stack_is_made_on_the_device_where_it_is_to_lie(checkpoint):
    path = checkpoint("qwen3_moe")
    stored = load_file(path / "model.safetensors")
    device = torch.device("meta")
    stacked = stack_experts(stored, AutoConfig.from_pretrained(path), torch.bfloat16, device)
    stack = stacked["model.layers.3.mlp.experts.gate_up_proj"][...]
    assert (stack.device, stack.dtype) == (device, torch.bfloat16)
    assert stack.shape == (NUM_EXPERTS, 2 * 48, 64)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(UP), r"not \[11, 12\] of"),
        (
            lambda tensors: tensors.update({UP: tensors[UP][:5].clone()}),
            r"shapes \[\(5, 64\), \(48, 64\)\]",
        ),
    ],
)
def test_an_expert_that_differs_from_the_others_is_refused_by_the_stage_that_owns_it(
    change, told, checkpoint
):
    path = checkpoint("qwen3_moe")
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    load(path, (0, 2))
    with pytest.raises(ConfigError, match=rf"model\.path=.*2\.mlp\.experts\.gate_up_proj.*{told}"):
        load(path, (2, 4))


def test_experts_of_another_number_than_config_json_says_are_refused(checkpoint):
    path = checkpoint("qwen3_moe")
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts.11." not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"mismatched keys: .*experts\.down_proj.*11, 64, 48"):
        load(path, (0, 2))
