"""Fused operators compute what the modules they stand in for compute, and stand in for no other."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from gllm_ray.model.fusion import fuse_operators
from gllm_ray.model.linear import PackedLinear, quantize_linears, speed_up_linears
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def _operators():
    try:
        load_operators()
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))


def make_config(name, **settings):
    config = CONFIG_MAPPING[name](**SIZES | {"hidden_size": 64, "intermediate_size": 96} | settings)
    config._attn_implementation = "eager"
    return config


def make_pair(module, dtype):
    """The module with random parameters, and one that computes the same by operators."""
    torch.manual_seed(0)
    module = module.to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.uniform_(-0.5, 0.5)
    fused = copy.deepcopy(module)
    speed_up_linears(fused)
    fuse_operators(fused)
    return module.double(), fused


def is_fused(module):
    return "forward" in vars(module)


def rotary_of(attention):
    return attention.forward.__func__.__globals__["apply_rotary_pos_emb"]


def check(output, expected, dtype):
    assert output.dtype is dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@given(
    rows=st.integers(0, 5),
    width=st.sampled_from([1, 7, 16, 40, 128]),
    dtype=st.sampled_from([*TOLERANCES]),
)
@settings(deadline=None)
def test_norms_are_those_of_torch(rows, width, dtype):
    norm, fused = make_pair(llama.LlamaRMSNorm(width, eps=1e-3), dtype)
    assert is_fused(fused)
    inputs = torch.randn(2, 3, width, rows).mT.to(dtype)
    check(fused(inputs), norm(inputs.double()), dtype)


@given(
    tokens=st.integers(0, 5),
    width=st.sampled_from([2, 6, 32, 40, 128]),
    dtype=st.sampled_from([*TOLERANCES]),
)
@settings(deadline=None)
def test_rotations_are_those_of_torch(tokens, width, dtype):
    config = make_config("llama", head_dim=width)
    _, fused = make_pair(llama.LlamaAttention(config, layer_idx=0), dtype)
    assert is_fused(fused)
    packed = torch.randn(1, tokens, 6, width + 3).transpose(1, 2)[..., :width].to(dtype)
    query, key = packed.split([4, 2], dim=1)
    angles = torch.randn(2, 1, tokens, width).to(dtype)
    expected = llama.apply_rotary_pos_emb(query.double(), key.double(), *angles.double())
    for output, plain in zip(rotary_of(fused)(query, key, *angles), expected, strict=True):
        check(output, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gated_mlps_are_those_of_torch(dtype):
    mlp, fused = make_pair(llama.LlamaMLP(make_config("llama", mlp_bias=True)), dtype)
    assert is_fused(fused) == isinstance(fused.up_proj, PackedLinear)
    assert is_fused(fused) or dtype is torch.bfloat16
    inputs = torch.randn(1, 37, 64).to(dtype) / 8
    check(fused(inputs), mlp(inputs.double()), dtype)


def test_gated_mlps_of_int8_are_those_of_torch():
    mlp = llama.LlamaMLP(make_config("llama")).requires_grad_(False)
    quantize_linears(mlp)
    fused = copy.deepcopy(mlp)
    speed_up_linears(fused)
    fuse_operators(fused)
    assert is_fused(fused)
    for dtype in (torch.float32, torch.float16):  # the operator does not take the latter
        inputs = torch.randn(1, 37, 64).to(dtype)
        torch.testing.assert_close(fused(inputs), mlp(inputs))


def test_types_that_the_operators_do_not_take_are_left_to_torch():
    _, norm = make_pair(llama.LlamaRMSNorm(16), torch.float16)
    _, attention = make_pair(llama.LlamaAttention(make_config("llama"), 0), torch.float16)
    inputs, angles = torch.randn(1, 5, 64).half(), torch.randn(2, 1, 5, 16).half()
    heads = inputs.unflatten(-1, (4, 16)).transpose(1, 2)
    assert torch.equal(norm(heads), llama.LlamaRMSNorm.forward(norm, heads))
    rotated = rotary_of(attention)(heads, heads, *angles)[0]
    assert torch.equal(rotated, llama.apply_rotary_pos_emb(heads, heads, *angles)[0])


def test_copies_of_the_code_in_other_models_are_fused_and_variants_are_not():
    _, layer = make_pair(qwen3.Qwen3DecoderLayer(make_config("qwen3"), 0), torch.float32)
    for module in (layer.self_attn, layer.self_attn.q_norm, layer.mlp, layer.input_layernorm):
        assert is_fused(module)
    _, layer = make_pair(gemma.GemmaDecoderLayer(make_config("gemma"), 0), torch.float32)
    assert is_fused(layer.self_attn)  # its norm adds one to the weight, its gate is a GELU
    for module in (layer.input_layernorm, layer.mlp):
        assert not is_fused(module)
    _, attention = make_pair(cohere.CohereAttention(make_config("cohere"), 0), torch.float32)
    assert not is_fused(attention)  # it rotates pairs of neighbours
