"""Decodes by xformers' split-K operator, everything else by our own kernels."""

import torch
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask

from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.attention.triton_attention import TritonAttention
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import LayerKvCache


class XformersAttention(TritonAttention):
    """Hands decodes to xformers, whose operator takes no rows of several lengths.

    Args:
        num_processors: Streaming multiprocessors of the GPU.
    """

    def __init__(self, num_processors: int) -> None:
        super().__init__(num_processors)
        self._inputs: PackedInputs | None = None

    def attend_decodes(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        cache: LayerKvCache,
        inputs: PackedInputs,
        rule: ScoreRule,
    ) -> None:
        """See `TritonAttention`."""
        num_decodes = inputs.num_leading_decodes
        if inputs is not self._inputs:  # one bias serves all layers
            self._inputs = inputs
            self._bias = PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                q_seqlen=[1] * num_decodes,
                kv_seqlen=inputs.context_lens[:num_decodes].tolist(),
                block_tables=inputs.tables.block_tables[:num_decodes],
                page_size=inputs.block_size,
                device=output.device,
            )
        rows = query[:, :num_decodes].transpose(0, 1).unflatten(1, (len(cache.keys), -1))
        group = rows.shape[2]
        attended = fmha.memory_efficient_attention_forward(
            rows.contiguous()[None],
            _for_each_head(cache.keys, group),
            _for_each_head(cache.values, group),
            self._bias,
            scale=rule.scale,
            op=fmha.triton_splitk.FwOp,
        )
        output[:num_decodes] = attended[0].flatten(1, 2)


def _for_each_head(cache: torch.Tensor, group: int) -> torch.Tensor:
    """`[1, num_slots, kv_heads, group, width]`, without a copy."""
    return cache.transpose(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1)
