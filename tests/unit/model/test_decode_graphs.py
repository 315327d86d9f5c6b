"""Micro-batches filled up to the size of a graph give what they give without it."""

import os
import random

import pytest
import torch

from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model.attention.backend import AttentionBackend
from gllm_ray.model.decode_graphs import graph_sizes
from gllm_ray.stages.worker import StageWorker
from tests.numerics.models import save_checkpoint
from tests.numerics.serving import service_config

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu captures graphs on the card", allow_module_level=True)

from gllm_ray.model.attention.triton_attention import TritonAttention

BLOCK_SIZE, NUM_BLOCKS = 4, 24
BLOCKS_OF_SEQUENCE = 4
SIZES = (1, 2, 4, 6)
GREEDY = SamplingParams()


def run_anew(function):
    """In place of a CUDA graph: the same computation, from and to the same memory."""
    return function


@pytest.fixture(scope="module", params=[1, 2])
def stages(request, tmp_path_factory):
    """Two pipelines that hold the same, of which the second runs decodes at fixed sizes."""
    path = tmp_path_factory.mktemp("gemma2")
    save_checkpoint("gemma2", path)
    config = service_config(path, num_stages=request.param, block_size=BLOCK_SIZE)
    scheduler = config.scheduler.model_copy(update={"max_decodes": SIZES[-1]})
    config = config.model_copy(update={"scheduler": scheduler})
    kernels = TritonAttention(num_processors=4)
    pipelines = []
    for has_graphs in (False, True):
        workers = [StageWorker(config, stage_id) for stage_id in range(request.param)]
        for worker in workers:
            worker.load()
            worker._attention = AttentionBackend("Triton", kernels.attend, kernels.write)
            worker._reserve(NUM_BLOCKS + has_graphs)
            if has_graphs:
                worker._graphs = worker._capture(run_anew, reserved_block=NUM_BLOCKS)
        pipelines.append(workers)
    return pipelines


def poison(workers):
    for worker in workers:
        for cache in worker._caches.values():
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)


def sequence(seq_id, start, token_ids, sampling=GREEDY):
    first = seq_id * BLOCKS_OF_SEQUENCE
    end = first - (-(start + len(token_ids)) // BLOCK_SIZE)
    return ScheduledSequence(
        seq_id=seq_id,
        epoch=0,
        start=start,
        token_ids=tuple(token_ids),
        block_table=tuple(range(first, end)),
        sampling=sampling,
    )


def execute(workers, *sequences):
    """The sampled tokens, and the hidden states or logits of every stage."""
    outputs, hidden = [], None
    handle = workers[-1]._shard.model.lm_head.register_forward_hook(
        lambda _, __, logits: outputs.append(logits[0])
    )
    batch = MicroBatch(batch_id=0, sequences=sequences)
    for worker in workers:
        hidden = worker.execute(batch, hidden)
        outputs.append(hidden)
    handle.remove()
    tokens = outputs.pop()
    return tokens, outputs


def assert_same_kv(plain, padded):
    """Each block but the reserved one, NaN where nothing was written."""
    num_slots = NUM_BLOCKS * BLOCK_SIZE
    for ours, theirs in zip(plain, padded, strict=True):
        for expected, cache in zip(ours._caches.values(), theirs._caches.values(), strict=True):
            for name in ("keys", "values"):
                torch.testing.assert_close(
                    getattr(cache, name)[:, :num_slots],
                    getattr(expected, name),
                    atol=1e-5,
                    rtol=1e-4,
                    equal_nan=True,
                )


def test_rows_added_change_no_result_and_write_to_the_reserved_block_alone(stages):
    generator = random.Random(0)
    for workers in stages:
        poison(workers)
    prompts = [[generator.randrange(3, 128) for _ in range(n)] for n in (3, 9, 1, 5, 7, 4)]
    lengths = [len(prompt) for prompt in prompts]
    for seq_id, prompt in enumerate(prompts):
        for workers in stages:
            execute(workers, sequence(seq_id, 0, prompt))
    for num_rows in (3, 1, 5, 2):
        chosen = generator.sample(range(6), num_rows)
        decodes = [
            sequence(seq_id, lengths[seq_id], [generator.randrange(3, 128)]) for seq_id in chosen
        ]
        for seq_id in chosen:
            lengths[seq_id] += 1
        (expected, expected_outputs), (tokens, outputs) = (
            execute(workers, *decodes) for workers in stages
        )
        assert tokens == expected
        for output, wanted in zip(outputs, expected_outputs, strict=True):
            torch.testing.assert_close(output[:num_rows], wanted, atol=1e-4, rtol=1e-4)
        assert_same_kv(*stages)


def test_each_decode_runs_at_the_smallest_size_that_holds_it(stages):
    _, padded = stages
    graphs = padded[0]._graphs
    sizes = []
    replays = graphs._replays
    graphs._replays = {
        size: lambda size=size, replay=replay: sizes.append(size) or replay()
        for size, replay in replays.items()
    }
    for num_rows in range(1, 7):
        execute(padded, *(sequence(seq_id, 0, [5]) for seq_id in range(num_rows)))
    graphs._replays = replays
    assert sizes == [1, 2, 4, 4, 6, 6]


def test_only_sequences_with_a_sampling_rule_are_drawn_from(stages):
    results = [
        execute(
            workers, sequence(0, 0, [5], None), sequence(1, 0, [9]), sequence(2, 0, [70], None)
        )[0]
        for workers in stages
    ]
    assert results[0] == results[1]
    assert len(results[1].token_ids) == 1


def test_chunks_copies_and_larger_micro_batches_are_left_to_the_plain_forward_pass(stages):
    graphs = stages[1][0]._graphs
    decodes = tuple(sequence(seq_id, 3, [5]) for seq_id in range(6))
    assert graphs.takes(MicroBatch(batch_id=0, sequences=decodes))
    for sequences, copies in (
        ((*decodes[:2], sequence(3, 0, [5, 6])), ()),
        (decodes, ((0, 8),)),
        ((*decodes, sequence(0, 0, [5])), ()),
        ((), ()),
    ):
        batch = MicroBatch(batch_id=0, sequences=sequences, block_copies=copies)
        assert not graphs.takes(batch)


@torch.inference_mode()
def test_what_is_returned_outlives_the_next_micro_batch(stages):
    _, padded = stages
    first = padded[0]
    batches = [MicroBatch(batch_id=0, sequences=(sequence(0, 0, [token]),)) for token in (5, 9)]
    outputs = [first._graphs.run(batch, None, ()) for batch in batches]
    assert not torch.equal(*outputs)
    assert torch.equal(first._graphs.run(batches[0], None, ()), outputs[0])


@torch.inference_mode()
def test_graphs_of_all_sizes_share_the_memory_of_their_output(stages):
    for worker in stages[1]:
        outputs = [replay() for replay in worker._graphs._replays.values()]
        assert len({output.data_ptr() for output in outputs}) == 1


@pytest.mark.parametrize(
    ("max_decodes", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (6, SIZES),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
        (130, (1, 2, 4, 8, 16, 32, 64, 96, 128, 130)),
    ],
)
def test_sizes_double_to_32_and_then_grow_by_32(max_decodes, sizes):
    assert graph_sizes(max_decodes) == sizes
