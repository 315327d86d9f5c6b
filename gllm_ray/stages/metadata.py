"""How a micro-batch is told to the stages: what they know of its sequences is left out.

The block ids of a long context would otherwise be spelled anew at every token, and an argument of
more than 100 KB takes Ray's slow way, through the object store.
"""

import pickle
from dataclasses import replace
from typing import NamedTuple

from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence

# A running sequence comes back long before; one that ended is forgotten after twice as many.
_BATCHES_PER_GENERATION = 256


class _Known(NamedTuple):
    """What both ends remember of a sequence."""

    block_table: tuple[int, ...]
    sampling: SamplingParams | None


_UNKNOWN = _Known((), None)


class _SequenceMemory:
    """The sequences of the latest micro-batches: the same at both ends, which see the same ones."""

    def __init__(self) -> None:
        self._young: dict[int, _Known] = {}
        self._old: dict[int, _Known] = {}
        self._num_batches = 0

    def recall(self, seq_id: int) -> _Known:
        return self._young.get(seq_id) or self._old.get(seq_id, _UNKNOWN)

    def note(self, sequence: ScheduledSequence) -> None:
        self._young[sequence.seq_id] = _Known(sequence.block_table, sequence.sampling)

    def end_batch(self) -> None:
        self._num_batches += 1
        if self._num_batches % _BATCHES_PER_GENERATION == 0:
            self._old, self._young = self._young, {}


class MetadataEncoder:
    """Spells micro-batches, in order, for the `MetadataDecoder` of each stage."""

    def __init__(self) -> None:
        self._memory = _SequenceMemory()

    def encode(self, batch: MicroBatch) -> bytes:
        """Spell the next micro-batch."""
        rows = [self._row(sequence) for sequence in batch.sequences]
        self._memory.end_batch()
        return pickle.dumps((replace(batch, sequences=()), rows), pickle.HIGHEST_PROTOCOL)

    def _row(self, sequence: ScheduledSequence) -> tuple[ScheduledSequence, int, bool]:
        """A sequence without what is known, its number of known blocks, and is sampling known."""
        known = self._memory.recall(sequence.seq_id)
        self._memory.note(sequence)
        num_known = len(known.block_table)
        if sequence.block_table[:num_known] != known.block_table:
            num_known = 0
        is_sampling_known = sequence.sampling is known.sampling
        news = sequence._replace(
            block_table=sequence.block_table[num_known:],
            sampling=None if is_sampling_known else sequence.sampling,
        )
        return news, num_known, is_sampling_known


class MetadataDecoder:
    """Reads what a `MetadataEncoder` spelled, from its first micro-batch on."""

    def __init__(self) -> None:
        self._memory = _SequenceMemory()

    def decode(self, metadata: bytes) -> MicroBatch:
        """Read the next micro-batch.

        Raises:
            PipelineError: An earlier one, to which this one refers, did not come here.
        """
        batch, rows = pickle.loads(metadata)
        sequences = tuple(self._sequence(*row) for row in rows)
        self._memory.end_batch()
        return replace(batch, sequences=sequences)

    def _sequence(
        self, news: ScheduledSequence, num_known: int, is_sampling_known: bool
    ) -> ScheduledSequence:
        known = self._memory.recall(news.seq_id)
        if num_known not in (0, len(known.block_table)):
            raise PipelineError(
                f"sequence {news.seq_id} is told from block {num_known} on, but "
                f"{len(known.block_table)} are known here: micro-batches were left out"
            )
        sequence = news._replace(
            block_table=known.block_table[:num_known] + news.block_table,
            sampling=known.sampling if is_sampling_known else news.sampling,
        )
        self._memory.note(sequence)
        return sequence
