import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.model_shape import DTYPE_BYTES
from tests.unit.simulation.configs import (
    DEEPSEEK_V2_LITE,
    FALCON_180B,
    GEMMA_2_9B,
    GPT_2,
    LLAMA_2_7B,
    LLAMA_2_70B,
    LLAMA_3_8B,
    MIXTRAL_8X7B,
    QWEN2_5_32B,
)

# Parameters of the model, of its first and last layer, and of its embedding, as transformers 5
# counts them.
COUNTED = {
    "Llama-2-7B": (LLAMA_2_7B, 6_738_415_616, 202_383_360, 202_383_360, 131_072_000),
    "Llama-2-70B": (LLAMA_2_70B, 68_976_648_192, 855_654_400, 855_654_400, 262_144_000),
    "Llama-3-8B": (LLAMA_3_8B, 8_030_261_248, 218_112_000, 218_112_000, 525_336_576),
    "Qwen2.5-32B": (QWEN2_5_32B, 32_763_876_352, 487_605_248, 487_605_248, 778_567_680),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46_702_792_704, 1_451_270_144, 1_451_270_144, 131_072_000),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15_706_484_224, 81_007_104, 584_847_872, 209_715_200),
    "Gemma-2-9B": (GEMMA_2_9B, 9_241_705_984, 198_195_200, 198_195_200, 917_504_000),
    "Falcon-180B": (FALCON_180B, 178_557_088_768, 2_219_894_784, 2_219_894_784, 965_476_352),
    "GPT-2": (GPT_2, 124_439_808, 7_087_872, 7_087_872, 38_597_376 + 1024 * 768),
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_transformers_counts(name):
    config, total, first, last, embedding = COUNTED[name]
    shape = parse_model_shape(config)
    assert shape.num_parameters == pytest.approx(total, rel=0.002)
    assert shape.layers[0].num_parameters() == pytest.approx(first, rel=0.002)
    assert shape.layers[-1].num_parameters() == pytest.approx(last, rel=0.002)
    assert shape.embedding_parameters == embedding


@pytest.mark.parametrize(
    ("config", "kv_bytes"),
    [(LLAMA_2_7B, 16384), (LLAMA_2_70B, 4096), (QWEN2_5_32B, 4096), (DEEPSEEK_V2_LITE, 1152)],
)
def test_a_layer_caches_keys_and_values_or_one_latent_per_token(config, kv_bytes):
    assert parse_model_shape(config).kv_bytes_per_token(0) == kv_bytes


def test_ranks_that_outnumber_the_kv_heads_cache_the_same_head_and_every_rank_the_latent():
    llama, deepseek = parse_model_shape(LLAMA_2_70B), parse_model_shape(DEEPSEEK_V2_LITE)
    assert [llama.kv_bytes_per_token(0, n) for n in (1, 4, 8, 16)] == [4096, 1024, 512, 512]
    assert [deepseek.kv_bytes_per_token(0, n) for n in (1, 4)] == [1152, 1152]


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_decode_attends_to_latents_and_a_chunk_to_what_they_are_expanded_to(num_shards):
    attention = parse_model_shape(DEEPSEEK_V2_LITE).layers[0].attention
    heads = 16 // num_shards
    assert attention.decode_pair_flops(num_shards) == 2 * heads * (512 + 64 + 512)
    assert attention.prefill_pair_flops(num_shards) == 2 * heads * (192 + 128)
    plain = parse_model_shape(LLAMA_2_70B).layers[0].attention
    assert plain.decode_pair_flops() == plain.prefill_pair_flops()


@given(st.sampled_from([LLAMA_2_70B, MIXTRAL_8X7B, QWEN2_5_32B]), st.sampled_from([1, 2, 4, 8]))
def test_the_ranks_of_a_layer_hold_its_weights_once(config, num_shards):
    layer = parse_model_shape(config).layers[0]
    router = layer.hidden_size * layer.mlp.num_experts  # every rank routes
    together = num_shards * (layer.num_parameters(num_shards) - router)
    assert together == layer.num_parameters() - router


def test_the_first_dense_layers_have_no_experts():
    layers = parse_model_shape(DEEPSEEK_V2_LITE).layers
    assert [layer.mlp.num_experts for layer in layers] == [0] + [64] * 26
    assert layers[1].mlp.shared_size == 2 * 1408


def windows(config):
    return [layer.attention.window for layer in parse_model_shape(config).layers]


