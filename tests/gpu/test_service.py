"""A pipeline on the card: graphs, sampling, memory."""

import warnings
from dataclasses import replace

import pytest
import torch

from gllm_ray.config import parse_service_config
from gllm_ray.messages import SamplingParams
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.gpu.cards import CARD, needs_gpu
from tests.numerics.models import CONFIGS, MAX_TOKENS
from tests.numerics.serving import chunks_of, run

pytestmark = needs_gpu


def start(path, *, num_stages=2, kv_cache=None, **model):
    """By default float32, so that greedy tokens can be compared with those of the CPU."""
    return LocalPipeline.start(
        parse_service_config(
            {
                "model": {"path": str(path), "max_model_len": 64, **model},
                "pipeline": {"num_stages": num_stages},
                "kv_cache": {"block_size": 4} | (kv_cache or {"kv_cache_bytes": "4MiB"}),
                "scheduler": {"max_decodes": 8},
            }
        )
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": True}, {"compile": True}],
    ids=["graphs", "eager", "compiled"],
)
def test_tokens_equal_generate_on_the_cpu(name, options, small_model):
    model = small_model(name)
    pipeline = start(model.path, **options)
    result = run(pipeline, model.prompts, MAX_TOKENS, policy=chunks_of(7))
    assert result.tokens == model.continuations


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_decodes_run_from_graphs(name, small_model):
    if name in ("gpt_oss", "qwen3_moe") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before Hopper torch waits for the device to multiply by experts")
    pipeline = start(small_model(name).path, dtype="bfloat16")
    assert all(worker._graphs is not None for worker in pipeline._workers)


def test_sampled_tokens_do_not_depend_on_graphs(small_model):
    model = small_model("llama")
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
    results = [
        run(
            start(model.path, enforce_eager=enforce_eager),
            model.prompts,
            MAX_TOKENS,
            sampling=sampling,
        )
        for enforce_eager in (False, True)
    ]
    assert results[0].tokens == results[1].tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_of_decodes_waits_for_the_device_once(temperature, small_model):
    (worker,) = start(small_model("llama").path, num_stages=1)._workers
    batch = worker._batch_in_block_0([1, 1, 1], 64)
    rule = SamplingParams(temperature=temperature, top_k=5)
    sequences = tuple(seq._replace(sampling=rule) for seq in batch.sequences)
    batch = replace(batch, sequences=sequences)
    worker.execute(batch, None)  # compiles what is not compiled yet
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            worker.execute(batch, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]


def test_the_kv_cache_takes_its_share_of_the_card_and_no_more(small_model):
    share = 0.3
    pipeline = start(
        small_model("llama").path, num_stages=1, kv_cache={"memory_utilization": share}
    )
    total = torch.cuda.get_device_properties(CARD).total_memory
    taken = torch.cuda.memory_allocated(CARD)
    (stage,) = pipeline.stages
    assert pipeline.num_blocks * stage.kv_block_bytes > 0.5 * share * total
    assert taken <= share * total
