"""On a GPU all that a stage computes stays there, and nothing waits for it but the drawn tokens."""

from dataclasses import replace

import pytest
import torch
from llguidance import grammar_from
from transformers import AutoConfig

from gllm_ray.config import parse_service_config
from gllm_ray.messages import LogitRules, MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model.attention.backend import AttentionSetting, Gpu, choose_attention
from gllm_ray.model.attention.latent_projection import LatentProjection
from gllm_ray.model.constraints import RunningGrammars
from gllm_ray.model.shard import Shard
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.model.weights import dummy_tensors
from gllm_ray.stages import worker as worker_module
from gllm_ray.stages.worker import StageWorker
from tests.numerics.models import CONFIGS, save_checkpoint
from tests.numerics.serving import service_config
from tests.unit.model.fake_gpu import DEVICE, fake_gpu

pytest.importorskip("triton")
from gllm_ray.model.attention import triton_kernels

HIDDEN_SIZE = 64
NUM_BLOCKS = 64
RULES = {
    "greedy": SamplingParams(),
    "every token": SamplingParams(temperature=0.7, seed=1),
    "likely tokens": SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, seed=1),
}


class Launches:
    """In place of a kernel: what it would be launched with lies on the GPU."""

    def __getitem__(self, _):
        return self.launch

    @staticmethod
    def launch(*args, **_):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        assert {tensor.device for tensor in tensors} == {DEVICE}


