"""The tokens of a prompt are scored by the rows before them, and nothing is computed twice."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model import logprobs, prompt_scoring
from gllm_ray.model.logprobs import MIN_LOGPROB
from gllm_ray.model.prompt_logprobs import read_prompt_logprobs
from gllm_ray.model.prompt_scoring import score_prompts
from gllm_ray.stages.worker import StageWorker
from tests.numerics.models import save_checkpoint
from tests.numerics.serving import service_config

VOCAB_SIZE = 33
CPU = torch.device("cpu")


def batch_of(*chunks, scored):
    """A micro-batch of chunks of so many tokens; the tokens count up."""
    tokens = iter(range(1, 1000))
    return MicroBatch(
        batch_id=0,
        sequences=tuple(
            ScheduledSequence(
                seq_id=index,
                epoch=0,
                start=0,
                token_ids=tuple(next(tokens) for _ in range(length)),
                block_table=tuple(range(8 * index, 8 * index + 8)),
                sampling=SamplingParams(),
            )
            for index, length in enumerate(chunks)
        ),
        scored_chunks=scored,
    )


@given(
    nums=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    max_rows=st.integers(1, 12),
    workspace=st.sampled_from([1, 3 * VOCAB_SIZE, 2**22]),
    seed=st.integers(0, 99),
)
def test_each_chunk_that_asks_gets_its_own_however_its_rows_are_cut(
    nums, max_rows, workspace, seed
):
    batch = batch_of(1, 5, 4, 7, scored=((1, nums[0], 30), (3, nums[1], None)))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch.num_tokens, VOCAB_SIZE, generator=generator) * 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_MAX_WORKSPACE", workspace)
        patch.setattr(prompt_scoring, "_MAX_ROWS", max_rows)
        told = score_prompts(batch, lambda rows: logits[rows], CPU)
    expected = torch.log(torch.softmax(logits.double(), dim=-1))
    chunks = [(range(1, 6), [3, 4, 5, 6, 30]), (range(10, 16), range(12, 18))]
    for packed, num, (rows, targets) in zip(told, nums, chunks, strict=True):
        scores = read_prompt_logprobs(packed, len(targets))
        for score, row, token_id in zip(scores, rows, targets, strict=True):
            order = expected[row].argsort(descending=True).tolist()
            assert score.logprob == pytest.approx(expected[row, token_id].item(), abs=1e-5)
            assert score.rank == order.index(token_id) + 1
            assert [likely for likely, _ in score.top] == order[:num]
            for likely, logprob in score.top:
                assert logprob == pytest.approx(expected[row, likely].item(), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_cannot_spell_never_come_out(bad):
    batch = batch_of(3, scored=((0, 2, None),))
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[0, 2] = bad
    (packed,) = score_prompts(batch, lambda rows: logits[rows], CPU)
    broken, whole = read_prompt_logprobs(packed, 2)
    assert broken.logprob == MIN_LOGPROB
    assert all(math.isfinite(logprob) for _, logprob in broken.top)
    assert whole.logprob == pytest.approx(-math.log(VOCAB_SIZE))
    assert whole.rank == 1


def test_the_layers_run_once_and_the_head_for_a_few_rows_at_a_time(tmp_path, monkeypatch):
    save_checkpoint("llama", tmp_path)
    worker = StageWorker(service_config(tmp_path), 0)
    worker.load()
    worker.allocate_kv_cache(num_blocks=64)
    rows = {"layers": [], "head": []}
    model = worker._shard.model
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows["layers"].append(args[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda _, args: rows["head"].append(args[0].shape[1]))
    monkeypatch.setattr(prompt_scoring, "_MAX_ROWS", 4)
    num_layers = len(model.model.layers)
    sampled = worker.execute(batch_of(1, 11, 9, scored=((1, 2, 99),)), None)
    assert rows == {"layers": [21] * num_layers, "head": [3, 4, 4, 3]}
    assert len(sampled.token_ids) == 3
    assert len(read_prompt_logprobs(sampled.prompt_logprobs[0], 11)) == 11
    # The next micro-batch is computed anew, and no more of it than is read.
    rows["layers"].clear()
    rows["head"].clear()
    with mock.patch("gllm_ray.stages.worker.score_prompts") as score:
        sampled = worker.execute(batch_of(1, 11, 9, scored=()), None)
    assert rows == {"layers": [21] * (num_layers - 1) + [3], "head": [3]}
    assert sampled.prompt_logprobs == ()
    score.assert_not_called()
