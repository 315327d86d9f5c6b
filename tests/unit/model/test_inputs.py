import torch

from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model.inputs import pack


def test_rows_are_packed_side_by_side_with_their_slots():
    def sequence(start, token_ids, block_table, sampling=None):
        return ScheduledSequence(
            seq_id=start,
            epoch=0,
            start=start,
            token_ids=token_ids,
            block_table=block_table,
            sampling=sampling,
        )

    greedy = SamplingParams()
    batch = MicroBatch(
        batch_id=0,
        sequences=(
            sequence(5, (40,), (7, 2), greedy),
            sequence(2, (41,), (3,), greedy),
            sequence(3, (42, 43, 44), (1, 5)),
            sequence(0, (45, 46), (6,), greedy),
        ),
    )
    inputs = pack(batch, 4, torch.device("cpu"))
    assert inputs.input_ids.tolist() == [[40, 41, 42, 43, 44, 45, 46]]
    assert inputs.position_ids.tolist() == [[5, 2, 3, 4, 5, 0, 1]]
    assert inputs.slot_mapping.tolist() == [9, 14, 7, 20, 21, 24, 25]
    assert inputs.row_starts.tolist() == [0, 1, 2, 5, 7]
    assert inputs.context_lens.tolist() == [6, 3, 6, 2]
    assert inputs.block_tables.tolist() == [[7, 2], [3, 0], [1, 5], [6, 0]]
    gathers = inputs.gathers
    assert gathers.decode_rows.tolist() == [0, 1]
    assert gathers.decode_slots.tolist() == [[28, 29, 30, 31, 8, 9], [12, 13, 14, 12, 12, 12]]
    assert gathers.decode_lens.tolist() == [6, 3]
    assert [(chunk.rows, chunk.start) for chunk in gathers.prefills] == [
        (slice(2, 5), 3),
        (slice(5, 7), 0),
    ]
    assert gathers.prefills[0].slots.tolist() == [4, 5, 6, 7, 20, 21]
    assert inputs.sample_rows.tolist() == [0, 1, 6]


def test_blocks_past_the_context_do_not_show():
    def gathers_of(*chunks):
        sequences = tuple(
            ScheduledSequence(
                seq_id=index,
                epoch=0,
                start=start,
                token_ids=(0,) * num_tokens,
                block_table=(3, 1, 2),
                sampling=None,
            )
            for index, (start, num_tokens) in enumerate(chunks)
        )
        return pack(MicroBatch(batch_id=0, sequences=sequences), 4, torch.device("cpu")).gathers

    assert gathers_of((2, 1), (0, 1)).decode_slots.tolist() == [[12, 13, 14], [12, 12, 12]]
    assert gathers_of((1, 4)).prefills[0].slots.tolist() == [12, 13, 14, 15, 4]


def test_copied_blocks_become_pairs_of_slots():
    def copied_slots(*block_copies):
        sequence = ScheduledSequence(
            seq_id=0, epoch=0, start=3, token_ids=(0,), block_table=(3, 1), sampling=None
        )
        batch = MicroBatch(batch_id=0, sequences=(sequence,), block_copies=block_copies)
        return pack(batch, 2, torch.device("cpu")).copied_slots

    sources, targets = copied_slots((5, 1), (5, 2), (7, 4))
    assert sources.tolist() == [10, 11, 10, 11, 14, 15]
    assert targets.tolist() == [2, 3, 4, 5, 8, 9]
    assert copied_slots() is None
