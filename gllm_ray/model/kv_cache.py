"""The paged KV cache of one stage: one pair of tensors per attention module."""

import math
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from gllm_ray.model.attention.latent_projection import LatentProjection


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGeometry:
    """What one attention module writes per token, and how far it looks back.

    Attributes:
        key_shape: Heads and width of a key.
        value_shape: Heads and width of a value.
        window: Positions a token attends to, itself included; None means all.
        latent: How keys and values come from what is cached, if that is a latent: one key, whose
            first numbers are its value. None if keys and values themselves are.
        has_softcap: Whether it caps its scores.
        has_sinks: Whether its softmaxes have sinks.
    """

    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    window: int | None
    latent: LatentProjection | None = None
    has_softcap: bool = False
    has_sinks: bool = False

    @property
    def num_values(self) -> int:
        """Numbers cached per token."""
        key, value = math.prod(self.key_shape), math.prod(self.value_shape)
        return key if self.latent is not None else key + value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKvCache:
    """The cache of one attention module.

    Attributes:
        geometry: What is cached.
        keys: `[heads, num_slots, width]`; a slot is one position of a block.
        values: The same for values; of latents, the first numbers of `keys`.
    """

    geometry: AttentionGeometry
    keys: torch.Tensor
    values: torch.Tensor

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the rows' keys and values, `[heads, num_tokens, width]`, at their slots."""
        self.keys.index_copy_(1, slots, keys)
        self.values.index_copy_(1, slots, values)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Store at each target slot what its source slot holds."""
        self.write(targets, self.keys[:, sources], self.values[:, sources])


def block_bytes(
    geometries: Mapping[nn.Module, AttentionGeometry], block_size: int, dtype: torch.dtype
) -> int:
    """Bytes one block takes over all attention modules of a stage."""
    per_token = sum(geometry.num_values for geometry in geometries.values())
    return per_token * block_size * dtype.itemsize


def allocate_kv_cache(
    geometries: Mapping[nn.Module, AttentionGeometry],
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[nn.Module, LayerKvCache]:
    """Reserve the cache of every attention module of a stage.

    On CPU the slots of a head lie side by side, as the C++ operator likes them, and a page takes
    memory once a slot of it is written; elsewhere the heads of a slot lie side by side, which is
    the layout of FlashAttention-3.
    """

    def reserve(shape: tuple[int, int]) -> torch.Tensor:
        heads, width = shape
        if device.type == "cpu":
            return _untouched_zeros((heads, num_slots, width), dtype)
        return torch.zeros(num_slots, heads, width, dtype=dtype, device=device).transpose(0, 1)

    def reserve_layer(geometry: AttentionGeometry) -> LayerKvCache:
        keys = reserve(geometry.key_shape)
        is_latent = geometry.latent is not None
        width = geometry.value_shape[1]
        values = keys[..., :width] if is_latent else reserve(geometry.value_shape)
        return LayerKvCache(geometry=geometry, keys=keys, values=values)

    return {module: reserve_layer(geometry) for module, geometry in geometries.items()}


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in pages that the kernel makes when they are written, large ones where it can.

    Nobody waits for gigabytes to be filled before the first request.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with each row in one piece; rows may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
