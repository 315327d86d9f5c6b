"""The services that `gllm-ray bench fidelity` measures: two stages on CPU, one core each."""

import json
from pathlib import Path
from typing import Any

from gllm_ray.config import ServiceConfig, parse_service_config

_DEMO: dict[str, Any] = {
    "path": "package://gllm_ray/demo/model",
    "dtype": "float32",
    "max_model_len": 1024,
}
# 100 million parameters in the proportions of a small llama.
_RANDOM_100M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16_000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
MODELS = ("demo", "random_100m")


def fidelity_service(model: str, directory: Path) -> ServiceConfig:
    """A service of one of `MODELS`.

    Args:
        model: Which.
        directory: Empty; gets the config.json of a model that has no weights of its own.
    """
    options = _DEMO
    if model == "random_100m":
        (directory / "config.json").write_text(json.dumps(_RANDOM_100M), encoding="utf-8")
        options = {"path": str(directory), "load_format": "dummy", "served_name": model}
    policy = {"name": "token_throttling", "max_prefill_tokens": 512}
    return parse_service_config(
        {
            "model": options,
            "pipeline": {"device": "cpu", "num_stages": 2},
            "kv_cache": {"kv_cache_bytes": "256MiB"},
            "scheduler": {"policy": policy, "max_decodes": 64},
        }
    )
