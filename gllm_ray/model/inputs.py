"""A micro-batch as the tensors of one packed forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slot_mapping: torch.Tensor
    decode_rows: torch.Tensor
    decode_slots: torch.Tensor
    context_lens: torch.Tensor
    prefills: tuple[PrefillChunk, ...]
    sample_rows: torch.Tensor


def pack(batch: MicroBatch, block_size: int, device: torch.device) -> PackedInputs:
    """Lay a micro-batch out as tensors on the device, without waiting for it."""
    ids: list[int] = []
    positions: list[int] = []
    slot_pieces: list[torch.Tensor] = []
    decodes: list[ScheduledSequence] = []
    decode_rows: list[int] = []
    decode_slots: list[torch.Tensor] = []
    prefills: list[PrefillChunk] = []
    sample_rows: list[int] = []
    for seq in batch.sequences:
        first_row = len(ids)
        ids.extend(seq.token_ids)
        positions.extend(range(seq.start, seq.end))
        slots = _slots(seq, block_size)
        slot_pieces.append(slots[seq.start :])
        if seq.num_scheduled_tokens == 1:
            decodes.append(seq)
            decode_rows.append(first_row)
            decode_slots.append(slots)
        else:
            rows = slice(first_row, len(ids))
            prefills.append(
                PrefillChunk(rows=rows, start=seq.start, slots=_to_device(slots, device))
            )
        if seq.sampling is not None:
            sample_rows.append(len(ids) - 1)
    return PackedInputs(
        input_ids=_to_device(torch.tensor([ids]), device),
        position_ids=_to_device(torch.tensor([positions]), device),
        slot_mapping=_to_device(torch.cat(slot_pieces), device),
        decode_rows=_to_device(torch.tensor(decode_rows, dtype=torch.long), device),
        decode_slots=_to_device(_pad_with_first(decode_slots), device),
        context_lens=_to_device(
            torch.tensor([seq.end for seq in decodes], dtype=torch.long), device
        ),
        prefills=tuple(prefills),
        sample_rows=_to_device(torch.tensor(sample_rows, dtype=torch.long), device),
    )


def _slots(seq: ScheduledSequence, block_size: int) -> torch.Tensor:
    blocks = torch.tensor(seq.block_table, dtype=torch.long)
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[: seq.end]


def _pad_with_first(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    if not rows:
        return torch.empty(0, 0, dtype=torch.long)
    padded = torch.stack([row[0] for row in rows])[:, None].repeat(1, max(map(len, rows)))
    for row, slots in zip(padded, rows, strict=True):
        row[: len(slots)] = slots
    return padded


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
