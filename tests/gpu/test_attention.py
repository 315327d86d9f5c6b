"""Each implementation of attention computes on the card what the definition says."""

from dataclasses import replace

import pytest
import torch

from gllm_ray.errors import ConfigError
from gllm_ray.model.attention.backend import (
    AttentionSetting,
    choose_attention,
    find_gpu,
)
from gllm_ray.model.attention.reference import paged_attention
from tests.gpu.cards import CARD, needs_gpu
from tests.unit.model.attention_problems import Case, Problem

pytestmark = needs_gpu

PLAIN = Case(
    [(2000, 1), (150, 1), (3, 1), (40, 300), (0, 9), (700, 65)],
    block_size=64,
    num_kv_heads=2,
    group=4,
    key_width=128,
    value_width=128,
    window=None,
    softcap=None,
    has_sinks=False,
    seed=0,
)
DECODES = replace(PLAIN, sequences=[(4000, 1), (1, 1), (64, 1), (300, 1)])
# As wide as DeepSeek's, and as many heads.
LATENTS = replace(
    PLAIN, num_kv_heads=1, group=128, key_width=576, value_width=512, caches_latents=True
)
CASES = {
    "plain": PLAIN,
    "decodes": DECODES,
    "one decode": replace(PLAIN, sequences=[(9000, 1)]),
    "small blocks": replace(PLAIN, block_size=16),
    "heads of 64": replace(PLAIN, key_width=64, value_width=64),
    "heads of 80": replace(PLAIN, key_width=80, value_width=80),
    "heads of 256": replace(PLAIN, key_width=256, value_width=256),
    "no groups": replace(PLAIN, group=1, num_kv_heads=8),
    "one KV head": replace(PLAIN, group=71, num_kv_heads=1, key_width=64, value_width=64),
    "latents": LATENTS,
    "latents, decodes": replace(LATENTS, sequences=DECODES.sequences),
    "window": replace(PLAIN, window=100),
    "window, decodes": replace(DECODES, window=1000),
    "soft cap": replace(PLAIN, softcap=30.0),
    "sinks": replace(PLAIN, has_sinks=True),
    "sinks, decodes": replace(DECODES, has_sinks=True),
}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def make_backend(name, problem, dtype):
    geometry = replace(
        problem.cache.geometry,
        has_softcap=problem.case.softcap is not None,
        has_sinks=problem.case.has_sinks,
    )
    setting = AttentionSetting(
        gpu=find_gpu(CARD),
        dtype=dtype,
        geometries=(geometry,),
        block_size=problem.case.block_size,
    )
    try:
        return choose_attention(name, setting)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["triton", "flash3", "xformers", "torch"])
def test_each_implementation_equals_the_reference_in_float32(name, dtype, case):
    problem = Problem(case, dtype, case.key_width**-0.5, CARD, slots_first=True)
    backend = make_backend(name, problem, dtype)
    output = problem.paged(backend.attend).float()
    exact = Problem(case, torch.float32, case.key_width**-0.5, CARD, slots_first=True)
    for name_ in ("keys", "values"):  # the same numbers, as rounded to `dtype`
        setattr(exact, name_, [tensor.float() for tensor in getattr(problem, name_)])
    exact.query = problem.query.float()
    exact.rule = problem.rule
    exact.write_past()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output, exact.paged(paged_attention), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_our_kernel_writes_keys_and_values_where_the_reference_does(dtype):
    problem, expected = (Problem(PLAIN, dtype, 1.0, CARD, slots_first=True) for _ in range(2))
    backend = make_backend("triton", problem, dtype)
    num_rows = problem.query.shape[1]
    keys, values = torch.randn(2, num_rows, 2, 128, device=CARD).to(dtype).transpose(1, 2)
    backend.write(problem.cache, problem.inputs.slot_mapping, keys, values)
    expected.cache.write(problem.inputs.slot_mapping, keys, values)
    for written, wanted in (
        (problem.cache.keys, expected.cache.keys),
        (problem.cache.values, expected.cache.values),
    ):
        torch.testing.assert_close(written, wanted, atol=0, rtol=0, equal_nan=True)
