"""Multi-head latent attention by an implementation of plain paged attention.

Few rows attend to the cached latents themselves: queries are multiplied by the matrix of the keys
and outputs by that of the values, and all heads share one key, whose first numbers are its value.
For many rows of one sequence its latents are expanded to keys and values once, and thrown away.

Source: DeepSeek-V2 (arXiv 2405.04434), 2.1.2. Deviation: many rows attend to expanded latents.
"""

from dataclasses import replace

import numpy as np
import torch

from gllm_ray.model.attention.latent_projection import LatentProjection
from gllm_ray.model.attention.reference import PagedAttention, ScoreRule
from gllm_ray.model.inputs import PackedInputs, SequenceTables, take_sequences, to_device
from gllm_ray.model.kv_cache import LayerKvCache

# Numbers that expanded keys and values may hold at a time: of as many heads as that has room for.
_MAX_WORKSPACE = 2**26


def attend_latents(
    paged: PagedAttention,
    query: torch.Tensor,
    cache: LayerKvCache,
    inputs: PackedInputs,
    rule: ScoreRule,
) -> torch.Tensor:
    """See `reference.paged_attention`; `paged` is what attends to keys and values."""
    projection = cache.geometry.latent
    assert projection is not None
    if inputs.max_rows < projection.min_expanded_rows:
        return projection.project(paged(projection.absorb(query), cache, inputs, rule))
    has_many = np.diff(inputs.row_starts.numpy()) >= projection.min_expanded_rows
    output = query.new_empty(query.shape[1], projection.num_heads, projection.value_width)
    if not has_many.all():
        rows, few = take_sequences(inputs, np.flatnonzero(~has_many))
        absorbed = projection.absorb(query[:, rows])
        output[rows] = projection.project(paged(absorbed, cache, few, rule))
    for sequence in np.flatnonzero(has_many):
        rows, one = take_sequences(inputs, sequence[None])
        output[rows] = _attend_expanded(paged, query[:, rows], cache, one, rule)
    return output


def _attend_expanded(
    paged: PagedAttention,
    query: torch.Tensor,
    cache: LayerKvCache,
    inputs: PackedInputs,
    rule: ScoreRule,
) -> torch.Tensor:
    """Of one sequence, whose latents are expanded in the order of their positions."""
    projection = cache.geometry.latent
    num_blocks = -(-int(inputs.context_lens[0]) // inputs.block_size)
    table = inputs.tables.block_tables[0, :num_blocks].long()
    offsets = torch.arange(inputs.block_size, device=table.device)
    cached = cache.keys[0, (table[:, None] * inputs.block_size + offsets).flatten()]
    in_order = _with_blocks_in_order(inputs, num_blocks)
    numbers_of_head = len(cached) * (projection.key_width + projection.value_width)
    step = max(1, _MAX_WORKSPACE // numbers_of_head)
    pieces = []
    for first in range(0, projection.num_heads, step):
        heads = slice(first, first + step)
        expanded = _expanded_cache(projection, cache, cached, heads)
        sinks = rule.sinks[heads] if rule.sinks is not None else None
        pieces.append(paged(query[heads], expanded, in_order, replace(rule, sinks=sinks)))
    return torch.cat(pieces, dim=1)


def _expanded_cache(
    projection: LatentProjection, cache: LayerKvCache, cached: torch.Tensor, heads: slice
) -> LayerKvCache:
    """A cache of some heads' keys and values alone."""
    keys, values = projection.expand(cached, heads)
    geometry = replace(
        cache.geometry,
        latent=None,
        key_shape=(len(keys), keys.shape[-1]),
        value_shape=(len(values), values.shape[-1]),
    )
    return LayerKvCache(geometry=geometry, keys=keys, values=values)


def _with_blocks_in_order(inputs: PackedInputs, num_blocks: int) -> PackedInputs:
    """The same sequence in a cache that holds its blocks alone, from the first on."""
    table = np.arange(num_blocks)[None]
    on_device = to_device(table.astype(np.int32), inputs.tables.block_tables.device)
    tables = SequenceTables(inputs.tables.row_starts, inputs.tables.context_lens, on_device)
    return replace(inputs, block_tables=torch.from_numpy(table), tables=tables)
