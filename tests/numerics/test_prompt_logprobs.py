"""The log probabilities of prompts are those that transformers computes, however they are cut."""

import functools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from gllm_ray.model import logprobs, prompt_scoring
from gllm_ray.model.checkpoint import find_directory
from gllm_ray.model.prompt_logprobs import read_prompt_logprobs
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.numerics.models import CONFIGS, MAX_TOKENS
from tests.numerics.serving import chunks_of, run, run_rounds, service_config

NUM_LIKELY = 5
DEMO_MODEL = "package://gllm_ray/demo/model"
all_depths = pytest.mark.parametrize("num_stages", [1, 2])
WAYS = {
    "whole": {},
    "sevens": {"policy": chunks_of(7)},
    "ones": {"policy": chunks_of(1)},
    "preempted": {"policy": chunks_of(7), "num_blocks": 12},
}


@pytest.fixture(scope="session")
def expected(small_model):
    """The log probabilities of every token after each token of a prompt, by transformers."""

    @functools.cache
    def load(name):
        path = find_directory(DEMO_MODEL) if name == "demo" else small_model(name).path
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def log_probs(name, prompt):
        with torch.inference_mode():
            return load(name)(torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)

    return log_probs


@pytest.fixture(scope="session")
def demo_pipeline():
    @functools.cache
    def start(num_stages):
        config = service_config(DEMO_MODEL, num_stages=num_stages, dtype="float32")
        return LocalPipeline.start(config)

    return start


def check(result, prompts, log_probs):
    """Each prompt was told of once, and rightly."""
    assert len(result.prompt_logprobs) == len(prompts)
    for told, prompt in zip(result.prompt_logprobs, prompts, strict=True):
        (packed,) = told
        rows = log_probs(prompt)
        scores = read_prompt_logprobs(packed, len(prompt) - 1)
        assert len(scores) == len(prompt) - 1
        for score, token_id, row in zip(scores, prompt[1:], rows, strict=True):
            assert score.logprob == pytest.approx(row[token_id].item(), abs=2e-3)
            near = (row > row[token_id] + 1e-3).sum(), (row > row[token_id] - 1e-3).sum()
            assert near[0] < score.rank <= near[1]
            likely = [logprob for _, logprob in score.top]
            assert likely == pytest.approx(row.topk(NUM_LIKELY).values.tolist(), abs=2e-3)
            of_ids = row[[token_id for token_id, _ in score.top]].tolist()
            assert likely == pytest.approx(of_ids, abs=2e-3)


@all_depths
@pytest.mark.parametrize("way", WAYS)
def test_those_of_a_model_are_transformers_own(
    num_stages, way, ring, small_model, local_pipeline, expected
):
    model = small_model("llama")
    pipeline = local_pipeline("llama", num_stages)
    options = {"num_prompt_logprobs": NUM_LIKELY, "ring": ring, **WAYS[way]}
    result = run(pipeline, model.prompts, MAX_TOKENS, **options)
    check(result, model.prompts, functools.partial(expected, "llama"))
    assert result.tokens == model.continuations
    assert (result.num_preemptions > 0) == (way == "preempted")


@pytest.mark.parametrize("name", CONFIGS)
def test_those_of_every_architecture_are_transformers_own(
    name, small_model, local_pipeline, expected
):
    """Some scale or cap their logits."""
    prompts = small_model(name).prompts
    result = run(
        local_pipeline(name, 2), prompts, 3, num_prompt_logprobs=NUM_LIKELY, policy=chunks_of(5)
    )
    check(result, prompts, functools.partial(expected, name))


@all_depths
def test_those_of_the_demo_model_are_transformers_own(num_stages, ring, demo_pipeline, expected):
    prompts = [list(range(7, 47)), [5], [9, 9, 9, 300, 20, 21]]
    options = {"num_prompt_logprobs": NUM_LIKELY, "ring": ring, "policy": chunks_of(16)}
    result = run(demo_pipeline(num_stages), prompts, 2, **options)
    check(result, prompts, functools.partial(expected, "demo"))


@pytest.mark.parametrize("max_rows", [1, 3])
def test_those_of_a_few_rows_at_a_time_are_those_of_all(
    max_rows, monkeypatch, small_model, local_pipeline, expected
):
    prompts = small_model("llama").prompts
    sizes = []
    score = prompt_scoring._score

    def spy(logits, *args):
        sizes.append(len(logits))
        return score(logits, *args)

    monkeypatch.setattr(prompt_scoring, "_MAX_ROWS", max_rows)
    monkeypatch.setattr(prompt_scoring, "_score", spy)
    monkeypatch.setattr(logprobs, "_MAX_WORKSPACE", 2 * 128)
    result = run(local_pipeline("llama", 1), prompts, 1, num_prompt_logprobs=NUM_LIKELY)
    check(result, prompts, functools.partial(expected, "llama"))
    assert max(sizes) == max_rows


def test_a_prompt_that_is_told_of_reads_no_cache_and_may_be_read(
    ring, small_model, local_pipeline, expected
):
    model = small_model("llama")
    prompts, pipeline = model.prompts, local_pipeline("llama", 2)
    options = {"num_prompt_logprobs": NUM_LIKELY, "ring": ring, "policy": chunks_of(7)}
    result = run_rounds(pipeline, [prompts] * 2, MAX_TOKENS, **options)
    check(result, prompts * 2, functools.partial(expected, "llama"))
    assert result.num_prefix_hit_tokens == 0
    assert result.tokens == model.continuations * 2
    # As the outputs of one prompt do: one asks, and the others read what it writes.
    pairs = [prompt for prompt in prompts for _ in range(2)]
    silent = frozenset(range(1, len(pairs), 2))
    result = run(pipeline, pairs, MAX_TOKENS, silent=silent, **options)
    assert result.prompt_logprobs[1::2] == [[]] * len(prompts)
    told = replace(result, prompt_logprobs=result.prompt_logprobs[::2])
    check(told, prompts, functools.partial(expected, "llama"))
    assert result.num_prefix_hit_tokens == sum(len(prompt) - 1 for prompt in prompts)
    assert result.tokens[::2] == result.tokens[1::2] == model.continuations
