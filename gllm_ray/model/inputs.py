"""A micro-batch as the tensors of one packed forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from gllm_ray.messages import MicroBatch

# Numbers that arrays in one copy are filled up to a multiple of, so that each begins at an address
# that kernels are compiled for.
_ALIGNMENT = 4


class SequenceTables(NamedTuple):
    """Where the sequences of a packed batch lie; int32, on the device.

    Attributes:
        row_starts: See `PackedInputs`, like the others.
        context_lens: `[num_sequences]`.
        block_tables: `[num_sequences, longest]`.
    """

    row_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """The rows of one sequence that has several tokens in the batch.

    Attributes:
        rows: Its rows in the packed batch.
        start: Position of the first row, so tokens whose KV was written by earlier batches.
        slots: `[start + rows]` slot of every position up to the last row.
    """

    rows: slice
    start: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathers:
    """The slots of every context, for attention that gathers keys and values.

    Attributes:
        decode_rows: `[num_decodes]` rows of the sequences that have one token in the batch.
        decode_slots: `[num_decodes, longest]` slot of every position; a shorter context is
            filled up with its own first slot, which always holds finite values.
        decode_lens: `[num_decodes]` positions to attend to, the row's own included.
        prefills: The sequences that have several tokens in the batch.
    """

    decode_rows: torch.Tensor
    decode_slots: torch.Tensor
    decode_lens: torch.Tensor
    prefills: tuple[PrefillChunk, ...]


@dataclass(frozen=True, kw_only=True)
class PackedInputs:
    """All sequences of a micro-batch side by side, without padding.

    Attributes:
        input_ids: `[1, num_tokens]`; those that are not known are negative.
        position_ids: `[1, num_tokens]` position of each row in its own sequence.
        slot_mapping: `[num_tokens]` slot that each row's KV is written to; slot `s` is offset
            `s % block_size` of block `s // block_size`.
        row_starts: `[num_sequences + 1]` first row of each sequence, then the number of rows; on
            the CPU, like the next two.
        context_lens: `[num_sequences]` positions up to the last row, its own included.
        block_tables: `[num_sequences, longest]` blocks, filled up with zeros.
        tables: The last three on the device.
        block_size: Slots of a block.
        drawn: `[num_samples]` sequences that a token is drawn for; on the CPU.
        sample_rows: `[num_samples]` their last rows, whose logits are drawn from.
        copied_slots: The slots of `MicroBatch.block_copies`, those copied from and those copied
            to, each `[num_copies * block_size]`; None where nothing is copied.
        reads_prompts: Whether the logits of more rows are read than of `sample_rows`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slot_mapping: torch.Tensor
    row_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    tables: SequenceTables
    block_size: int
    drawn: torch.Tensor
    sample_rows: torch.Tensor
    copied_slots: tuple[torch.Tensor, torch.Tensor] | None
    reads_prompts: bool = False

    @property
    def num_sequences(self) -> int:
        """Sequences of the micro-batch."""
        return len(self.context_lens)

    @cached_property
    def num_leading_decodes(self) -> int:
        """Sequences of one row before the first one of several."""
        is_decode = np.diff(self.row_starts.numpy()) == 1
        return len(is_decode) if is_decode.all() else int(is_decode.argmin())

    @cached_property
    def max_rows(self) -> int:
        """Rows of the sequence that has the most."""
        return int(np.diff(self.row_starts.numpy()).max(initial=0))

    @cached_property
    def gathers(self) -> Gathers:
        """What attention without block tables needs, on the device."""
        device = self.input_ids.device
        starts, ends = self.row_starts.numpy(), self.context_lens.numpy()
        counts = np.diff(starts)
        decodes = np.flatnonzero(counts == 1)
        decode_slots = _slots(self.block_tables.numpy()[decodes], ends[decodes], self.block_size)
        prefills = []
        for index in np.flatnonzero(counts != 1).tolist():
            rows, end = slice(int(starts[index]), int(starts[index + 1])), int(ends[index])
            slots = _slots(
                self.block_tables.numpy()[index : index + 1],
                ends[index : index + 1],
                self.block_size,
            )[0]
            prefills.append(
                PrefillChunk(
                    rows=rows, start=end - (rows.stop - rows.start), slots=to_device(slots, device)
                )
            )
        return Gathers(
            decode_rows=to_device(starts[decodes], device),
            decode_slots=to_device(decode_slots, device),
            decode_lens=to_device(ends[decodes], device),
            prefills=tuple(prefills),
        )


