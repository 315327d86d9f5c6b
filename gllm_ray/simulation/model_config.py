"""The shape of a model from its Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

from gllm_ray.errors import ConfigError
from gllm_ray.model.quantized_checkpoint import quantized_format
from gllm_ray.simulation.model_shape import (
    DTYPE_BYTES,
    AttentionShape,
    LatentShape,
    LayerShape,
    MlpShape,
    ModelShape,
)

_GATED_TYPES = """
    aria_text axk1 cohere cohere2 cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4
    exaone_moe flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 hyperclovax llama mellum minicpm3 minimax_m2 ministral ministral3 mistral mixtral olmo
    olmo2 olmo3 olmoe phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open
    stablelm vaultgemma youtu
"""
_UNGATED_TYPES = """
    apertus arcee biogpt bloom codegen falcon gpt2 gpt_bigcode gpt_neox gptj jais2 nanochat nemotron
    opt persimmon phi starcoder2
"""
_GATED = frozenset(_GATED_TYPES.split())
_UNGATED = frozenset(_UNGATED_TYPES.split())
# Attention and MLP read the same input, whatever the configuration says.
_PARALLEL = frozenset({"codegen", "cohere", "cohere2", "gptj", "phi"})
_LEARNT_POSITIONS = frozenset({"biogpt", "gpt2", "gpt_bigcode", "opt"})
# The window is that of every layer where neither layer types nor a pattern are given.
_WINDOWED = frozenset({"ministral", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"})
_WINDOW_PATTERNS = {"cohere2": 4, "gemma2": 2, "gemma3_text": 6}
_FULL, _SLIDING = "full_attention", "sliding_attention"

_MAX_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer")
_HIDDEN = ("hidden_size", "n_embd", "n_embed")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_SIZE = ("shared_expert_intermediate_size", "shared_intermediate_size")
_FIRST_SPARSE = ("first_k_dense_replace", "moe_layer_start_index")
_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")
_POSITIONS = ("max_position_embeddings", "n_positions")
_LISTS = ("layer_types", "mlp_layer_types", "mlp_only_layers")
_DTYPE = ("dtype", "torch_dtype")


def parse_model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Describe the language model of a config.json; of a model that also sees, its text part.

    Raises:
        ConfigError: The architecture is not known, a size is missing, or the weights are quantized
            in a way that cannot be read.
    """
    text = config.get("text_config")
    return _Reader({**config, **text} if isinstance(text, Mapping) else config).model()


