"""Which implementation of paged attention a stage runs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from gllm_ray.model.attention import reference
from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import AttentionGeometry, LayerKvCache
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators

# See `reference.paged_attention`.
PagedAttention = Callable[[torch.Tensor, LayerKvCache, PackedInputs, ScoreRule], torch.Tensor]

_OPERATOR_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """An implementation of paged attention.

    Attributes:
        description: What it is and, where it is not the fastest, why; for the log.
        attend: See `reference.paged_attention`.
    """

    description: str
    attend: PagedAttention


def choose_attention(
    device: torch.device, dtype: torch.dtype, geometries: Iterable[AttentionGeometry]
) -> AttentionBackend:
    """The fastest implementation that runs here; on CPU it may have to be built first."""
    if device.type != "cpu":
        return AttentionBackend("torch", reference.paged_attention)
    try:
        _check_operator_takes(dtype, geometries)
        attend = OperatorAttention(load_operators().paged_attention.default)
    except OperatorsUnavailableError as error:
        description = f"torch, slower than the C++ operator, because {error}"
        return AttentionBackend(description, reference.paged_attention)
    return AttentionBackend("C++ operator", attend)


def _check_operator_takes(dtype: torch.dtype, geometries: Iterable[AttentionGeometry]) -> None:
    if dtype not in _OPERATOR_DTYPES:
        raise OperatorsUnavailableError(f"it does not take {dtype}")
    if any(geometry.expand is not None for geometry in geometries):
        raise OperatorsUnavailableError("it does not take the latents this model caches")


class OperatorAttention:
    """The C++ operator behind the signature of the reference.

    Args:
        operator: `gllm_ray::paged_attention`.
    """

    def __init__(self, operator: Callable[..., None]) -> None:
        self._operator = operator

    def __call__(
        self, query: torch.Tensor, cache: LayerKvCache, inputs: PackedInputs, rule: ScoreRule
    ) -> torch.Tensor:
        """See `reference.paged_attention`."""
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
