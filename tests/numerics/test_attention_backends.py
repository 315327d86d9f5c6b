"""Greedy tokens equal those of `generate` with either implementation of attention on CPU."""

import pytest
import torch

from gllm_ray.model.attention.backend import AttentionBackend, choose_attention
from gllm_ray.stages import worker
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.numerics.models import CONFIGS, MAX_TOKENS
from tests.numerics.serving import chunks_of, run, service_config


@pytest.fixture(params=["operator", "torch"])
def attention(request, monkeypatch):
    if request.param == "torch":
        backend = AttentionBackend("torch")
        monkeypatch.setattr(worker, "choose_attention", lambda *_: backend)
    elif "because" in (description := _description()):
        pytest.skip(description)
    return request.param


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_equal_generate_with_either_attention(name, attention, small_model):
    model = small_model(name)
    pipeline = LocalPipeline.start(service_config(model.path, num_stages=2))
    is_latent = name == "deepseek_v3"
    for stage in pipeline.stages:
        assert (attention == "operator" and not is_latent) == (stage.attention == "C++ operator")
    result = run(pipeline, model.prompts, MAX_TOKENS, policy=chunks_of(7))
    assert result.tokens == model.continuations


def _description() -> str:
    return choose_attention(torch.device("cpu"), torch.float32, ()).description
