"""What a model computes, stores and caches: matrices, experts, heads and windows of each layer."""

from dataclasses import dataclass
from typing import NamedTuple

from gllm_ray.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Gemm(NamedTuple):
    """A matrix of weights that every row is multiplied with."""

    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Multi-head latent attention: a latent and a rotary key are cached in place of all heads.

    Attributes:
        kv_rank: Width of the latent.
        query_rank: Width of the query's latent; None where queries are projected at once.
        rope_dim: Width of the rotary key that all heads share.
    """

    kv_rank: int
    query_rank: int | None
    rope_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The attention of one layer.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values; those of queries where a latent is cached.
        key_dim: Width of a query's or a key's head.
        value_dim: Width of a value's head.
        window: Positions a token attends to, itself included; None means all.
        latent: What is cached in place of heads; None for plain attention.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    latent: LatentShape | None = None

    def gemms(self, hidden_size: int, num_shards: int = 1) -> list[Gemm]:
        """The projections of one of `num_shards` tensor-parallel ranks, query to output."""
        heads = self.num_heads // num_shards
        output = Gemm(heads * self.value_dim, hidden_size)
        if self.latent is None:
            kv_width = self._kv_heads(num_shards) * (self.key_dim + self.value_dim)
            return [Gemm(hidden_size, heads * self.key_dim + kv_width), output]
        latent, expanded = self.latent, self._expanded_values(num_shards)
        queries = [Gemm(hidden_size, heads * self.key_dim)]
        if latent.query_rank is not None:
            queries = [
                Gemm(hidden_size, latent.query_rank),
                Gemm(latent.query_rank, heads * self.key_dim),
            ]
        return [
            *queries,
            Gemm(hidden_size, latent.kv_rank + latent.rope_dim),
            Gemm(latent.kv_rank, expanded),
            output,
        ]

    def cached_values(self, num_shards: int = 1) -> int:
        """Numbers that a rank caches per token; a latent is cached by every rank."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return self._kv_heads(num_shards) * (self.key_dim + self.value_dim)

    def prefill_pair_flops(self, num_shards: int = 1) -> int:
        """Operations of a rank for one query-key pair of a prefill chunk."""
        return 2 * (self.num_heads // num_shards) * (self.key_dim + self.value_dim)

    def decode_pair_flops(self, num_shards: int = 1) -> int:
        """The same for a decode, which attends to latents themselves where these are cached."""
        if self.latent is None:
            return self.prefill_pair_flops(num_shards)
        widths = 2 * self.latent.kv_rank + self.latent.rope_dim
        return 2 * (self.num_heads // num_shards) * widths

    def _expanded_values(self, num_shards: int) -> int:
        """Numbers that a rank computes from a latent: values, and keys without the rotary part."""
        assert self.latent is not None
        key_dim = self.key_dim - self.latent.rope_dim
        return (self.num_heads // num_shards) * (key_dim + self.value_dim)

    def _kv_heads(self, num_shards: int) -> int:
        """Heads of a rank; with more ranks than heads, several ranks hold the same head."""
        return max(1, self.num_kv_heads // num_shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpShape:
    """The feed-forward part of one layer: dense, or a mixture of experts.

    Attributes:
        intermediate_size: Of the dense MLP, or of one expert.
        is_gated: Whether there is a gate beside the up projection.
        num_experts: Routed experts; 0 for a dense MLP.
        num_experts_per_token: Experts that a token is routed to.
        shared_size: Intermediate size of the experts that every token passes, taken together.
    """

    intermediate_size: int
    is_gated: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0
    shared_size: int = 0

    def gemms(self, hidden_size: int, num_shards: int = 1) -> list[Gemm]:
        """What every token passes on one rank: the dense MLP, or router and shared experts."""
        if self.num_experts == 0:
            return self._up_and_down(hidden_size, self.intermediate_size // num_shards)
        shared = self._up_and_down(hidden_size, self.shared_size // num_shards)
        return [Gemm(hidden_size, self.num_experts), *(shared if self.shared_size else ())]

    def expert_gemms(self, hidden_size: int, num_shards: int = 1) -> list[Gemm]:
        """One routed expert on one rank, each expert being cut like a dense MLP; empty if none."""
        if self.num_experts == 0:
            return []
        return self._up_and_down(hidden_size, self.intermediate_size // num_shards)

    def _up_and_down(self, hidden_size: int, width: int) -> list[Gemm]:
        return [Gemm(hidden_size, width * (1 + self.is_gated)), Gemm(width, hidden_size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        hidden_size: Width of the residual stream.
        is_parallel: Attention and MLP read the same input, and are summed with one all-reduce.
    """

    hidden_size: int
    attention: AttentionShape
    mlp: MlpShape
    is_parallel: bool = False

    @property
    def num_all_reduces(self) -> int:
        """All-reduces of a tensor-parallel layer."""
        return 1 if self.is_parallel else 2

    def gemms(self, num_shards: int = 1) -> list[Gemm]:
        """What every token passes on one rank."""
        return [
            *self.attention.gemms(self.hidden_size, num_shards),
            *self.mlp.gemms(self.hidden_size, num_shards),
        ]

    def num_parameters(self, num_shards: int = 1) -> int:
        """Weights of one rank, biases and norms left out."""
        experts = self.mlp.expert_gemms(self.hidden_size, num_shards)
        return _num_weights(self.gemms(num_shards)) + self.mlp.num_experts * _num_weights(experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only language model.

    Attributes:
        layers: In order; equal layers are equal values.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the embedding, and columns of the head.
        is_tied: Whether the head is the embedding.
        position_rows: Rows of a learnt position embedding; 0 where positions are rotary.
        dtype: Of weights, activations and KV cache: `bfloat16`, `float16` or `float32`.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    is_tied: bool
    position_rows: int = 0
    dtype: str = "bfloat16"

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight, an activation or a cached number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def embedding_parameters(self) -> int:
        """Weights that the first stage holds besides its layers."""
        return (self.vocab_size + self.position_rows) * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Weights that the last stage holds besides its layers, a tied head included."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied ones counted once; biases and norms left out."""
        head = 0 if self.is_tied else self.head_parameters
        layers = sum(layer.num_parameters() for layer in self.layers)
        return self.embedding_parameters + layers + head

    def kv_bytes_per_token(self, layer: int, num_shards: int = 1) -> int:
        """Bytes that a rank caches per token in one layer; a window does not make it less."""
        return self.layers[layer].attention.cached_values(num_shards) * self.value_bytes

    def check_shards(self, num_shards: int) -> None:
        """Refuse a tensor-parallel degree that cuts a head or a matrix.

        Raises:
            ConfigError: Some layer's heads or MLP cannot be shared evenly.
        """
        for layer in dict.fromkeys(self.layers):
            sizes = {
                "attention heads": layer.attention.num_heads,
                "MLP columns": layer.mlp.intermediate_size,
                "columns of shared experts": layer.mlp.shared_size,
            }
            for name, size in sizes.items():
                if size % num_shards:
                    raise ConfigError(
                        f"tensor_parallel={num_shards}: {size} {name} cannot be shared evenly; "
                        f"must divide {size}"
                    )
            heads = layer.attention.num_kv_heads
            if layer.attention.latent is None and heads % num_shards and num_shards % heads:
                raise ConfigError(
                    f"tensor_parallel={num_shards}: {heads} KV heads cannot be shared evenly; must "
                    f"divide {heads}, or be a multiple of it"
                )


def _num_weights(gemms: list[Gemm]) -> int:
    return sum(gemm.inputs * gemm.outputs for gemm in gemms)
