"""Paged attention by the C++ operators of the CPU."""

from typing import Any

import torch

from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import LayerKvCache, with_dense_rows


class OperatorAttention:
    """The C++ operators behind the signatures of the reference.

    Args:
        operators: What `load_operators` returns.
    """

    def __init__(self, operators: Any) -> None:  # noqa: ANN401 - torch makes its attributes up
        self._paged_attention = operators.paged_attention.default
        self._write_kv = operators.write_kv.default

    def write(
        self, cache: LayerKvCache, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerKvCache.write`."""
        self._write_kv(
            cache.keys, cache.values, slots, with_dense_rows(keys), with_dense_rows(values)
        )

    def attend(
        self, query: torch.Tensor, cache: LayerKvCache, inputs: PackedInputs, rule: ScoreRule
    ) -> torch.Tensor:
        """See `reference.paged_attention`."""
        output = query.new_empty(query.shape[1], query.shape[0], cache.values.shape[-1])
        self._paged_attention(
            output,
            with_dense_rows(query),
            cache.keys,
            cache.values,
            inputs.row_starts,
            inputs.context_lens,
            inputs.block_tables,
            inputs.block_size,
            cache.geometry.window or 0,
            rule.scale,
            rule.softcap or 0.0,
            rule.sinks if rule.sinks is None else rule.sinks.float().contiguous(),
        )
        return output
