"""What the planner takes a stage's activations for, beside what torch allocates for them."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING

from gllm_ray.messages import SamplingParams
from gllm_ray.model.sampler import sample
from gllm_ray.model.shard import Shard
from gllm_ray.simulation.activations import activation_bytes
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout

NUM_ROWS = 256
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
EXPERTS = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2}
LATENTS = {"kv_lora_rank": 128, "q_lora_rank": 192, "qk_rope_head_dim": 32}
MODELS = {
    "llama": ("llama", {}),
    "many heads": ("llama", {"num_key_value_heads": 8, "intermediate_size": 512}),
    "wide heads": ("llama", {"head_dim": 128, "intermediate_size": 512}),
    "large vocabulary": ("llama", {"vocab_size": 32_768}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64, "intermediate_size": 512}),
    "gemma2": ("gemma2", {"head_dim": 64}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 384, "head_dim": 64}),
    "deepseek_v3": (
        "deepseek_v3",
        {"num_key_value_heads": 8, "moe_intermediate_size": 384, "n_group": 1, "topk_group": 1}
        | {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        | {"qk_nope_head_dim": 64, "v_head_dim": 64, **LATENTS},
    ),
}


class PeakBytes(TorchDispatchMode):
    """The most that was allocated at any time, and not freed."""

    def __init__(self):
        super().__init__()
        self.peak = self._live = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = {id(storage) for storage in storages((args, kwargs))}
        output = operator(*args, **(kwargs or {}))
        for storage in storages(output):
            if storage not in self._known and id(storage) not in given:
                self._known.add(storage)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return output

    def _free(self, num_bytes):
        self._live -= num_bytes


def storages(values):
    return [
        each.untyped_storage() for each in tree_leaves(values) if isinstance(each, torch.Tensor)
    ]


def allocated_bytes(config, layers):
    """By a stage of layers, but for attention; if it is the last one, also by drawing from all."""
    shard = Shard(config, layers, torch.bfloat16, torch.device("cpu"))
    shapes = shard.parameters_to_load()
    shard.load({name: torch.zeros(shape.shape) for name, shape in shapes.items()})
    with torch.inference_mode(), PeakBytes() as allocated:
        shard.probe(NUM_ROWS, NUM_ROWS)
        if shard.is_last:
            logits = torch.ones(NUM_ROWS, config.vocab_size, dtype=torch.bfloat16)
            sample(logits, [SamplingParams(temperature=1.0)] * NUM_ROWS, range(NUM_ROWS))
    return allocated.peak


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_about_what_torch_allocates(name):
    kind, changes = MODELS[name]
    config = CONFIG_MAPPING[kind](**SIZES | changes)
    shape = parse_model_shape(config.to_dict() | {"dtype": "bfloat16"})
    layout = PipelineLayout.explicit(shape, [1, 1])
    estimates = activation_bytes(layout, NUM_ROWS, has_graphs=False)
    for layers, estimate in zip(((0, 1), (1, 2)), estimates, strict=True):
        assert 1 <= estimate / allocated_bytes(config, layers) < 1.5


def test_graphs_take_as_much_again_and_rows_in_proportion():
    shape = parse_model_shape(CONFIG_MAPPING["llama"](**SIZES).to_dict() | {"dtype": "bfloat16"})
    layout = PipelineLayout.explicit(shape, [1, 1])
    first, last = activation_bytes(layout, 100, has_graphs=False)
    assert activation_bytes(layout, 100, has_graphs=True) == (2 * first, 2 * last)
    assert activation_bytes(layout, 200, has_graphs=False) == (2 * first, 2 * last)
