"""Compiled parts compute what they did, and are compiled once for all layers and row counts."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gllm_ray.model.compilation import compile_parts
from tests.numerics.models import CONFIGS

NUM_ROWS = (1, 7, 5, 12)


def logits(model, num_rows):
    tokens = torch.arange(num_rows)[None] * 5 % 128
    return model(input_ids=tokens).logits


def check(name, backend):
    torch.manual_seed(0)
    torch.compiler.reset()
    config = CONFIG_MAPPING[name.removesuffix("_tied")](**CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        expected = [logits(model, num_rows) for num_rows in NUM_ROWS]
        compile_parts(model, backend)
        for num_rows in NUM_ROWS[:2]:
            logits(model, num_rows)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled = [logits(model, num_rows) for num_rows in NUM_ROWS]
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
    return model


def compiled_kinds(model):
    parts = (module for module in model.modules() if "forward" in vars(module))
    return {type(part).__name__.removeprefix(type(model).__name__[:5]) for part in parts}


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2", "phimoe", "gpt_oss"])
def test_compiled_parts_compute_the_same_and_are_compiled_for_any_number_of_rows(name):
    model = check(name, "eager")
    assert any(kind.endswith("Norm") for kind in compiled_kinds(model))


def test_kernels_of_the_default_compiler_compute_the_same():
    assert compiled_kinds(check("llama", "inductor")) == {"RMSNorm", "MLP", "Attention"}
