"""Greedy tokens do not depend on what the prefix cache holds, with a KV cache of NaN at first."""

import functools

import pytest

from tests.numerics.models import CONFIGS, MAX_TOKENS
from tests.numerics.serving import WHOLE, chunks_of, run_rounds

all_depths = pytest.mark.parametrize("num_stages", [1, 2, 4])


@pytest.fixture(scope="session")
def conversations(small_model, local_pipeline):
    """Two rounds of prompts of one model that begin alike, and all tokens without a prefix cache.

    The second round goes on from the answers of the first.
    """

    @functools.cache
    def make(name):
        pipeline = local_pipeline(name, 1)
        system = small_model(name).prompts[2][:13]
        # Alike to the end; apart in the second block; apart after the third; the third alone.
        first = [system, system, [*system[:6], 9, 8, 7], [*system, 5, 6, 7], system[:12]]
        answers = run_rounds(pipeline, [first], MAX_TOKENS, prefix_caching=False).tokens
        second = [[*prompt, *answer, 11, 12] for prompt, answer in zip(first, answers, strict=True)]
        rounds = [first, second]
        return rounds, run_rounds(pipeline, rounds, MAX_TOKENS, prefix_caching=False).tokens

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prefixes_do_not_change_the_tokens(name, ring, conversations, local_pipeline):
    rounds, expected = conversations(name)
    pipeline = local_pipeline(name, 2)
    result = run_rounds(pipeline, rounds, MAX_TOKENS, policy=chunks_of(5), ring=ring)
    assert result.tokens == expected
    # The second round alone finds five prompts and answers but for their ends.
    assert result.num_prefix_hit_tokens >= 5 * 20


@all_depths
@pytest.mark.parametrize("policy", [WHOLE, chunks_of(7), chunks_of(3)], ids=["whole", "7", "3"])
def test_hits_are_right_for_any_stages_and_chunks(
    num_stages, policy, ring, conversations, local_pipeline
):
    rounds, expected = conversations("llama")
    pipeline = local_pipeline("llama", num_stages)
    result = run_rounds(pipeline, rounds, MAX_TOKENS, policy=policy, ring=ring)
    assert result.tokens == expected
    if policy is WHOLE:
        assert _is_shared_within(result.batches[0]), "no prompt read what its micro-batch wrote"


@all_depths
def test_hits_are_right_under_preemption_and_eviction(
    num_stages, ring, conversations, local_pipeline
):
    rounds, expected = conversations("llama")
    result = run_rounds(
        local_pipeline("llama", num_stages),
        rounds,
        MAX_TOKENS,
        policy=chunks_of(7),
        num_blocks=14,
        ring=ring,
    )
    assert result.num_preemptions > 0
    assert any(seq.epoch > 0 for seq in _hits(result.batches))
    assert result.tokens == expected


@all_depths
def test_hits_on_what_aborted_requests_left_are_right(
    num_stages, ring, conversations, local_pipeline
):
    rounds, expected = conversations("llama")
    aborted = frozenset({0, 3})
    result = run_rounds(
        local_pipeline("llama", num_stages),
        rounds,
        MAX_TOKENS,
        policy=chunks_of(5),
        num_blocks=24,
        ring=ring,
        aborted=aborted,
    )
    assert result.num_prefix_hit_tokens > 0
    for index, (tokens, wanted) in enumerate(zip(result.tokens, expected, strict=True)):
        if index in aborted:
            assert len(tokens) < MAX_TOKENS
        assert tokens == (wanted[: len(tokens)] if index in aborted else wanted)


def _hits(batches):
    """The first share of each epoch that began behind cached blocks."""
    return [
        seq for batch in batches for seq in batch.sequences if seq.start and _is_first(seq, batches)
    ]


def _is_first(seq, batches):
    shares = (other for batch in batches for other in batch.sequences)
    return seq is next(
        other for other in shares if (other.seq_id, other.epoch) == (seq.seq_id, seq.epoch)
    )


def _is_shared_within(batch):
    first, *others = batch.sequences
    return any(seq.start and seq.block_table[0] == first.block_table[0] for seq in others)
