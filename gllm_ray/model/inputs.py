"""A micro-batch as the tensors of one packed forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gllm_ray.messages import MicroBatch, ScheduledSequence


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
class PackedInputs:
    """All sequences of a micro-batch side by side, without padding.

    Attributes:
        input_ids: `[1, num_tokens]`.
        position_ids: `[1, num_tokens]` position of each row in its own sequence.
        slot_mapping: `[num_tokens]` slot that each row's KV is written to; slot `s` is offset
            `s % block_size` of block `s // block_size`.
        decode_rows: `[num_decodes]` rows of the sequences that have one token in the batch.
        decode_slots: `[num_decodes, longest]` slot of every position; a shorter context is
            filled up with its own first slot, which always holds finite values.
        context_lens: `[num_decodes]` positions to attend to, the row's own included.
        prefills: The sequences that have several tokens in the batch.
        sample_rows: `[num_samples]` rows whose logits are drawn from.
        copied_slots: The slots of `MicroBatch.block_copies`, those copied from and those copied
            to, each `[num_copies * block_size]`; None where nothing is copied.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slot_mapping: torch.Tensor
    decode_rows: torch.Tensor
    decode_slots: torch.Tensor
    context_lens: torch.Tensor
    prefills: tuple[PrefillChunk, ...]
    sample_rows: torch.Tensor
    copied_slots: tuple[torch.Tensor, torch.Tensor] | None


def pack(batch: MicroBatch, block_size: int, device: torch.device) -> PackedInputs:
    """Lay a micro-batch out as tensors on the device, without waiting for it."""
    ids: list[int] = []
    positions: list[int] = []
    decodes: list[ScheduledSequence] = []
    decode_rows: list[int] = []
    prefills: list[PrefillChunk] = []
    sample_rows: list[int] = []
    slot_mapping = torch.empty(batch.num_tokens, dtype=torch.long)
    for seq in batch.sequences:
        first_row = len(ids)
        ids.extend(seq.token_ids)
        positions.extend(range(seq.start, seq.end))
        if seq.num_scheduled_tokens == 1:
            decodes.append(seq)
            decode_rows.append(first_row)
        else:
            rows = slice(first_row, len(ids))
            slots = _slots([seq], block_size)[0, : seq.end]
            slot_mapping[rows] = slots[seq.start :]
            prefills.append(
                PrefillChunk(rows=rows, start=seq.start, slots=_to_device(slots, device))
            )
        if seq.sampling is not None:
            sample_rows.append(len(ids) - 1)
    lengths = torch.tensor([seq.end for seq in decodes], dtype=torch.long)
    decode_slots = _slots(decodes, block_size)
    slot_mapping[decode_rows] = decode_slots.gather(1, lengths[:, None] - 1).flatten()
    return PackedInputs(
        input_ids=_to_device(torch.tensor([ids]), device),
        position_ids=_to_device(torch.tensor([positions]), device),
        slot_mapping=_to_device(slot_mapping, device),
        decode_rows=_to_device(torch.tensor(decode_rows, dtype=torch.long), device),
        decode_slots=_to_device(decode_slots, device),
        context_lens=_to_device(lengths, device),
        prefills=tuple(prefills),
        sample_rows=_to_device(torch.tensor(sample_rows, dtype=torch.long), device),
        copied_slots=_copied_slots(batch, block_size, device),
    )


def _copied_slots(
    batch: MicroBatch, block_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not batch.block_copies:
        return None
    blocks = torch.tensor(batch.block_copies).T[..., None]
    slots = blocks * block_size + torch.arange(block_size)
    sources, targets = _to_device(slots.flatten(1), device)
    return sources, targets


def _slots(sequences: Sequence[ScheduledSequence], block_size: int) -> torch.Tensor:
    """`[sequences, longest]` slot of every position, filled up with each one's first slot."""
    longest = max((seq.end for seq in sequences), default=0)
    num_blocks = max((len(seq.block_table) for seq in sequences), default=0)
    # torch reads tuples an order of magnitude more slowly than numpy.
    blocks = np.zeros((len(sequences), num_blocks, 1), dtype=np.int64)
    for row, seq in zip(blocks, sequences, strict=True):
        row[: len(seq.block_table), 0] = seq.block_table
    slots = (blocks * block_size + np.arange(block_size)).reshape(
        len(sequences), num_blocks * block_size
    )[:, :longest]
    for row, seq in zip(slots, sequences, strict=True):
        row[seq.end :] = row[0]
    return torch.from_numpy(slots)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