@pytest.fixture
def gpu(monkeypatch):
    for kernel in ("write", "attend", "combine"):
        monkeypatch.setattr(triton_kernels, kernel, Launches())
    return lambda: fake_gpu(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def save(name):
        path = tmp_path_factory.mktemp(name)
        save_checkpoint(name, path)
        return path

    return save


def load(path, stage_id):
    """One of two stages, on the CPU."""
    config = service_config(path, num_stages=2)
    layers = (0, 2) if stage_id == 0 else (2, 4)
    shard = Shard(AutoConfig.from_pretrained(path), layers, torch.bfloat16, torch.device("cpu"))
    with torch.inference_mode():
        shard.load(dummy_tensors(shard.parameters_to_load(), shard.dtype, shard.device))
        geometries = shard.probe(num_tokens=1, num_samples=1)
    worker = StageWorker(config, stage_id)
    worker._shard, worker._geometries, worker._max_model_len = shard, geometries, 64
    setting = AttentionSetting(
        gpu=Gpu((9, 0), 132),
        dtype=shard.dtype,
        geometries=tuple(geometries.values()),
        block_size=config.kv_cache.block_size,
    )
    worker._attention = choose_attention("auto", setting)
    return worker


def move(worker, gpu):
    gpu.take(worker._shard.model)
    worker._device = worker._shard.device = DEVICE
    worker._reserve(NUM_BLOCKS)


def sequence(seq_id, start, num_tokens, sampling, output=None):
    return ScheduledSequence(
        seq_id=seq_id,
        epoch=0,
        start=start,
        token_ids=(1,) * num_tokens,
        block_table=tuple(range(4 * seq_id, 4 * seq_id + 4)),
        sampling=sampling,
        output_token_ids=output,
    )


def hidden_states(worker, num_tokens):
    if worker.is_first:
        return None
    return torch.empty(num_tokens, HIDDEN_SIZE, dtype=worker.dtype, device=DEVICE)


@pytest.mark.parametrize("stage_id", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_micro_batch_stays_on_the_gpu_until_its_tokens_are_drawn(name, stage_id, gpu, checkpoint):
    worker = load(checkpoint(name), stage_id)
    chunks = (sequence(3, 4, 5, RULES["greedy"]), sequence(4, 0, 2, None))
    decodes = tuple(sequence(i, 5 + i, 1, rule) for i, rule in enumerate(RULES.values()))
    batch = MicroBatch(batch_id=0, sequences=decodes + chunks, block_copies=((1, 40),))
    with gpu() as card:
        move(worker, card)
        output = worker.execute(batch, hidden_states(worker, batch.num_tokens))
    if worker.is_last:
        assert output.token_ids == (0,) * 4
        assert card.num_waits == 1
    else:
        assert (output.device, output.shape) == (DEVICE, (batch.num_tokens, HIDDEN_SIZE))
        assert card.num_waits == 0


@pytest.mark.parametrize("stage_id", [0, 1])
def test_latents_that_are_expanded_stay_on_the_gpu(stage_id, gpu, checkpoint, monkeypatch):
    monkeypatch.setattr(LatentProjection, "min_expanded_rows", 5)
    expand, expanded = LatentProjection.expand, []
    monkeypatch.setattr(
        LatentProjection, "expand", lambda *args: expanded.append(args) or expand(*args)
    )
    test_a_micro_batch_stays_on_the_gpu_until_its_tokens_are_drawn(
        "deepseek_v3", stage_id, gpu, checkpoint
    )
    assert len(expanded) == 2 - stage_id  # in each layer, but of the last only a row is read


def test_a_micro_batch_that_draws_nothing_is_told_once_it_is_computed(gpu, checkpoint, monkeypatch):
    worker = load(checkpoint("llama"), 1)
    batch = MicroBatch(batch_id=0, sequences=(sequence(0, 4, 5, None),))
    with gpu() as card:
        monkeypatch.setattr(torch.cuda, "current_stream", card.stream)
        move(worker, card)
        output = worker.execute(batch, hidden_states(worker, 5))
    assert output.token_ids == ()
    assert card.num_waits == 1


@pytest.mark.parametrize("stage_id", [0, 1])
def test_decodes_from_graphs_stay_on_the_gpu(stage_id, gpu, checkpoint):
    worker = load(checkpoint("gemma2"), stage_id)
    batch = MicroBatch(
        batch_id=0, sequences=tuple(sequence(i, 5 + i, 1, RULES["greedy"]) for i in range(3))
    )
    with gpu() as card:
        move(worker, card)
        num_captured = 0

        def capture(function):
            nonlocal num_captured
            num_captured += 1
            function()
            assert card.num_waits == 0
            return function

        worker._graphs = worker._capture(capture, reserved_block=NUM_BLOCKS - 1)
        worker.execute(batch, hidden_states(worker, 3))
    assert num_captured == len(worker._graphs._replays)
    assert card.num_waits == (1 if worker.is_last else 0)


def test_what_is_told_of_tokens_and_what_a_grammar_rules_out_are_found_on_the_gpu(gpu, checkpoint):
    worker = load(checkpoint("llama"), 1)
    tokenizer = Tokenizer.load("package://gllm_ray/demo/model")
    worker._grammars = RunningGrammars(lambda: tokenizer.grammars)
    telling = replace(RULES["likely tokens"], num_logprobs=3)
    bound = replace(RULES["every token"], grammar=grammar_from("regex", "[a-c]+"))
    batch = MicroBatch(
        batch_id=0, sequences=(sequence(0, 5, 1, telling), sequence(1, 5, 1, bound, output=()))
    )
    with gpu() as card:
        move(worker, card)
        output = worker.execute(batch, hidden_states(worker, 2))
    assert len(output.logprobs[0].top) == 3
    assert card.num_waits == 4  # tokens; then a token's log probability, likeliest ids, theirs


def test_logit_rules_are_followed_on_the_gpu_and_nobody_waits_for_it(gpu, checkpoint):
    worker = load(checkpoint("llama"), 1)
    rules = LogitRules(
        end_token_ids=(1, 2),
        min_end=99,
        logit_bias=((3, 1.0),),
        repetition_penalty=1.1,
        presence_penalty=0.5,
    )
    sequences = tuple(
        sequence(i, 5, 1, replace(rule, logit_rules=rules), output=(4, i))
        for i, rule in enumerate([*RULES.values()] * 2)
    )
    batch = MicroBatch(batch_id=0, sequences=sequences)
    with gpu() as card:
        move(worker, card)
        output = worker.execute(batch, hidden_states(worker, len(sequences)))
    assert len(output.token_ids) == len(sequences)
    assert card.num_waits == 1


def test_stages_of_one_process_have_equal_shares_of_its_gpu(gpu, checkpoint, monkeypatch):
    total, share, weights = 10**8, 0.4, 10**7
    held = 0

    def load_weights(*_):
        nonlocal held
        held += weights

    path = checkpoint("llama")
    config = parse_service_config(
        {
            "model": {"path": str(path), "max_model_len": 64, "enforce_eager": True},
            "pipeline": {"device": "cuda", "num_stages": 2, "layers": [2, 2]},
            "kv_cache": {"block_size": 4, "memory_utilization": share},
            "scheduler": {"max_decodes": 4},
        }
    )
    loaded = [load(path, stage_id) for stage_id in range(2)]
    monkeypatch.setattr(
        worker_module, "Shard", lambda _, layers, *__: loaded[layers[0] // 2]._shard
    )
    monkeypatch.setattr(worker_module, "find_gpu", lambda _: Gpu((9, 0), 132))
    monkeypatch.setattr(Shard, "weight_bytes", weights)
    monkeypatch.setattr(StageWorker, "_load_weights", load_weights)
    for name, function in {
        "is_available": lambda: True,
        "set_device": lambda _: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _: None,
        "memory_allocated": lambda _: held,
        "max_memory_allocated": lambda _: held,
        "mem_get_info": lambda _: (total - held, total),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    with gpu() as card:
        for stage_id, worker in enumerate(loaded):
            move(worker, card)
            worker._shard.probe = lambda found=worker._geometries, **_: found
            stage = StageWorker(config, stage_id).load()
            assert stage.max_kv_blocks == (total * share - weights) // stage.kv_block_bytes