def test_windows_are_those_of_the_layer_types_of_the_pattern_or_of_all_layers():
    assert windows(GEMMA_2_9B) == [4096, None] * 21
    gemma_3 = GEMMA_2_9B | {"model_type": "gemma3_text", "sliding_window_pattern": 6}
    assert windows(gemma_3) == [4096, 4096, 4096, 4096, 4096, None] * 7
    mistral = LLAMA_3_8B | {"model_type": "mistral", "sliding_window": 4096}
    assert windows(mistral) == [4096] * 32
    assert windows(QWEN2_5_32B) == [None] * 64
    assert windows(QWEN2_5_32B | {"use_sliding_window": True, "max_window_layers": 60}) == (
        [None] * 60 + [131072] * 4
    )
    kinds = ["sliding_attention", "full_attention"] * 32
    assert windows(QWEN2_5_32B | {"use_sliding_window": True, "layer_types": kinds}) == (
        [131072, None] * 32
    )


def test_a_parallel_block_is_reduced_once():
    assert {layer.num_all_reduces for layer in parse_model_shape(FALCON_180B).layers} == {1}
    assert {layer.num_all_reduces for layer in parse_model_shape(LLAMA_2_7B).layers} == {2}


def test_the_text_part_of_a_model_that_sees_is_described():
    nested = {"model_type": "mistral3", "text_config": LLAMA_3_8B, "vision_config": {}}
    assert parse_model_shape(nested) == parse_model_shape(LLAMA_3_8B)


@pytest.mark.parametrize(("dtype", "num_bytes"), DTYPE_BYTES.items())
def test_values_have_the_bytes_of_the_data_type(dtype, num_bytes):
    assert parse_model_shape(LLAMA_2_7B | {"torch_dtype": dtype}).value_bytes == num_bytes


def test_a_checkpoint_that_is_dequantized_at_load_costs_as_much_as_a_plain_one():
    quantized = LLAMA_2_7B | {"quantization_config": {"quant_method": "fp8"}}
    assert parse_model_shape(quantized) == parse_model_shape(LLAMA_2_7B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba': .* must be one of apertus, arcee"),
        ({"hidden_size": None}, r"hidden_size: required, but not given"),
        ({"num_hidden_layers": 10**8}, r"num_hidden_layers=100000000: must be <= 10000"),
        ({"num_hidden_layers": "32"}, r"num_hidden_layers='32': must be an integer"),
        ({"intermediate_size": -1}, r"intermediate_size=-1: must be an integer >= 0"),
        ({"torch_dtype": "int8"}, r"dtype='int8': must be one of float32, float16, bfloat16"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config: .*by awq cannot"),
        ({"sliding_window": 512}, r"layer_types: required where there is a sliding_window"),
        (
            {"sliding_window": 512, "layer_types": ["linear_attention"] * 32},
            r"layer_types: 32 layers, other types: linear_attention; must be 32 times",
        ),
        ({"num_local_experts": 8}, r"num_experts_per_tok: required, but not given"),
        ({"num_attention_heads": 8192}, r"head_dim: required, but not given; must be an integer"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads=5: must divide num_attention_heads=32"),
        (
            {"num_local_experts": 8, "num_experts_per_tok": 9},
            r"num_experts_per_tok=9: must be <= the 8 experts",
        ),
        ({"layer_types": 5}, r"layer_types=5: must be a list"),
        ({"num_local_experts": 8, "mlp_only_layers": 3}, r"mlp_only_layers=3: must be a list"),
        (
            {"num_local_experts": 8, "num_experts_per_tok": 2, "mlp_layer_types": ["sparse"]},
            r"mlp_layer_types: 1 layers; must be 32",
        ),
    ],
)
def test_what_cannot_be_described_is_refused_with_the_key(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_model_shape(LLAMA_2_7B | change)


def test_ranks_that_would_cut_a_head_are_refused_with_the_number():
    shape = parse_model_shape(QWEN2_5_32B)
    with pytest.raises(ConfigError, match=r"tensor_parallel=3: 40 attention heads"):
        shape.check_shards(3)
    shape.check_shards(8)
    grouped = parse_model_shape(
        QWEN2_5_32B | {"num_key_value_heads": 10, "intermediate_size": 20_480}
    )
    with pytest.raises(ConfigError, match=r"tensor_parallel=4: 10 KV heads .* multiple of it"):
        grouped.check_shards(4)
    for num_shards in (1, 2, 5, 10, 20):
        grouped.check_shards(num_shards)
