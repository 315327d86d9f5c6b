import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.partition import size_kv_cache
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from tests.unit.simulation.configs import GEMMA_2_9B, LLAMA_2_70B, MIXTRAL_8X7B, QWEN2_5_32B

QWEN, GEMMA = parse_model_shape(QWEN2_5_32B), parse_model_shape(GEMMA_2_9B)
GIGABYTE = 10**9


def stage_infos(layout, **changes):
    values = {"device_name": "L20", "memory_bytes": 48 * GIGABYTE} | changes
    return layout.stage_infos(**{"memory_utilization": 0.9, "block_size": 16} | values)


@given(st.sampled_from([QWEN2_5_32B, MIXTRAL_8X7B, LLAMA_2_70B]), st.integers(1, 9))
def test_the_stages_hold_all_layers_and_the_weights_of_the_model_once(config, num_stages):
    model = parse_model_shape(config)
    layout = PipelineLayout.split(model, num_stages)
    held = [layer for stage in range(num_stages) for layer in layout.layers(stage)]
    assert tuple(held) == model.layers
    assert sum(map(layout.num_parameters, range(num_stages))) == model.num_parameters


def test_a_tied_head_is_held_twice_only_where_it_is_not_beside_the_embedding():
    together, apart = PipelineLayout.split(GEMMA, 1), PipelineLayout.split(GEMMA, 2)
    assert together.num_parameters(0) == GEMMA.num_parameters
    assert sum(map(apart.num_parameters, (0, 1))) == GEMMA.num_parameters + GEMMA.head_parameters


def test_the_default_split_weighs_half_the_head_and_an_explicit_one_is_kept():
    # Half its head is less than one layer.
    assert PipelineLayout.split(QWEN, 4).layer_ranges == ((0, 16), (16, 32), (32, 48), (48, 64))
    uneven = PipelineLayout.explicit(QWEN, [15, 17, 17, 15])
    assert uneven.layer_ranges == ((0, 15), (15, 32), (32, 49), (49, 64))
    with pytest.raises(ConfigError, match="adds up to 48 layers, but the model has 64"):
        PipelineLayout.explicit(QWEN, [16] * 3)


def test_ranks_share_weights_and_kv_heads():
    alone, shared = PipelineLayout.split(QWEN, 4), PipelineLayout.split(QWEN, 4, tensor_parallel=4)
    assert shared.num_parameters(1) * 4 == alone.num_parameters(1)
    assert shared.kv_bytes_per_token(1) * 4 == alone.kv_bytes_per_token(1) == 16 * 4096
    with pytest.raises(ConfigError, match="tensor_parallel=3"):
        PipelineLayout.split(QWEN, 4, tensor_parallel=3)


def test_hidden_states_of_2048_tokens_of_qwen_32b_are_21_megabytes():
    load = StepLoad(48, 1000, 2000, 4_000_000)
    assert PipelineLayout.split(QWEN, 4).hop_bytes(load) == 2048 * 5120 * 2


def test_kv_blocks_fill_what_the_weights_leave():
    layout = PipelineLayout.explicit(QWEN, [16] * 4)
    for stage_id, info in enumerate(stage_infos(layout)):
        assert info.weight_bytes == 2 * layout.num_parameters(stage_id)
        assert info.kv_block_bytes == 16 * 16 * 4096
        left = int(0.9 * 48 * GIGABYTE) - info.weight_bytes
        assert 0 <= left - info.max_kv_blocks * info.kv_block_bytes < info.kv_block_bytes


def test_the_weakest_stage_is_named_where_the_cache_is_too_small():
    infos = stage_infos(PipelineLayout.explicit(QWEN, [14, 22, 14, 14]))
    assert size_kv_cache(infos, 16, 32_768) == min(info.max_kv_blocks for info in infos)
    with pytest.raises(ConfigError, match=r"needs 62500 blocks of 16, .* on stage 1"):
        size_kv_cache(infos, 16, 1_000_000)


def test_weights_that_do_not_fit_are_refused_with_the_stage_and_the_bytes():
    message = r"stage 0 of 1: \d+ bytes of weights on each L20, of which 43200000000 bytes"
    with pytest.raises(ConfigError, match=message):
        stage_infos(PipelineLayout.split(QWEN, 1))
