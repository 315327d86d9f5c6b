"""Paged attention equals dense attention over each sequence alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.model.attention import reference
from gllm_ray.model.attention.reference import paged_attention
from tests.unit.model.attention_problems import Case, Problem

cases = st.builds(
    Case,
    sequences=st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([1, 1, 2, 7])), min_size=1, max_size=5
    ),
    block_size=st.sampled_from([1, 3, 4, 16]),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    key_width=st.sampled_from([4, 6]),
    value_width=st.sampled_from([4, 8]),
    window=st.sampled_from([None, 1, 5, 100]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(cases)
@settings(deadline=None, max_examples=150)
def test_paged_attention_equals_dense_softmax(case):
    problem = Problem(case)
    torch.testing.assert_close(
        problem.paged(paged_attention).double(), problem.dense(), atol=1e-5, rtol=1e-5
    )


@given(cases)
@settings(deadline=None, max_examples=30)
def test_a_small_workspace_changes_nothing(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_MAX_WORKSPACE", 16)
        problem = Problem(case)
        torch.testing.assert_close(
            problem.paged(paged_attention).double(), problem.dense(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_the_definition(dtype):
    case = Case([(20, 1), (5, 1), (9, 7)], 4, 2, 2, 6, 8, 5, None, False, 0)
    problem = Problem(case, dtype)
    output = problem.paged(paged_attention)
    assert output.dtype is dtype
    torch.testing.assert_close(output.double(), problem.dense(), atol=3e-2, rtol=3e-2)