def pack(
    batch: MicroBatch, block_size: int, device: torch.device, sampled: Sequence[int] = ()
) -> PackedInputs:
    """Lay a micro-batch out as tensors on the device, without waiting for it.

    Args:
        batch: The micro-batch.
        block_size: Slots of a block.
        device: Where the stage computes.
        sampled: The tokens of the micro-batch that this one continues; none where only a stage
            before this one embeds tokens.
    """
    sequences = batch.sequences
    starts = np.array([seq.start for seq in sequences], dtype=np.int64)
    counts = np.array([len(seq.token_ids) for seq in sequences], dtype=np.int64)
    row_starts = np.concatenate([[0], np.cumsum(counts)])
    positions = np.arange(row_starts[-1]) + np.repeat(starts - row_starts[:-1], counts)
    tables = _block_tables(batch)
    blocks = tables[np.repeat(np.arange(len(sequences)), counts), positions // block_size]
    ids = np.fromiter(chain.from_iterable(seq.token_ids for seq in sequences), dtype=np.int64)
    if sampled:
        ids = np.where(ids < 0, np.array(sampled)[~np.minimum(ids, -1)], ids)
    drawn = np.flatnonzero([seq.sampling is not None for seq in sequences])
    input_ids, position_ids, slot_mapping, sample_rows = _copy_together(
        [
            ids,
            positions,
            blocks * block_size + positions % block_size,
            row_starts[1:][drawn] - 1,
        ],
        np.int64,
        device,
    )
    context_lens = starts + counts
    return PackedInputs(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        slot_mapping=slot_mapping,
        row_starts=torch.from_numpy(row_starts),
        context_lens=torch.from_numpy(context_lens),
        block_tables=torch.from_numpy(tables),
        tables=SequenceTables(
            *_copy_together([row_starts, context_lens, tables], np.int32, device)
        ),
        block_size=block_size,
        drawn=torch.from_numpy(drawn),
        sample_rows=sample_rows,
        copied_slots=_copied_slots(batch, block_size, device),
        reads_prompts=bool(batch.scored_chunks),
    )


def take_sequences(
    inputs: PackedInputs, sequences: np.ndarray, *, last_row_only: bool = False
) -> tuple[torch.Tensor, PackedInputs]:
    """Some sequences of a packed batch as one of their own.

    Args:
        inputs: The batch.
        sequences: `[n]` which of them, in ascending order.
        last_row_only: Whether to take no other row of theirs, as if they were decodes.

    Returns:
        Their rows in the batch, on the device, and what is left of it.
    """
    device = inputs.slot_mapping.device
    row_ends = inputs.row_starts.numpy()[1:][sequences]
    counts = row_ends - inputs.row_starts.numpy()[:-1][sequences]
    if last_row_only:
        counts = np.ones_like(counts)
    row_starts = np.concatenate([[0], np.cumsum(counts)])
    shifts = np.repeat(row_ends - row_starts[1:], counts)
    rows = to_device(shifts + np.arange(row_starts[-1]), device)
    drawn = np.flatnonzero(np.isin(sequences, inputs.drawn.numpy()))
    on_device = to_device(sequences, device)
    return rows, replace(
        inputs,
        input_ids=inputs.input_ids[:, rows],
        position_ids=inputs.position_ids[:, rows],
        slot_mapping=inputs.slot_mapping[rows],
        row_starts=torch.from_numpy(row_starts),
        context_lens=inputs.context_lens[sequences],
        block_tables=inputs.block_tables[sequences],
        tables=SequenceTables(
            row_starts=to_device(row_starts.astype(np.int32), device),
            context_lens=inputs.tables.context_lens[on_device],
            block_tables=inputs.tables.block_tables[on_device],
        ),
        drawn=torch.from_numpy(drawn),
        sample_rows=to_device(row_starts[1:][drawn] - 1, device),
    )


def _block_tables(batch: MicroBatch) -> np.ndarray:
    """`[sequences, longest]`, filled up with zeros."""
    tables = [seq.block_table for seq in batch.sequences]
    lengths = np.array([len(table) for table in tables], dtype=np.int64)
    padded = np.zeros((len(tables), lengths.max(initial=0)), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.fromiter(
        chain.from_iterable(tables), dtype=np.int64, count=lengths.sum()
    )
    return padded


def _copied_slots(
    batch: MicroBatch, block_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not batch.block_copies:
        return None
    blocks = np.array(batch.block_copies).T[..., None]
    slots = (blocks * block_size + np.arange(block_size)).reshape(2, -1)
    sources, targets = to_device(slots, device)
    return sources, targets


def _slots(block_tables: np.ndarray, lengths: np.ndarray, block_size: int) -> np.ndarray:
    """`[sequences, longest]` slot of every position, filled up with each one's first slot."""
    longest = lengths.max(initial=0)
    slots = np.repeat(block_tables * block_size, block_size, axis=1)[:, :longest]
    slots += np.arange(longest) % block_size
    return np.where(np.arange(longest) < lengths[:, None], slots, slots[:, :1])


def _copy_together(
    arrays: Sequence[np.ndarray], dtype: type[np.integer], device: torch.device
) -> list[torch.Tensor]:
    """Arrays on the device, as integers of this type, by one copy for which nobody waits."""
    sizes = [-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    together = np.zeros(sum(sizes), dtype=dtype)
    for array, piece in zip(arrays, np.split(together, np.cumsum(sizes)[:-1]), strict=True):
        piece[: array.size] = array.ravel()
    pieces = to_device(together, device).split(sizes)
    return [
        piece[: array.size].view(array.shape) for array, piece in zip(arrays, pieces, strict=True)
    ]


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, by a copy for which nobody waits; the same memory on CPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
