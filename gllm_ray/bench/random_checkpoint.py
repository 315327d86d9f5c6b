"""Checkpoints of random weights that any engine can serve, to compare their speed."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16384,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-15m": _LLAMA
    | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-113m": _LLAMA
    | {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "qwen2-500m": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen3-moe-253m": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 384,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 16384,
        "tie_word_embeddings": False,
    },
}
_MAX_LEN = 4096
_EOS_TOKEN_ID = 1  # of the demo model's tokenizer


def write_random_checkpoint(shape: str, directory: Path, *, dtype: str, seed: int = 0) -> None:
    """Write a model, a tokenizer, and `serve.yaml`: two stages of it on CPU.

    Args:
        shape: Of the model, one of `SHAPES`.
        directory: Made where there is none.
        dtype: Of the weights, such as `bfloat16`.
        seed: Of the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    options = SHAPES[shape] | {
        "eos_token_id": _EOS_TOKEN_ID,
        "bos_token_id": None,
        "max_position_embeddings": _MAX_LEN,
    }
    config = AutoConfig.for_model(**options)
    torch.manual_seed(seed)
    factory: Any = AutoModelForCausalLM  # which has no types
    model = factory.from_config(config, dtype=getattr(torch, dtype))
    for weight in model.parameters():
        # So that logits differ by more than rounding does.
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    _write_tokenizer(directory, config.vocab_size)
    serve_file = yaml.safe_dump(_serve_file(shape, directory.resolve()), sort_keys=False)
    (directory / "serve.yaml").write_text(serve_file, encoding="utf-8")


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """The demo model's, with a word for each token that the model has and it has not.

    A token without text could not be seen in a stream, and its latency not be measured.
    """
    demo = files("gllm_ray") / "demo" / "model" / "tokenizer.json"
    tokenizer = json.loads(demo.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    words = range(len(vocabulary), vocab_size)
    vocabulary |= {f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}{word}": word for word in words}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    # The class that all versions of transformers know.
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")


def _serve_file(shape: str, directory: Path) -> dict[str, Any]:
    args = {
        "model": {"path": str(directory), "served_name": shape, "max_model_len": 2048},
        "pipeline": {"num_stages": 2, "device": "cpu", "cpus_per_stage": 0.9},
        "kv_cache": {"kv_cache_bytes": "1GiB"},
        "scheduler": {"policy": "balanced", "prefix_caching": False},
    }
    application = {
        "name": shape,
        "route_prefix": "/",
        "import_path": "gllm_ray.serving.app:build_app",
        "args": args,
    }
    return {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [application]}
