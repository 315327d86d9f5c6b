"""Tokens drawn where some are ruled out equal those of `generate`, however the work is cut up."""

import functools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from gllm_ray.messages import LogitRules, SamplingParams
from tests.numerics.models import MAX_TOKENS
from tests.numerics.serving import chunks_of, run

VOCAB_SIZE = 128
both_models = pytest.mark.parametrize("name", ["llama", "gemma2"])
WAYS = {
    "whole": {},
    "threes": {"policy": chunks_of(3)},
    "preempted": {"policy": chunks_of(7), "num_blocks": 12},
}
# Where bad words begin in what the model would say to each prompt, and how long they are.
CUTS = {"a token": (1, 1), "three tokens": (4, 3), "an even token": None}


class OfTheOutput(LogitsProcessor):
    """What a processor does that is told of the output alone, and as if there were much of it."""

    def __init__(self, processor, num_prompt_tokens):
        self._processor = processor
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids, scores):
        output = input_ids[:, self._num_prompt_tokens :]
        before = torch.full((len(output), 4), VOCAB_SIZE)
        return self._processor(torch.cat([before, output], dim=1), scores)


def rules_of(model, kind):
    """The rules, and the processor of transformers that does the same."""
    if CUTS[kind] is None:
        odd = list(range(1, VOCAB_SIZE, 2))
        even = tuple(range(0, VOCAB_SIZE, 2))
        return LogitRules(allowed_token_ids=even), SuppressTokensLogitsProcessor(odd)
    start, length = CUTS[kind]
    words = {tuple(said[start : start + length]) for said in model.continuations}
    processor = NoBadWordsLogitsProcessor([list(word) for word in words])
    return LogitRules(bad_words=tuple(sorted(words))), processor


@pytest.fixture(scope="module")
def generated(small_model):
    """What `generate` says to each prompt alone, by such a processor."""

    @functools.cache
    def make(name, kind):
        model = AutoModelForCausalLM.from_pretrained(small_model(name).path, dtype=torch.float32)
        _, processor = rules_of(small_model(name), kind)

        def go_on(prompt):
            ids = torch.tensor([prompt])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                logits_processor=[OfTheOutput(processor, len(prompt))],
            )
            return output[0, len(prompt) :].tolist()

        return [go_on(prompt) for prompt in small_model(name).prompts]

    return make


@both_models
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CUTS)
def test_greedy_tokens_are_those_of_generate(
    name, num_stages, way, kind, ring, small_model, local_pipeline, generated
):
    model = small_model(name)
    rules, _ = rules_of(model, kind)
    options = {"sampling": SamplingParams(logit_rules=rules), "ring": ring, **WAYS[way]}
    result = run(local_pipeline(name, num_stages), model.prompts, MAX_TOKENS, **options)
    assert result.tokens == generated(name, kind)
    assert all(
        after != plain for after, plain in zip(result.tokens, model.continuations, strict=True)
    )
    assert (result.num_preemptions > 0) == (way == "preempted")


@both_models
def test_sampled_tokens_do_not_depend_on_stages_chunks_preemption_or_the_ring(
    name, small_model, local_pipeline
):
    """Of eight tokens every pair that grows is bad, so that none of them follows a lesser one."""
    few = range(8, 16)
    rules = LogitRules(
        allowed_token_ids=tuple(few),
        bad_words=tuple((first, second) for first in few for second in few if first < second),
    )
    sampling = SamplingParams(temperature=5.0, seed=7, logit_rules=rules)
    results = [
        run(
            local_pipeline(name, num_stages),
            small_model(name).prompts,
            MAX_TOKENS,
            sampling=sampling,
            ring=ring,
            **WAYS[way],
        ).tokens
        for num_stages in (1, 2)
        for way in WAYS
        for ring in (False, True)
    ]
    assert all(tokens == results[0] for tokens in results)
    for output in results[0]:
        assert len(output) == MAX_TOKENS
        assert set(output) <= set(few)
        assert output == sorted(output, reverse=True)
    assert len({tuple(output) for output in results[0]}) > 1
