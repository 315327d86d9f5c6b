"""Paged attention in plain torch: any device, any float type, any head shape.

A token attends to the cached positions of its own sequence up to its own, at most `window` of
them. Scores may be soft-capped, and a sink may take a share of each softmax.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from gllm_ray.model.inputs import Gathers, PackedInputs, PrefillChunk
from gllm_ray.model.kv_cache import LayerKvCache

# Numbers that one gathered copy of keys, or one block of scores, may hold at a time.
_MAX_WORKSPACE = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """How scores become attention weights.

    Attributes:
        scale: Factor of the dot products.
        softcap: Scores are squashed to `softcap * tanh(score / softcap)`, if set.
        sinks: `[num_heads]` score of a key without a value, if set.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


# See `paged_attention`.
PagedAttention = Callable[[torch.Tensor, LayerKvCache, PackedInputs, ScoreRule], torch.Tensor]


def paged_attention(
    query: torch.Tensor, cache: LayerKvCache, inputs: PackedInputs, rule: ScoreRule
) -> torch.Tensor:
    """Attend over the block tables of a packed batch whose KV is already written.

    Args:
        query: `[num_heads, num_tokens, head_dim]`.
        cache: Keys and values of this attention module.
        inputs: Which rows belong to which slots.
        rule: From scores to weights.

    Returns:
        `[num_tokens, num_heads, value_dim]`.
    """
    gathers = inputs.gathers
    pieces = [(chunk.rows, _prefill(query, cache, chunk, rule)) for chunk in gathers.prefills]
    pieces += [
        (gathers.decode_rows[part], _decode(query, cache, gathers, part, rule))
        for part in _decode_parts(cache, gathers)
    ]
    output = query.new_empty(query.shape[1], query.shape[0], cache.values.shape[-1])
    for rows, piece in pieces:
        output[rows] = piece
    return output


def _decode_parts(cache: LayerKvCache, gathers: Gathers) -> list[slice]:
    num_decodes, longest = gathers.decode_slots.shape
    if num_decodes == 0:
        return []
    per_position = len(cache.keys) * (cache.keys.shape[-1] + cache.values.shape[-1])
    step = max(1, _MAX_WORKSPACE // (longest * per_position))
    return [slice(first, first + step) for first in range(0, num_decodes, step)]


def _decode(
    query: torch.Tensor, cache: LayerKvCache, gathers: Gathers, part: slice, rule: ScoreRule
) -> torch.Tensor:
    """One row a sequence: the rows of a batch element are the query heads of one KV head."""
    slots, lengths = gathers.decode_slots[part], gathers.decode_lens[part, None]
    window = cache.geometry.window
    if window is not None and window < slots.shape[1]:
        first = (lengths - window).clamp(min=0)
        slots = slots.gather(1, first + torch.arange(window, device=slots.device))
        lengths = lengths - first
    keys, values = _gather(cache, slots)
    is_allowed = torch.arange(slots.shape[1], device=slots.device) < lengths
    rows = query[:, gathers.decode_rows[part]]
    grouped = rows.unflatten(0, (len(keys), -1)).transpose(1, 2)
    sinks = rule.sinks.view(len(keys), 1, -1, 1) if rule.sinks is not None else None
    output = _attend(grouped, keys, values, is_allowed[:, None], rule, sinks)
    return output.transpose(0, 1).flatten(1, 2)


def _prefill(
    query: torch.Tensor, cache: LayerKvCache, chunk: PrefillChunk, rule: ScoreRule
) -> torch.Tensor:
    """Many rows of one sequence, some at a time."""
    window = cache.geometry.window
    first_seen = max(0, chunk.start - window + 1) if window is not None else 0
    keys, values = _gather(cache, chunk.slots[None, first_seen:])
    key_positions = torch.arange(first_seen, len(chunk.slots), device=query.device)
    rows = query[:, chunk.rows]
    step = max(1, _MAX_WORKSPACE // (len(key_positions) * len(query)))
    pieces = []
    for first in range(0, rows.shape[1], step):
        part = rows[:, first : first + step]
        positions = chunk.start + torch.arange(first, first + part.shape[1], device=query.device)
        is_allowed = key_positions <= positions[:, None]
        if window is not None:
            is_allowed &= key_positions > positions[:, None] - window
        pieces.append(_attend_rows(part, keys, values, is_allowed, rule))
    return torch.cat(pieces, dim=1).transpose(0, 1)


def _attend_rows(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_allowed: torch.Tensor,
    rule: ScoreRule,
) -> torch.Tensor:
    """`[num_heads, rows, d]` over one sequence, by torch's fused attention where it can."""
    if rule.softcap is None and rule.sinks is None:
        return functional.scaled_dot_product_attention(
            rows[None],
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=is_allowed,
            scale=rule.scale,
            enable_gqa=True,
        )[0]
    num_heads, num_rows, _ = rows.shape
    group = num_heads // len(keys)
    grouped = rows.reshape(len(keys), 1, group * num_rows, -1)
    sinks = None
    if rule.sinks is not None:
        sinks = rule.sinks.repeat_interleave(num_rows).view(len(keys), 1, -1, 1)
    output = _attend(grouped, keys, values, is_allowed.repeat(group, 1), rule, sinks)
    return output.view(num_heads, num_rows, -1)


def _gather(cache: LayerKvCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[heads, n, length, width]` at the slots `[n, length]`."""
    keys = cache.keys.index_select(1, slots.flatten()).unflatten(1, slots.shape)
    values = cache.values.index_select(1, slots.flatten()).unflatten(1, slots.shape)
    return keys, values


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_allowed: torch.Tensor,
    rule: ScoreRule,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention of `[heads, n, rows, d]` over `[heads, n, length, d]`."""
    scores = query @ keys.transpose(-1, -2) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~is_allowed, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).expand(*sinks.shape[:1], *scores.shape[1:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : keys.shape[2]] @ values
