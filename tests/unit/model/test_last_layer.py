"""The last layer computes no more than is read, and what is read is the same."""

from unittest import mock

import pytest
import torch

from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model import last_layer
from gllm_ray.stages.worker import StageWorker
from tests.numerics.models import CONFIGS, save_checkpoint
from tests.numerics.serving import service_config

BLOCK_SIZE = 4
MAX_BLOCKS = 4  # of a sequence


def batch_of(*sequences: tuple[int, int, bool], block_copies=()) -> MicroBatch:
    """A micro-batch of (start, tokens, whether one is drawn)."""
    return MicroBatch(
        batch_id=0,
        sequences=tuple(
            ScheduledSequence(
                seq_id=index,
                epoch=0,
                start=start,
                token_ids=tuple(3 + (index * 7 + start + i) % 40 for i in range(num_tokens)),
                block_table=tuple(range(index * MAX_BLOCKS, (index + 1) * MAX_BLOCKS)),
                sampling=SamplingParams() if is_drawn else None,
            )
            for index, (start, num_tokens, is_drawn) in enumerate(sequences)
        ),
        block_copies=block_copies,
    )


CONTEXTS = batch_of((0, 5, True), (0, 9, False), (0, 6, True))
MIXED = batch_of((5, 1, True), (9, 5, True), (6, 4, False), (0, 7, False), (0, 11, True))
NOTHING_DRAWN = batch_of((5, 3, False), (9, 5, False))
COPIED = batch_of((5, 1, True), (9, 3, True), (6, 8, False), block_copies=((1, 60), (6, 61)))
COPIED_UNDRAWN = batch_of((5, 3, False), (9, 5, False), block_copies=((5, 60), (0, 61)))


@pytest.fixture
def load(tmp_path):
    def load(name):
        save_checkpoint(name, tmp_path)
        worker = StageWorker(service_config(tmp_path, block_size=BLOCK_SIZE), 0)
        worker.load()
        worker.allocate_kv_cache(num_blocks=64)
        return worker

    return load


def run(worker, *batches):
    """The logits of each batch, and all keys and values at the end."""
    for cache in worker._caches.values():
        for rows in (cache.keys, cache.values):
            rows.zero_()
    logits = []
    with mock.patch("gllm_ray.stages.worker.draw_tokens") as draw:
        for batch in batches:
            worker.execute(batch, None)
            logits.append(draw.call_args.args[0])
    return logits, [(cache.keys.clone(), cache.values.clone()) for cache in worker._caches.values()]


def rows_of_mlps(worker):
    """Fills with the rows that the MLP of each layer is given."""
    rows = []
    for layer in worker._shard.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    return rows


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_keys_and_values_are_those_of_all_rows(name, load):
    worker = load(name)
    for batch in (MIXED, NOTHING_DRAWN, COPIED, COPIED_UNDRAWN):
        logits, caches = run(worker, CONTEXTS, batch)
        with mock.patch.object(last_layer, "rows_under_way", return_value=None):
            all_logits, all_caches = run(worker, CONTEXTS, batch)
        for some, every in zip(logits, all_logits, strict=True):
            torch.testing.assert_close(some, every, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(caches, all_caches, atol=1e-5, rtol=1e-5)


def test_the_last_mlp_is_given_only_the_rows_that_are_drawn_from(load):
    worker = load("llama")
    rows = rows_of_mlps(worker)
    run(worker, MIXED)
    assert rows == [MIXED.num_tokens] * (len(rows) - 1) + [3]


def test_rows_of_which_most_are_drawn_from_are_computed_at_once(load):
    worker = load("llama")
    rows = rows_of_mlps(worker)
    run(worker, batch_of((0, 1, True), (0, 1, True), (0, 2, True)))
    assert rows == [4] * len(rows)


def test_nothing_is_computed_after_the_last_keys_where_nothing_is_drawn(load):
    worker = load("llama")
    rows = rows_of_mlps(worker)
    run(worker, NOTHING_DRAWN)
    assert rows == [NOTHING_DRAWN.num_tokens] * (len(worker._shard.model.model.layers) - 1)
