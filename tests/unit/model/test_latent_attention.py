"""Attention over cached latents is that over the keys and values they stand for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from gllm_ray.model.attention import latent_attention
from gllm_ray.model.attention.cpp_attention import OperatorAttention
from gllm_ray.model.attention.latent_attention import attend_latents
from gllm_ray.model.attention.latent_projection import cache_latents, find_projection
from gllm_ray.model.attention.reference import paged_attention
from gllm_ray.model.linear import quantize_linears, speed_up_linears
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators
from tests.unit.model.attention_problems import Case, Problem

HEADS, RANK, PLAIN, ROTARY, VALUE = 6, 32, 12, 8, 10


class Attention(DeepseekV3Attention):
    """What DeepSeek's attention makes keys and values with, and nothing else of it."""

    def __init__(self, seed: int = 0, *, bias: bool = False) -> None:
        nn.Module.__init__(self)
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = PLAIN, ROTARY, VALUE
        torch.manual_seed(seed)
        self.kv_b_proj = nn.Linear(RANK, HEADS * (PLAIN + VALUE), bias=bias)
        self.kv_b_proj.requires_grad_(requires_grad=False)


def latents_of(attention: nn.Module):
    cache_latents(attention)
    projection = find_projection(attention)
    assert projection is not None
    return projection


def solve(case: Case, paged, dtype=torch.float32):
    """The output over latents, and by the definition over expanded keys and values."""
    attention = Attention(case.seed).to(dtype)
    expand = DeepseekV3Attention.expand_kv.__get__(attention)
    problem = Problem(case, dtype, scale=(PLAIN + ROTARY) ** -0.5)
    problem.query = torch.randn(HEADS, problem.query.shape[1], PLAIN + ROTARY).to(dtype)
    expanded = [expand(*keys[None].split([RANK, ROTARY], dim=-1)) for keys in problem.keys]
    projection = latents_of(attention)
    geometry = replace(problem.cache.geometry, latent=projection)
    problem.cache = replace(problem.cache, geometry=geometry)
    output = problem.paged(lambda *args: attend_latents(paged, *args))
    definition = SimpleNamespace(
        case=replace(case, num_kv_heads=HEADS, group=1),
        keys=[keys[0] for keys, _ in expanded],
        values=[values[0] for _, values in expanded],
        query=problem.query,
        rule=problem.rule,
    )
    return output, Problem.dense(definition)


# Below, at, and above the rows from which on latents are expanded: 17 here.
counts = st.sampled_from([1, 1, 2, 16, 17, 40])
cases = st.builds(
    Case,
    sequences=st.lists(st.tuples(st.integers(0, 70), counts), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 5, 16, 64]),
    num_kv_heads=st.just(1),
    group=st.just(HEADS),
    key_width=st.just(RANK + ROTARY),
    value_width=st.just(RANK),
    window=st.sampled_from([None, None, 5, 64]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 1000),
    caches_latents=st.just(True),
)
MIXED = Case(
    [(9, 1), (50, 30), (60, 1), (3, 9)],
    *(16, 1, HEADS, RANK + ROTARY, RANK, None, None, False, 0),
    caches_latents=True,
)


def operator_attention():
    try:
        return OperatorAttention(load_operators()).attend
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))


def test_expanding_pays_once_it_saves_more_products_than_it_takes():
    projection = latents_of(Attention())
    num_rows, num_keys = projection.min_expanded_rows, 1000
    expanding = num_keys * RANK * (PLAIN + VALUE)
    few, many = (RANK + ROTARY + RANK) * num_keys, (PLAIN + ROTARY + VALUE) * num_keys
    assert (num_rows - 1) * few < expanding + (num_rows - 1) * many
    assert num_rows * few >= expanding + num_rows * many
    assert num_rows == 17


@given(case=cases)
@settings(deadline=None, max_examples=15)
def test_latents_give_what_the_keys_and_values_of_all_heads_give(case):
    output, expected = solve(case, paged_attention)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


@given(case=cases)
@settings(deadline=None, max_examples=15)
def test_the_operator_attends_to_latents_and_to_what_they_are_expanded_to(case):
    output, expected = solve(case, operator_attention())
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_errs_by_its_rounding():
    output, expected = solve(MIXED, paged_attention, torch.bfloat16)
    torch.testing.assert_close(output.double(), expected, atol=3e-2, rtol=3e-2)


def test_heads_are_expanded_as_many_at_a_time_as_the_workspace_holds(monkeypatch):
    whole, _ = solve(MIXED, paged_attention)
    asked = []

    def paged(query, cache, *rest):
        asked.append((len(query), cache.keys.numel() + cache.values.numel()))
        return paged_attention(query, cache, *rest)

    workspace = 2 * 80 * (PLAIN + ROTARY + VALUE)  # two heads of the 80 positions
    monkeypatch.setattr(latent_attention, "_MAX_WORKSPACE", workspace)
    output, _ = solve(MIXED, paged)
    torch.testing.assert_close(output, whole)
    few, *many = asked
    assert few[0] == HEADS
    assert many == [(2, workspace)] * 3


class OtherWay(Attention):
    def expand_kv(self, kv_nope, k_rot):
        return DeepseekV3Attention.expand_kv(self, kv_nope, -k_rot)


@pytest.mark.parametrize(
    "attention", [OtherWay(), Attention(bias=True), nn.Linear(2, 2)], ids=["code", "bias", "none"]
)
def test_attention_that_makes_keys_in_another_way_keeps_doing_so(attention):
    cache_latents(attention)
    assert find_projection(attention) is None
    assert "expand_kv" not in vars(attention)


def test_the_matrices_stay_as_they_are_where_others_are_packed_or_quantized():
    model = nn.ModuleDict({"attention": Attention(), "mlp": nn.Linear(256, 256)})
    projection = latents_of(model["attention"])
    weight = projection.linear.weight
    quantize_linears(model)
    try:
        speed_up_linears(model)
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))
    assert projection.linear.weight is weight
    assert not hasattr(model["mlp"], "weight")
