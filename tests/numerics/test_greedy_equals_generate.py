"""Greedy tokens equal those of transformers' `generate`, however the work is cut up."""

import itertools

import pytest

from gllm_ray.messages import SamplingParams
from gllm_ray.policy_config import ChunkedPrefillConfig, TokenThrottlingConfig
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.numerics.models import CONFIGS, MAX_TOKENS, WINDOW
from tests.numerics.serving import WHOLE, chunks_of, run, service_config

DEPTHS = (1, 2, 4)
POLICIES = {"whole": WHOLE, "sevens": chunks_of(7), "threes": chunks_of(3)}
IN_FULL = ("llama", "gemma2", "deepseek_v3")  # plain; windows and soft caps; latents and experts
all_models = pytest.mark.parametrize("name", CONFIGS)
all_depths = pytest.mark.parametrize("num_stages", DEPTHS)


def cells(*axes):
    """Every model, depth and chunk, with the ring and without; of most models the half is slow.

    What remains of them has the ring with every depth and every chunk, as it has its absence.
    """
    found = []
    for index, name in enumerate(CONFIGS):
        for place, values in enumerate(itertools.product(*axes)):
            for ring in (False, True):
                is_short = name in IN_FULL or ring == (index + place) % 2
                marks = () if is_short else pytest.mark.slow
                label = "-".join([name, *map(str, values), *["ring"] * ring])
                found.append(pytest.param(name, *values, ring, marks=marks, id=label))
    return found


@all_models
def test_continuations_under_test_have_several_distinct_tokens(name, small_model):
    for tokens in small_model(name).continuations:
        assert len(tokens) == MAX_TOKENS
        assert len(set(tokens)) >= 3


@pytest.mark.parametrize(("name", "num_stages", "chunks", "ring"), cells(DEPTHS, POLICIES))
def test_tokens_equal_generate_for_any_stages_and_chunks(
    name, num_stages, chunks, ring, small_model, local_pipeline
):
    model, policy = small_model(name), POLICIES[chunks]
    pipeline = local_pipeline(name, num_stages)
    result = run(pipeline, model.prompts, MAX_TOKENS, policy=policy, ring=ring)
    assert result.tokens == model.continuations
    assert any(batch.continues is not None for batch in result.batches) == ring
    if policy is not WHOLE:
        assert any(_is_mixed(batch) for batch in result.batches)


@pytest.mark.parametrize(("name", "num_stages", "ring"), cells(DEPTHS))
def test_tokens_equal_generate_under_preemption(
    name, num_stages, ring, small_model, local_pipeline
):
    model = small_model(name)
    result = run(
        local_pipeline(name, num_stages),
        model.prompts,
        MAX_TOKENS,
        policy=chunks_of(7),
        num_blocks=12,
        ring=ring,
    )
    assert result.num_preemptions > 0
    assert result.tokens == model.continuations


@all_depths
@pytest.mark.parametrize("num_blocks", [None, 12], ids=["roomy", "squeezed"])
@pytest.mark.parametrize(
    "policy",
    [
        TokenThrottlingConfig(),
        TokenThrottlingConfig(kv_threshold="adaptive", max_prefill_tokens=7, min_prefill_tokens=3),
        ChunkedPrefillConfig(),
        ChunkedPrefillConfig(token_budget=7, watermark=0.0),
    ],
    ids=["throttling", "adaptive", "chunked", "sevens"],
)
def test_tokens_equal_generate_for_any_policy(
    num_stages, num_blocks, policy, ring, small_model, local_pipeline
):
    model = small_model("llama")
    pipeline = local_pipeline("llama", num_stages)
    result = run(
        pipeline, model.prompts, MAX_TOKENS, policy=policy, num_blocks=num_blocks, ring=ring
    )
    assert result.tokens == model.continuations


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_tokens_do_not_depend_on_the_block_size(block_size, small_model):
    model = small_model("gemma2")
    pipeline = LocalPipeline.start(service_config(model.path, num_stages=2, block_size=block_size))
    result = run(pipeline, model.prompts, MAX_TOKENS, policy=chunks_of(5), block_size=block_size)
    assert result.tokens == model.continuations


def test_prompts_outgrow_the_sliding_window(small_model):
    prompts = small_model("mistral").prompts
    assert max(map(len, prompts)) > 2 * WINDOW


def test_sampled_tokens_depend_neither_on_stages_nor_on_chunks_nor_on_the_ring(
    small_model, local_pipeline
):
    prompts = small_model("llama").prompts
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
    results = [
        run(
            local_pipeline("llama", stages),
            prompts,
            MAX_TOKENS,
            policy=policy,
            sampling=sampling,
            ring=ring,
        )
        for stages, policy in [(1, WHOLE), (2, chunks_of(5)), (4, chunks_of(3))]
        for ring in (False, True)
    ]
    assert all(result.tokens == results[0].tokens for result in results)
    assert results[0].tokens != small_model("llama").continuations


def _is_mixed(batch) -> bool:
    lengths = [seq.num_scheduled_tokens for seq in batch.sequences]
    return min(lengths) == 1 and max(lengths) > 1
