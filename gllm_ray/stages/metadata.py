"""How a micro-batch is told to the stages: what they know of its sequences is left out.

The block ids of a long context would otherwise be spelled anew at every token, and an argument of
more than 100 KB takes Ray's slow way, through the object store.
"""

from dataclasses import fields
from operator import attrgetter
from typing import NamedTuple

import msgpack

from gllm_ray.errors import PipelineError
from gllm_ray.messages import LogitRules, MicroBatch, SamplingParams, ScheduledSequence

# A running sequence comes back long before; one that ended is forgotten after twice as many.
_BATCHES_PER_GENERATION = 256

_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
_sampling_values = attrgetter(*_SAMPLING_FIELDS)
# All of a micro-batch but its sequences.
_BATCH_FIELDS = ("batch_id", "block_copies", "continues", "ended", "scored_chunks")
_batch_values = attrgetter(*_BATCH_FIELDS)


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
    """Encodes micro-batches, in order, for the `MetadataDecoder` of each stage."""

    def __init__(self) -> None:
        self._memory = _SequenceMemory()

    def encode(self, batch: MicroBatch) -> bytes:
        """Spell the next micro-batch."""
        rows = [self._row(sequence) for sequence in batch.sequences]
        self._memory.end_batch()
        return msgpack.packb((_batch_values(batch), rows))

    def _row(self, sequence: ScheduledSequence) -> tuple[object, ...]:
        """A sequence without what is known, its number of known blocks, and is sampling known."""
        known = self._memory.recall(sequence.seq_id)
        self._memory.note(sequence)
        num_known = len(known.block_table)
        if sequence.block_table[:num_known] != known.block_table:
            num_known = 0
        is_sampling_known = sequence.sampling is known.sampling
        sampling = None if is_sampling_known else sequence.sampling
        news = sequence._replace(
            block_table=sequence.block_table[num_known:],
            sampling=sampling and _sampling_values(sampling),
        )
        return news, num_known, is_sampling_known


class MetadataDecoder:
    """Decodes what a `MetadataEncoder` encoded, from its first micro-batch on."""

    def __init__(self) -> None:
        self._memory = _SequenceMemory()

    def decode(self, metadata: bytes) -> MicroBatch:
        """Read the next micro-batch.

        Raises:
            PipelineError: An earlier one, to which this one refers, did not come here.
        """
        values, rows = msgpack.unpackb(metadata, use_list=False)
        sequences = tuple(self._sequence(*row) for row in rows)
        self._memory.end_batch()
        return MicroBatch(sequences=sequences, **dict(zip(_BATCH_FIELDS, values, strict=True)))

    def _sequence(
        self, values: tuple[object, ...], num_known: int, is_sampling_known: bool
    ) -> ScheduledSequence:
        news = ScheduledSequence(*values)
        known = self._memory.recall(news.seq_id)
        if num_known not in (0, len(known.block_table)):
            raise PipelineError(
                f"sequence {news.seq_id} is told from block {num_known} on, but "
                f"{len(known.block_table)} are known here: micro-batches were left out"
            )
        if is_sampling_known:
            sampling = known.sampling
        elif news.sampling is None:
            sampling = None
        else:
            sampling = _read_sampling(news.sampling)
        sequence = news._replace(
            block_table=known.block_table[:num_known] + news.block_table, sampling=sampling
        )
        self._memory.note(sequence)
        return sequence


def _read_sampling(values: tuple[object, ...]) -> SamplingParams:
    fields = dict(zip(_SAMPLING_FIELDS, values, strict=True))
    if fields["logit_rules"] is not None:
        fields["logit_rules"] = LogitRules(*fields["logit_rules"])
    return SamplingParams(**fields)
