"""Which implementation of paged attention a stage runs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gllm_ray.model.attention import reference
from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import AttentionGeometry, LayerKvCache
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators

# See `reference.paged_attention`.
PagedAttention = Callable[[torch.Tensor, LayerKvCache, PackedInputs, ScoreRule], torch.Tensor]
# See `LayerKvCache.write`.
WriteKv = Callable[[LayerKvCache, torch.Tensor, torch.Tensor, torch.Tensor], None]

_OPERATOR_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """An implementation of paged attention.

    Attributes:
        description: What it is and, where it is not the fastest, why; for the log.
        attend: See `reference.paged_attention`.
        write: Stores keys and values; see `LayerKvCache.write`.
    """

    description: str
    attend: PagedAttention = reference.paged_attention
    write: WriteKv = LayerKvCache.write


def choose_attention(
    device: torch.device, dtype: torch.dtype, geometries: Iterable[AttentionGeometry]
) -> AttentionBackend:
    """The fastest implementation that runs here; on CPU it may have to be built first."""
    if device.type != "cpu":
        return AttentionBackend("torch")
    try:
        _check_operator_takes(dtype, geometries)
        operators = OperatorAttention(load_operators())
    except OperatorsUnavailableError as error:
        return AttentionBackend(f"torch, slower than the C++ operator, because {error}")
    return AttentionBackend("C++ operator", operators.attend, operators.write)


def _check_operator_takes(dtype: torch.dtype, geometries: Iterable[AttentionGeometry]) -> None:
    if dtype not in _OPERATOR_DTYPES:
        raise OperatorsUnavailableError(f"it does not take {dtype}")
    if any(geometry.expand is not None for geometry in geometries):
        raise OperatorsUnavailableError("it does not take the latents this model caches")


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
        self._write_kv(cache.keys, cache.values, slots, _rows(keys), _rows(values))

    def attend(
        self, query: torch.Tensor, cache: LayerKvCache, inputs: PackedInputs, rule: ScoreRule
    ) -> torch.Tensor:
        """See `reference.paged_attention`."""
        output = query.new_empty(query.shape[1], query.shape[0], cache.values.shape[-1])
        self._paged_attention(
            output,
            _rows(query),
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


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with each row in one piece; rows may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
