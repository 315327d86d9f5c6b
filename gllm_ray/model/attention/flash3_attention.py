"""Paged attention by FlashAttention-3, where its package is installed.

Source: Shah et al., FlashAttention-3, arXiv 2407.08608; the API is that of
`flash_attn_interface.flash_attn_with_kvcache` in the `hopper` folder of its repository.
"""

import torch
from flash_attn_interface import flash_attn_with_kvcache

from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import LayerKvCache


def attend(
    query: torch.Tensor, cache: LayerKvCache, inputs: PackedInputs, rule: ScoreRule
) -> torch.Tensor:
    """See `reference.paged_attention`."""
    window = cache.geometry.window
    return flash_attn_with_kvcache(
        query.transpose(0, 1),
        _in_blocks(cache.keys, inputs.block_size),
        _in_blocks(cache.values, inputs.block_size),
        cache_seqlens=inputs.tables.context_lens,
        page_table=inputs.tables.block_tables,
        cu_seqlens_q=inputs.tables.row_starts,
        max_seqlen_q=inputs.max_rows,
        softmax_scale=rule.scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=rule.softcap or 0.0,
    )


def _in_blocks(cache: torch.Tensor, block_size: int) -> torch.Tensor:
    """`[num_blocks, block_size, heads, width]`."""
    return cache.transpose(0, 1).unflatten(0, (-1, block_size))