class _Reader:
    """Reads sizes under the names that the architectures have for them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._type = str(config.get("model_type"))
        if self._type not in _GATED | _UNGATED:
            raise ConfigError(
                f"model_type={self._type!r}: the shape of this architecture is not known; must be "
                f"one of {', '.join(sorted(_GATED | _UNGATED))}"
            )
        if quantization := config.get("quantization_config"):
            quantized_format(quantization)  # at load its weights become full numbers
        for key in _LISTS:
            value = self._get(key)
            if value is not None and not isinstance(value, list | tuple):
                raise ConfigError(f"{key}={value!r}: must be a list")
        self._num_layers = self._size(_LAYERS)
        if self._num_layers > _MAX_LAYERS:
            raise ConfigError(f"{_LAYERS[0]}={self._num_layers}: must be <= {_MAX_LAYERS}")
        self._hidden_size = self._size(_HIDDEN)

    def model(self) -> ModelShape:
        layers = tuple(
            LayerShape(
                hidden_size=self._hidden_size,
                attention=self._attention(window),
                mlp=self._experts() if self._is_sparse(layer) else self._dense_mlp(),
                is_parallel=self._is_parallel(),
            )
            for layer, window in enumerate(self._windows())
        )
        return ModelShape(
            layers=layers,
            hidden_size=self._hidden_size,
            vocab_size=self._size(("vocab_size",)),
            is_tied=bool(self._config.get("tie_word_embeddings", True)),
            position_rows=self._size(_POSITIONS) if self._type in _LEARNT_POSITIONS else 0,
            dtype=self._dtype(),
        )

    def _attention(self, window: int | None) -> AttentionShape:
        num_heads = self._size(_HEADS)
        if kv_rank := self._count("kv_lora_rank"):
            rope_dim = self._size(("qk_rope_head_dim",))
            return AttentionShape(
                num_heads=num_heads,
                num_kv_heads=num_heads,
                key_dim=self._size(("qk_nope_head_dim",)) + rope_dim,
                value_dim=self._size(("v_head_dim",)),
                window=window,
                latent=LatentShape(
                    kv_rank=kv_rank,
                    query_rank=self._count("q_lora_rank") or None,
                    rope_dim=rope_dim,
                ),
            )
        head_dim = self._size(("head_dim",), default=self._hidden_size // num_heads)
        num_kv_heads = self._num_kv_heads(num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(f"{_KV_HEADS[0]}={num_kv_heads}: must divide {_HEADS[0]}={num_heads}")
        return AttentionShape(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            window=window,
        )

    def _num_kv_heads(self, num_heads: int) -> int:
        if self._get("multi_query") and not self._get("new_decoder_architecture"):
            return 1
        return self._size(_KV_HEADS, default=num_heads)

    def _dense_mlp(self) -> MlpShape:
        default = None if self._type in _GATED else 4 * self._hidden_size
        return MlpShape(
            intermediate_size=self._size(_INTERMEDIATE, default=default),
            is_gated=self._type in _GATED,
        )

    def _experts(self) -> MlpShape:
        size = self._count("moe_intermediate_size") or self._size(_INTERMEDIATE)
        num_experts, num_active = self._count(*_EXPERTS), self._size(_ACTIVE_EXPERTS)
        if num_active > num_experts:
            raise ConfigError(
                f"{_ACTIVE_EXPERTS[0]}={num_active}: must be <= the {num_experts} experts"
            )
        return MlpShape(
            intermediate_size=size,
            num_experts=num_experts,
            num_experts_per_token=num_active,
            shared_size=self._count(*_SHARED_SIZE) or self._count(*_SHARED_EXPERTS) * size,
        )

    def _is_sparse(self, layer: int) -> bool:
        kinds = self._get("mlp_layer_types")
        if not self._count(*_EXPERTS) or layer in (self._get("mlp_only_layers") or ()):
            return False
        if kinds is not None:
            if len(kinds) != self._num_layers:
                raise ConfigError(
                    f"mlp_layer_types: {len(kinds)} layers; must be {self._num_layers}"
                )
            return bool(kinds[layer] == "sparse")
        step = self._count("decoder_sparse_step", "moe_layer_interval") or 1
        return layer >= self._count(*_FIRST_SPARSE) and not (layer + 1) % step

    def _is_parallel(self) -> bool:
        if self._type == "gpt_neox":
            return bool(self._config.get("use_parallel_residual", True))
        flags = ("parallel_attn", "new_decoder_architecture", "use_parallel_residual")
        return self._type in _PARALLEL or any(self._get(flag) for flag in flags)

    def _windows(self) -> list[int | None]:
        """The window of each layer, None for those that look back over everything."""
        window = self._count("sliding_window")
        if not window or self._config.get("use_sliding_window") is False:
            return [None] * self._num_layers
        return [window if kind == _SLIDING else None for kind in self._layer_types()]

    def _layer_types(self) -> list[str]:
        kinds = self._get("layer_types")
        if kinds is not None:
            unknown = sorted({str(kind) for kind in kinds} - {_FULL, _SLIDING})
            if len(kinds) != self._num_layers or unknown:
                raise ConfigError(
                    f"layer_types: {len(kinds)} layers, other types: {', '.join(unknown) or 'none'}"
                    f"; must be {self._num_layers} times {_FULL} or {_SLIDING}"
                )
            return list(kinds)
        if pattern := self._count(*_PATTERN) or _WINDOW_PATTERNS.get(self._type):
            return [_SLIDING if (i + 1) % pattern else _FULL for i in range(self._num_layers)]
        num_full = 0 if self._type in _WINDOWED else self._get("max_window_layers")
        if num_full is None:
            raise ConfigError(
                "layer_types: required where there is a sliding_window, but not given; must say "
                f"of each layer whether it is of {_FULL} or {_SLIDING}"
            )
        return [_FULL if i < num_full else _SLIDING for i in range(self._num_layers)]

    def _dtype(self) -> str:
        dtype = str(self._get(*_DTYPE) or "bfloat16")
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype={dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")
        return dtype

    def _get(self, *keys: str) -> Any:  # noqa: ANN401
        """The first value given under any of the keys."""
        values = (self._config.get(key) for key in keys)
        return next((value for value in values if value is not None), None)

    def _size(self, keys: tuple[str, ...], default: int | None = None) -> int:
        value = self._count(*keys) or default
        if not value:
            raise ConfigError(f"{keys[0]}: required, but not given; must be an integer >= 1")
        return value

    def _count(self, *keys: str) -> int:
        """The same for a size that may be missing, which is 0."""
        value = self._get(*keys)
        if value is not None and (type(value) is not int or value < 0):
            raise ConfigError(f"{keys[0]}={value!r}: must be an integer >= 0")
        return value or 0
