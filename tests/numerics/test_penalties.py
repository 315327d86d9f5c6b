"""Tokens drawn with penalties equal those of `generate`, however the work is cut up."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from gllm_ray.messages import LogitRules, SamplingParams
from tests.numerics.models import MAX_TOKENS
from tests.numerics.serving import WHOLE, chunks_of, run, run_rounds

PENALTY = 1.3
REPETITION = SamplingParams(logit_rules=LogitRules(repetition_penalty=PENALTY))
# Frequent draws of few tokens, so that each of the penalties matters.
ALL = SamplingParams(
    temperature=0.8,
    top_k=8,
    seed=7,
    logit_rules=LogitRules(
        logit_bias=((9, 3.0), (11, -2.0)),
        repetition_penalty=0.9,
        frequency_penalty=0.6,
        presence_penalty=-0.4,
    ),
)
both_models = pytest.mark.parametrize("name", ["llama", "gemma2"])
all_depths = pytest.mark.parametrize("num_stages", [1, 2])
WAYS = {
    "whole": {},
    "threes": {"policy": chunks_of(3)},
    "preempted": {"policy": chunks_of(7), "num_blocks": 12},
}
all_ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def generated(small_model):
    """What `generate` says to each prompt alone, with a repetition penalty."""

    @functools.cache
    def make(name):
        model = AutoModelForCausalLM.from_pretrained(small_model(name).path, dtype=torch.float32)

        def go_on(prompt):
            ids = torch.tensor([prompt])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                repetition_penalty=PENALTY,
            )
            return output[0, len(prompt) :].tolist()

        return [go_on(prompt) for prompt in small_model(name).prompts]

    return make


@both_models
@all_depths
@all_ways
def test_greedy_tokens_with_a_repetition_penalty_are_those_of_generate(
    name, num_stages, way, ring, small_model, local_pipeline, generated
):
    model = small_model(name)
    pipeline = local_pipeline(name, num_stages)
    options = {"sampling": REPETITION, "ring": ring, **WAYS[way]}
    result = run(pipeline, model.prompts, MAX_TOKENS, **options)
    assert result.tokens == generated(name)
    assert all(
        after != plain for after, plain in zip(result.tokens, model.continuations, strict=True)
    )
    assert (result.num_preemptions > 0) == (way == "preempted")


@both_models
@all_depths
def test_a_prompt_that_is_found_in_the_prefix_cache_counts_as_one_that_is_computed(
    name, num_stages, ring, small_model, local_pipeline, generated
):
    prompts = small_model(name).prompts
    options = {"sampling": REPETITION, "ring": ring, "policy": WHOLE}
    result = run_rounds(local_pipeline(name, num_stages), [prompts] * 2, MAX_TOKENS, **options)
    assert result.tokens == generated(name) * 2
    assert result.num_prefix_hit_tokens >= 8 + 16


@both_models
def test_sampled_tokens_do_not_depend_on_stages_chunks_preemption_or_the_ring(
    name, small_model, local_pipeline
):
    prompts = small_model(name).prompts
    results = [
        run(
            local_pipeline(name, num_stages),
            prompts,
            MAX_TOKENS,
            sampling=ALL,
            ring=ring,
            **WAYS[way],
        ).tokens
        for num_stages in (1, 2)
        for way in WAYS
        for ring in (False, True)
    ]
    assert all(tokens == results[0] for tokens in results)
    plain = SamplingParams(temperature=0.8, top_k=8, seed=7)
    assert results[0] != run(local_pipeline(name, 1), prompts, MAX_TOKENS, sampling=plain).tokens
