from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.messages import StageInfo
from gllm_ray.partition import describe_stage, explicit_layers, size_kv_cache, split_layers

parameters = st.lists(st.integers(0, 100), min_size=1, max_size=9)
head_parameters = st.integers(0, 300)


def slowest(ranges, layers, head):
    stages = [sum(layers[first:last]) for first, last in ranges]
    stages[-1] += head / 2
    return max(stages)


@given(parameters, head_parameters, st.data())
def test_split_is_contiguous_complete_and_leaves_no_stage_empty(layers, head, data):
    num_stages = data.draw(st.integers(1, len(layers)))
    ranges = split_layers(layers, head, num_stages)
    assert len(ranges) == num_stages
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(layers)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert all(first < last for first, last in ranges)


@given(parameters, head_parameters, st.data())
def test_no_other_split_has_a_faster_slowest_stage(layers, head, data):
    num_stages = data.draw(st.integers(1, len(layers)))
    best = slowest(split_layers(layers, head, num_stages), layers, head)
    for cuts in combinations(range(1, len(layers)), num_stages - 1):
        other = list(pairwise([0, *cuts, len(layers)]))
        assert best <= slowest(other, layers, head)


def test_a_heavy_head_takes_layers_from_the_last_stage():
    assert split_layers([10] * 8, 40, 2) == [(0, 5), (5, 8)]
    assert split_layers([10] * 8, 40, 4) == [(0, 2), (2, 4), (4, 7), (7, 8)]


def test_more_stages_than_layers_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"num_stages=5: the model has 4 layers"):
        split_layers([1] * 4, 0, 5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_explicit_sizes_are_kept(sizes):
    ranges = explicit_layers(sizes, sum(sizes))
    assert [last - first for first, last in ranges] == sizes
    assert ranges[-1][1] == sum(sizes)


def test_explicit_sizes_that_miss_the_layers_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"\[3, 4\]: adds up to 7 layers.*model has 8"):
        explicit_layers([3, 4], 8)


def stage(stage_id, max_kv_blocks, kv_block_bytes=1024):
    return StageInfo(
        stage_id=stage_id,
        node="host",
        first_layer=4 * stage_id,
        last_layer=4 * stage_id + 4,
        num_parameters=1_000_000,
        weight_bytes=4 * 2**20,
        kv_block_bytes=kv_block_bytes,
        max_kv_blocks=max_kv_blocks,
        attention="C++ operator",
    )


def test_the_pipeline_has_the_blocks_of_its_tightest_stage():
    stages = [stage(0, 9), stage(1, 7), stage(2, 8)]
    assert size_kv_cache(stages, block_size=16, max_model_len=100) == 7


def test_a_cache_that_holds_exactly_one_longest_sequence_is_enough():
    assert size_kv_cache([stage(0, 7)], block_size=16, max_model_len=112) == 7


def test_a_cache_too_small_for_the_longest_sequence_is_refused_with_the_numbers():
    message = r"max_model_len=113 tokens needs 8 blocks of 16, that is 8192 bytes on stage 1"
    with pytest.raises(ConfigError, match=message):
        size_kv_cache([stage(0, 9), stage(1, 7)], block_size=16, max_model_len=113)


def test_a_stage_is_described_by_layers_weights_blocks_and_attention():
    line = describe_stage(stage(1, 7))
    assert line == (
        "stage 1 on host: layers 4-7, 1,000,000 parameters in 4.0 MiB, room for 7 KV blocks of "
        "1.0 KiB, attention: C++ operator"
    )
