"""The Triton kernels, in Triton's interpreter, compute what the reference computes."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.messages import MicroBatch, ScheduledSequence
from gllm_ray.model.attention.reference import paged_attention
from gllm_ray.model.inputs import pack
from tests.unit.model.attention_problems import CPU, Case, Problem, latents_in

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels on the card", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

from gllm_ray.model.attention.triton_attention import TritonAttention

# So many processors that the context of a lone decode is cut into parts, of several not.
TRITON = TritonAttention(num_processors=4)

# Both sides of every boundary: of a tile of rows, a tile of keys, a block and a part.
cases = st.builds(
    Case,
    sequences=st.lists(
        st.tuples(
            st.integers(0, 40) | st.integers(100, 300) | st.just(1100),
            st.sampled_from([1, 1, 1, 2, 5]) | st.integers(2, 70),
        ),
        min_size=1,
        max_size=4,
    ),
    block_size=st.sampled_from([1, 5, 16, 32, 64]),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 8, 13]),
    key_width=st.sampled_from([8, 20, 64, 80, 96, 128, 256]),
    value_width=st.sampled_from([8, 18, 64, 80, 128, 256]),
    window=st.sampled_from([None, None, 1, 5, 63, 64, 1000]),
    softcap=st.sampled_from([None, None, 2.0, 50.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
cases |= latents_in(cases)
MIXED = Case([(150, 1), (3, 1), (40, 70), (0, 9), (7, 1)], 16, 2, 3, 64, 64, None, None, True, 0)
LONG = Case([(1500, 1)], 16, 1, 4, 64, 64, None, None, False, 0)


@pytest.fixture(autouse=True, scope="module")
def bfloat16_products():
    """Triton 3.7's interpreter multiplies the bits of bfloat16 as if they were integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(tensor):
        if tensor.dtype.scalar is not tl.bfloat16:
            return tensor
        bits = tensor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def multiply(builder, a, b, *rest):
        return create_dot(builder, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)
        yield


def compare(problem, tolerance):
    expected = problem.paged(paged_attention)
    output = problem.paged(TRITON.attend)
    assert output.dtype is expected.dtype
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@given(case=cases, slots_first=st.booleans())
@settings(max_examples=25)
def test_kernels_equal_the_reference_in_float32(case, slots_first):
    compare(Problem(case, scale=case.key_width**-0.5, slots_first=slots_first), 2e-5)


@given(case=cases, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=15)
def test_kernels_equal_the_reference_in_half_precision(case, dtype):
    compare(Problem(case, dtype, scale=case.key_width**-0.5, slots_first=True), 3e-2)


def test_rounding_weights_to_bfloat16_is_the_largest_error():
    problem = Problem(MIXED, torch.bfloat16, scale=0.125)
    torch.testing.assert_close(
        problem.paged(TRITON.attend).double(), problem.dense(), atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize("num_processors", [1, 2, 4, 1000])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_long_context_may_be_cut_into_any_number_of_parts(num_processors, window, has_sinks):
    problem = Problem(replace(LONG, window=window, has_sinks=has_sinks), scale=0.125)
    attention = TritonAttention(num_processors)
    torch.testing.assert_close(
        problem.paged(attention.attend).double(), problem.dense(), atol=1e-5, rtol=1e-5
    )


def test_more_processors_cut_a_context_into_more_parts_but_not_into_crumbs():
    problem = Problem(LONG)

    def num_parts(num_processors, num_programs=1):
        attention = TritonAttention(num_processors)
        return attention._num_parts(num_programs, problem.cache, problem.inputs)

    assert [num_parts(1, 8), num_parts(1, 2), num_parts(1), num_parts(1000)] == [1, 2, 4, 5]
    short = Problem(replace(LONG, sequences=[(200, 1)]))
    assert TritonAttention(1000)._num_parts(1, short.cache, short.inputs) == 1


@pytest.mark.parametrize("size", [1e-30, 1.0, 300.0])
def test_large_and_small_scores_neither_overflow_nor_vanish(size):
    problem = Problem(replace(MIXED, has_sinks=False), scale=1.0)
    problem.query *= size
    output = problem.paged(TRITON.attend)
    torch.testing.assert_close(output.double(), problem.dense(), atol=1e-3, rtol=1e-3)


def test_queries_of_any_layout_are_read():
    problem = Problem(MIXED, scale=0.125)
    expected = problem.paged(TRITON.attend)
    query = problem.query
    for strided in (
        query.transpose(0, 1).contiguous().transpose(0, 1),
        query.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert strided.stride() != query.stride()
        problem.query = strided
        assert torch.equal(problem.paged(TRITON.attend), expected)


def test_sequences_may_share_blocks():
    problem = Problem(replace(LONG, sequences=[(100, 1)]), scale=0.125)
    table = tuple(problem.inputs.block_tables[0].tolist())
    problem.paged(TRITON.attend)  # writes the last position
    batch = MicroBatch(
        batch_id=0,
        sequences=tuple(
            ScheduledSequence(
                seq_id=start,
                epoch=0,
                start=start,
                token_ids=(0,) * count,
                block_table=table,
                sampling=None,
            )
            for start, count in ((100, 1), (47, 1), (60, 20), (0, 101))
        ),
    )
    inputs = pack(batch, problem.case.block_size, CPU)
    query = torch.randn(4, batch.num_tokens, 64)
    torch.testing.assert_close(
        TRITON.attend(query, problem.cache, inputs, problem.rule),
        paged_attention(query, problem.cache, inputs, problem.rule),
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_empty_batch_attends_to_nothing():
    problem = Problem(replace(MIXED, sequences=[], has_sinks=False), scale=1.0)
    assert problem.paged(TRITON.attend).shape == (0, 6, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots_first", [False, True])
@pytest.mark.parametrize("value_width", [64, 18])
def test_keys_and_values_are_written_at_their_slots_and_nowhere_else(
    dtype, slots_first, value_width
):
    case = replace(MIXED, value_width=value_width)
    cache, expected = (
        Problem(case, dtype, scale=1.0, slots_first=slots_first).cache for _ in range(2)
    )
    slots = torch.randperm(cache.keys.shape[1])[:9]
    keys, values = (
        torch.randn(9, 2, width).to(dtype).transpose(0, 1) for width in (64, value_width)
    )
    for new_keys in (keys, keys.contiguous(), keys.mT.contiguous().mT):
        TRITON.write(cache, slots, new_keys, values)
        expected.write(slots, new_keys, values)
        torch.testing.assert_close(cache.keys, expected.keys, atol=0, rtol=0, equal_nan=True)
        torch.testing.assert_close(cache.values, expected.values, atol=0, rtol=0, equal_nan=True)
