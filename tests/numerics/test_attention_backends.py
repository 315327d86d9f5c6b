"""Greedy tokens equal those of `generate` with each implementation of attention on CPU."""

import os

import pytest

from gllm_ray.model.attention.backend import AttentionBackend
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators
from gllm_ray.stages import worker
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.numerics.models import CONFIGS, MAX_TOKENS
from tests.numerics.serving import chunks_of, run, service_config

# Grouped heads; windows and soft caps; sinks; latents.
INTERPRETED_IN_SHORT = ("llama", "gemma2", "gpt_oss", "deepseek_v3")


def check_tokens(model, pipeline):
    result = run(pipeline, model.prompts, MAX_TOKENS, policy=chunks_of(7))
    assert result.tokens == model.continuations


@pytest.fixture(params=["cpp", "torch"])
def attention(request):
    if request.param == "cpp":
        try:
            load_operators()
        except OperatorsUnavailableError as error:
            pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_equal_generate_with_each_attention(name, attention, small_model):
    model = small_model(name)
    config = service_config(model.path, num_stages=2, attention_backend=attention)
    pipeline = LocalPipeline.start(config)
    for stage in pipeline.stages:
        assert stage.attention == {"cpp": "C++ operator", "torch": "torch"}[attention]
    check_tokens(model, pipeline)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in INTERPRETED_IN_SHORT else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_tokens_equal_generate_with_interpreted_triton_kernels(name, small_model, monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/gpu runs the kernels on the card")
    from gllm_ray.model.attention.triton_attention import TritonAttention

    kernels = TritonAttention(num_processors=4)
    backend = AttentionBackend("Triton kernels", kernels.attend, kernels.write)
    monkeypatch.setattr(worker, "choose_attention", lambda *_: backend)
    model = small_model(name)
    check_tokens(model, LocalPipeline.start(service_config(model.path, num_stages=2)))
