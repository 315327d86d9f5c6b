"""The C++ attention operator computes what the reference computes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.model.attention.cpp_attention import OperatorAttention
from gllm_ray.model.attention.reference import paged_attention
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators
from tests.unit.model.attention_problems import Case, Problem, latents_in


@pytest.fixture(scope="module")
def operator():
    try:
        return OperatorAttention(load_operators())
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))


# Both sides of every boundary: of a vector, a tile of rows, a chunk of keys and a block.
cases = st.builds(
    Case,
    sequences=st.lists(
        st.tuples(
            st.integers(0, 40) | st.integers(100, 300),
            st.sampled_from([1, 1, 1, 2, 5]) | st.integers(2, 90),
        ),
        min_size=1,
        max_size=6,
    ),
    block_size=st.sampled_from([1, 5, 16, 32, 128]),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 8, 13]),
    key_width=st.sampled_from([8, 16, 20, 64, 80, 96, 128]),
    value_width=st.sampled_from([8, 16, 18, 64, 80, 128]),
    window=st.sampled_from([None, None, 1, 5, 63, 64, 1000]),
    softcap=st.sampled_from([None, None, 2.0, 50.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
cases |= latents_in(cases)
MIXED = Case([(150, 1), (3, 1), (40, 70), (0, 9), (7, 1)], 16, 2, 3, 64, 64, None, None, True, 0)


def compare(problem, operator, tolerance):
    expected = problem.paged(paged_attention)
    output = problem.paged(operator.attend)
    assert output.dtype is expected.dtype
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@given(case=cases)
@settings(deadline=None, max_examples=150)
def test_operator_equals_reference_in_float32(case, operator):
    compare(Problem(case, scale=case.key_width**-0.5), operator, 2e-5)


@given(case=cases)
@settings(deadline=None, max_examples=60)
def test_operator_equals_reference_in_bfloat16(case, operator):
    # The reference rounds its probabilities, which matters where values cancel each other out.
    compare(Problem(case, torch.bfloat16, scale=case.key_width**-0.5), operator, 6e-2)


def test_decodes_are_nearer_to_the_definition_than_bfloat16_can_tell(operator):
    decodes = [(start, count) for start, count in MIXED.sequences if count == 1]
    problem = Problem(replace(MIXED, sequences=decodes), torch.bfloat16, scale=0.125)
    error = (problem.paged(operator.attend).double() - problem.dense()).abs()
    assert (error <= 2**-8 * problem.dense().abs() + 1e-6).all()


def test_chunks_err_by_no_more_than_the_rounding_of_probabilities_and_outputs(operator):
    problem = Problem(MIXED, torch.bfloat16, scale=0.125)
    output, exact = problem.paged(operator.attend).double(), problem.dense()
    problem.values = [values.abs() for values in problem.values]
    rounding = 2**-8 * (exact.abs() + problem.dense())
    assert ((output - exact).abs() <= rounding + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_gives_the_same_bits_every_time_and_in_any_company(dtype, operator):
    problem = Problem(MIXED, dtype, scale=0.125)
    first = problem.paged(operator.attend)
    assert torch.equal(problem.paged(operator.attend), first)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(problem.paged(operator.attend), first)
    finally:
        torch.set_num_threads(num_threads)
    alone = Problem(replace(MIXED, sequences=MIXED.sequences[:1]), dtype, scale=0.125)
    alone.keys, alone.values = problem.keys[:1], problem.values[:1]
    alone.query, alone.rule = problem.query[:, :1], problem.rule
    alone.write_past()
    assert torch.equal(alone.paged(operator.attend), first[:1])


@pytest.mark.parametrize("size", [1e-30, 1.0, 300.0])
def test_large_and_small_scores_neither_overflow_nor_vanish(size, operator):
    problem = Problem(replace(MIXED, has_sinks=False), scale=1.0)
    problem.query *= size
    output = problem.paged(operator.attend)
    torch.testing.assert_close(output.double(), problem.dense(), atol=1e-3, rtol=1e-3)


def test_queries_of_any_layout_are_read(operator):
    problem = Problem(MIXED, scale=0.125)
    expected = problem.paged(operator.attend)
    query = problem.query
    for strided in (
        query.transpose(0, 1).contiguous().transpose(0, 1),
        query.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert strided.stride() != query.stride()
        problem.query = strided
        assert torch.equal(problem.paged(operator.attend), expected)


@pytest.mark.parametrize("attend", ["reference", "operator"])
def test_an_empty_batch_attends_to_nothing(attend, operator):
    problem = Problem(replace(MIXED, sequences=[], has_sinks=False), scale=1.0)
    output = problem.paged(paged_attention if attend == "reference" else operator.attend)
    assert output.shape == (0, 6, 64)


def test_half_precision_and_mixed_types_are_refused(operator):
    for dtype, cache_dtype in ((torch.float16, torch.float16), (torch.float32, torch.bfloat16)):
        problem = Problem(MIXED, cache_dtype, scale=math.nan)
        problem.query = problem.query.to(dtype)
        with pytest.raises(RuntimeError, match=r"type|float32 or bfloat16"):
            operator.attend(problem.query, problem.cache, problem.inputs, problem.rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_written_at_their_slots_and_nowhere_else(dtype, operator):
    cache, expected = (Problem(MIXED, dtype, scale=1.0).cache for _ in range(2))
    slots = torch.randperm(cache.keys.shape[1])[:9]
    new = torch.randn(2, 1, 9, 2, 64).to(dtype).transpose(2, 3)[:, 0]
    assert not new.is_contiguous()
    for keys, values in (new, new.flip(0).contiguous(), new.mT.contiguous().mT):
        operator.write(cache, slots, keys, values)
        expected.write(slots, keys, values)
        torch.testing.assert_close(cache.keys, expected.keys, atol=0, rtol=0, equal_nan=True)
        torch.testing.assert_close(cache.values, expected.values, atol=0, rtol=0, equal_nan=True)
