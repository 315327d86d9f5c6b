"""How the cached latents of multi-head latent attention become keys and values."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from gllm_ray.model.fusion import is_copy


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentProjection:
    """The matrices that make keys and values of a latent, for all heads.

    What is cached of a token is its latent and, beside it, the rotary key that all heads share.

    Attributes:
        linear: From a latent to every head's key, but for its rotary part, and value.
        num_heads: Of queries, keys and values.
        key_width: Of a key, the rotary part included.
        value_width: Of a value.
        rotary_width: Of the rotary key.
    """

    linear: nn.Linear
    num_heads: int
    key_width: int
    value_width: int
    rotary_width: int

    @property
    def rank(self) -> int:
        """Width of a latent."""
        return self.linear.in_features

    @property
    def min_expanded_rows(self) -> int:
        """Rows of a sequence from which on expanding its latents takes less computing.

        Expanding takes `rank * (plain + value)` products for each head and cached token, where
        `plain` is a key's width without the rotary part; a row that attends to latents takes
        `2 * rank - plain - value` more of them than one that attends to keys and values.
        """
        expanded = self.key_width - self.rotary_width + self.value_width
        return -(-self.rank * expanded // max(1, 2 * self.rank - expanded))

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[num_heads, rows, key_width]` as queries of what is cached."""
        to_keys, _ = self._matrices()
        plain, rotary = query.split([to_keys.shape[1], self.rotary_width], dim=-1)
        return torch.cat([plain @ to_keys, rotary], dim=-1)

    def project(self, output: torch.Tensor) -> torch.Tensor:
        """Weighted sums of latents, `[rows, num_heads, rank]`, as those of values."""
        _, to_values = self._matrices()
        return (output.transpose(0, 1) @ to_values.transpose(1, 2)).transpose(0, 1)

    def expand(self, cached: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[heads, n, width]` of some heads, of what is cached, `[n, width]`."""
        latents, rotary = cached.split([self.rank, self.rotary_width], dim=-1)
        to_keys, to_values = self._matrices()
        plain = latents @ to_keys[heads].transpose(1, 2)
        keys = torch.cat([plain, rotary.expand(len(plain), -1, -1)], dim=-1)
        return keys, latents @ to_values[heads].transpose(1, 2)

    def _matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[num_heads, width, rank]` for keys and for values."""
        matrices = self.linear.weight.view(self.num_heads, -1, self.rank)
        return matrices.tensor_split([self.key_width - self.rotary_width], dim=1)


class _LatentLinear(nn.Linear):
    """A layer whose weight is read as matrices of single heads: nothing may pack or quantize it."""


def cache_latents(model: nn.Module) -> None:
    """Make multi-head latent attention hand over what is cached instead of keys and values.

    A module with another way to make them keeps its own, and caches keys and values of all heads.
    """
    for module in model.modules():
        expand = getattr(type(module), "expand_kv", None)
        if is_copy(expand, DeepseekV3Attention.expand_kv) and module.kv_b_proj.bias is None:
            module.kv_b_proj.__class__ = _LatentLinear
            module.expand_kv = _share_one_key


def _share_one_key(
    latents: torch.Tensor, rotary_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key that all heads share; its first numbers are their value."""
    return torch.cat([latents, rotary_keys], dim=-1), latents


def find_projection(module: nn.Module) -> LatentProjection | None:
    """That of an attention module; None if it caches keys and values."""
    if getattr(module, "expand_kv", None) is not _share_one_key:
        return None
    plain, rotary, value = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    return LatentProjection(
        linear=module.kv_b_proj,
        num_heads=module.kv_b_proj.out_features // (plain + value),
        key_width=plain + rotary,
        value_width=value,
        rotary_width=rotary,
    )
