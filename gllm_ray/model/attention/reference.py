"""Paged attention in plain torch: any device, any float type, any head shape.

A token attends to the cached positions of its own sequence up to its own, at most `window` of
them. Scores may be soft-capped, and a sink may take a share of each softmax.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from gllm_ray.model.inputs import PackedInputs, PrefillChunk
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
    pieces = [(chunk.rows, _prefill(query, cache, chunk, rule)) for chunk in inputs.prefills]
    pieces += [
        (inputs.decode_rows[part], _decode(query, cache, inputs, part, rule))
        for part in _decode_parts(cache, inputs)
    ]
    output = query.new_empty(query.shape[1], query.shape[0], pieces[0][1].shape[-1])
    for rows, piece in pieces:
        output[rows] = piece
    return output


def _decode_parts(cache: LayerKvCache, inputs: PackedInputs) -> list[slice]:
    num_decodes, longest = inputs.decode_slots.shape
    if num_decodes == 0:
        return []
    step = max(1, _MAX_WORKSPACE // (longest * cache.geometry.num_values))
    return [slice(first, first + step) for first in range(0, num_decodes, step)]


def _decode(
    query: torch.Tensor,
    cache: LayerKvCache,
    inputs: PackedInputs,
    part: slice,
    rule: ScoreRule,
) -> torch.Tensor:
    slots, context_lens = inputs.decode_slots[part], inputs.context_lens[part, None]
    keys, values = _gather(cache, slots)
    positions = torch.arange(slots.shape[1], device=slots.device)
    allowed = positions < context_lens
    if cache.geometry.window is not None:
        allowed &= positions >= context_lens - cache.geometry.window
    rows = query[:, inputs.decode_rows[part]].transpose(0, 1).unsqueeze(2)
    return _attend(rows, keys, values, allowed[:, None, :], rule).squeeze(2)


def _prefill(
    query: torch.Tensor, cache: LayerKvCache, chunk: PrefillChunk, rule: ScoreRule
) -> torch.Tensor:
    keys, values = _gather(cache, chunk.slots[None])
    key_positions = torch.arange(len(chunk.slots), device=query.device)
    query_positions = key_positions[chunk.start :, None]
    rows = query[None, :, chunk.rows]
    step = max(1, _MAX_WORKSPACE // (len(chunk.slots) * query.shape[0]))
    pieces = []
    for first in range(0, rows.shape[2], step):
        part = slice(first, first + step)
        allowed = key_positions <= query_positions[part]
        if cache.geometry.window is not None:
            allowed &= key_positions > query_positions[part] - cache.geometry.window
        pieces.append(_attend(rows[:, :, part], keys, values, allowed[None], rule))
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)


def _gather(cache: LayerKvCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[n, heads, length, width]` at the slots `[n, length]`."""
    keys = cache.keys[:, slots].transpose(0, 1)
    values = cache.values[:, slots].transpose(0, 1)
    if cache.geometry.expand is not None:
        return cache.geometry.expand(keys, values)
    return keys, values


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor,
    rule: ScoreRule,
) -> torch.Tensor:
    """Masked softmax attention of `[n, heads, rows, d]` over `[n, kv_heads, length, d]`.

    `allowed` is `[n, rows, length]`; query heads share KV heads in consecutive groups.
    """
    num, num_heads, num_rows, width = query.shape
    num_kv_heads = keys.shape[1]
    grouped = query.reshape(num, num_kv_heads, -1, width)
    scores = grouped @ keys.transpose(-1, -2) * rule.scale
    scores = scores.view(num, num_heads, num_rows, -1)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(num, -1, num_rows, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if rule.sinks is not None:
        weights = weights[..., :-1]
    weights = weights.reshape(num, num_kv_heads, -1, weights.shape[-1])
    return (weights @ values).view(num, num_heads, num_rows, -1)
