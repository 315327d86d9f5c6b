"""The stages read what the scheduler's side spelled, whatever was left out as known."""

import pickle
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import PipelineError
from gllm_ray.messages import LogitRules, MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.stages.metadata import MetadataDecoder, MetadataEncoder

RULES = LogitRules(
    allowed_token_ids=(1, 2, 7),
    bad_words=((7,), (1, 2)),
    end_token_ids=(1, 2),
    min_end=9,
    logit_bias=((7, -1.5), (8, 2.0)),
    repetition_penalty=1.05,
)
_SAMPLINGS = (
    None,
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(logit_rules=RULES),
)


def sequence(
    seq_id: int, block_table: tuple[int, ...], sampling: SamplingParams | None = None
) -> ScheduledSequence:
    return ScheduledSequence(
        seq_id=seq_id,
        epoch=0,
        start=0,
        token_ids=(1,),
        block_table=block_table,
        sampling=sampling,
    )


sequences = st.builds(
    sequence,
    seq_id=st.integers(0, 3),
    # Tables grow, shrink and change, as after a preemption.
    block_table=st.sampled_from([(), (0,), (0, 1), (0, 1, 2), (5,), (0, 5, 2), (5, 1, 2, 3)]),
    sampling=st.sampled_from(_SAMPLINGS),
)
batches = st.lists(
    st.lists(sequences, max_size=4, unique_by=lambda seq: seq.seq_id).map(tuple), max_size=30
)


@given(batches)
def test_every_micro_batch_is_read_as_it_was(batches: list[tuple[ScheduledSequence, ...]]) -> None:
    encoder, decoder = MetadataEncoder(), MetadataDecoder()
    for batch_id, told in enumerate(batches):
        batch = MicroBatch(
            batch_id=batch_id,
            sequences=told,
            block_copies=((batch_id, 1),),
            scored_chunks=((0, 2, batch_id), (1, 0, None)),
        )
        assert decoder.decode(encoder.encode(batch)) == batch


def test_a_decode_of_a_long_context_tells_its_new_block_alone() -> None:
    encoder = MetadataEncoder()
    table, sampling = tuple(range(256)), SamplingParams(temperature=1.0)
    ids = count()

    def size(block_table: tuple[int, ...]) -> int:
        told = sequence(0, block_table, sampling)
        return len(encoder.encode(MicroBatch(batch_id=next(ids), sequences=(told,))))

    first, again, longer = size(table), size(table), size((*table, 256))
    assert 5 * again < first
    assert longer - again < 20


def test_a_grammar_is_told_once_and_not_with_every_token() -> None:
    encoder, decoder = MetadataEncoder(), MetadataDecoder()
    sampling = SamplingParams(grammar="x" * 10_000)
    sizes = []
    for batch_id in range(10):
        told = sequence(0, (1,), sampling)._replace(output_token_ids=None if batch_id else (7, 8))
        batch = MicroBatch(batch_id=batch_id, sequences=(told,), ended=(3,))
        metadata = encoder.encode(batch)
        assert decoder.decode(metadata) == batch
        sizes.append(len(metadata))
    assert sizes[0] > 10_000
    assert max(sizes[1:]) < 500


def test_a_prompt_for_penalties_is_told_once_and_rules_are_rules_again() -> None:
    encoder, decoder = MetadataEncoder(), MetadataDecoder()
    sampling = SamplingParams(logit_rules=RULES)
    sizes = []
    for batch_id in range(5):
        told = sequence(0, (1,), sampling)
        if batch_id == 0:
            told = told._replace(output_token_ids=(), prompt_token_ids=tuple(range(5000)))
        batch = MicroBatch(batch_id=batch_id, sequences=(told,))
        metadata = encoder.encode(batch)
        (read,) = decoder.decode(metadata).sequences
        assert read == told
        assert isinstance(read.sampling.logit_rules, LogitRules)
        sizes.append(len(metadata))
    assert sizes[0] > 5_000
    assert max(sizes[1:]) < 500


def test_a_sequence_that_comes_back_within_256_micro_batches_is_known() -> None:
    encoder = MetadataEncoder()
    told = sequence(0, tuple(range(256)), SamplingParams(temperature=1.0))
    others = [sequence(1, ())] * 255
    sizes = [
        len(encoder.encode(MicroBatch(batch_id=batch_id, sequences=(each,))))
        for batch_id, each in enumerate([told, *others, told, *others, told])
    ]
    assert max(sizes[256], sizes[512]) < sizes[0] / 5


def test_sequences_that_ended_are_forgotten_at_both_ends() -> None:
    encoder, decoder = MetadataEncoder(), MetadataDecoder()
    sizes = []
    for batch_id in range(2000):
        batch = MicroBatch(batch_id=batch_id, sequences=(sequence(batch_id, (1, 2, 3)),))
        assert decoder.decode(encoder.encode(batch)) == batch
        if batch_id % 100 == 99:
            sizes.append(len(pickle.dumps((encoder, decoder))))
    assert max(sizes[10:]) <= 1.1 * max(sizes[:10])


def test_a_sequence_that_rested_long_is_told_anew() -> None:
    encoder, decoder = MetadataEncoder(), MetadataDecoder()
    rested = sequence(0, (1, 2, 3), _SAMPLINGS[2])
    for batch_id in range(1001):
        other = sequence(1, (4,), _SAMPLINGS[1])
        told = rested if batch_id % 1000 == 0 else other
        batch = MicroBatch(batch_id=batch_id, sequences=(told,))
        assert decoder.decode(encoder.encode(batch)) == batch


def test_a_reader_that_missed_a_micro_batch_says_so() -> None:
    encoder, decoder = MetadataEncoder(), MetadataDecoder()
    first, second = (
        MicroBatch(batch_id=batch_id, sequences=(sequence(0, (1, 2)),)) for batch_id in range(2)
    )
    encoder.encode(first)
    with pytest.raises(PipelineError, match="sequence 0 is told from block 2 on, but 0 are known"):
        decoder.decode(encoder.encode(second))
