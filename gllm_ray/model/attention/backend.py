"""Which implementation of paged attention a stage runs."""

import logging
from collections.abc import Callable

import torch

from gllm_ray.model.attention import reference
from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import LayerKvCache

logger = logging.getLogger(__name__)

# See `reference.paged_attention`.
PagedAttention = Callable[[torch.Tensor, LayerKvCache, PackedInputs, ScoreRule], torch.Tensor]

_OPERATOR_DTYPES = (torch.float32, torch.bfloat16)


def choose_attention(device: torch.device, dtype: torch.dtype) -> PagedAttention:
    """The fastest implementation that runs here; the log says which one, and why."""
    if device.type != "cpu":
        return reference.paged_attention
    if dtype not in _OPERATOR_DTYPES:
        logger.warning("attention: torch, because the C++ operator does not take %s", dtype)
        return reference.paged_attention
    from gllm_ray.model.attention.operator_build import OperatorUnavailableError, load_operator

    try:
        operator = load_operator()
    except OperatorUnavailableError as error:
        logger.warning("attention: torch, slower than the C++ operator, because %s", error)
        return reference.paged_attention
    logger.info("attention: the C++ operator")
    return OperatorAttention(operator)


class OperatorAttention:
    """The C++ operator, and the reference for what it does not cover: keys that are expanded."""

    def __init__(self, operator: Callable[..., None]) -> None:
        self._operator = operator

    def __call__(
        self, query: torch.Tensor, cache: LayerKvCache, inputs: PackedInputs, rule: ScoreRule
    ) -> torch.Tensor:
        """See `reference.paged_attention`."""
        if cache.geometry.expand is not None:
            return reference.paged_attention(query, cache, inputs, rule)
        output = query.new_empty(query.shape[1], query.shape[0], cache.values.shape[-1])
        self._operator(
            output,
            query if query.stride(-1) == 1 else query.contiguous(),
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
