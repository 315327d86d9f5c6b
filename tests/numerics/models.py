"""Small random checkpoints of every architecture under test, and what `generate` says to them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

MAX_TOKENS = 12
MAX_MODEL_LEN = 64
WINDOW = 6

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": MAX_MODEL_LEN, "vocab_size": 128}
_GPT2_IDS = {"bos_token_id": None, "eos_token_id": None}

CONFIGS = {
    "llama": _COMMON,
    "llama_tied": _COMMON | {"tie_word_embeddings": True},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 24},
    "mistral": _COMMON | {"head_dim": 16, "sliding_window": WINDOW},
    "gemma2": _COMMON
    | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
    | {"layer_types": _ALTERNATING, "attn_logit_softcapping": 2.0},
    "gemma3_text": _COMMON
    | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
    | {"layer_types": _ALTERNATING},
    "phi3": _COMMON | {"sliding_window": WINDOW},
    "gpt2": _GPT2 | _GPT2_IDS,
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "mixtral": _COMMON | _EXPERTS,
    # Its config says a window of 0, which no layer uses.
    "qwen2_moe": _COMMON
    | {"num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "qwen3_moe": _COMMON | _EXPERTS | {"moe_intermediate_size": 48},
    "deepseek_v3": _COMMON
    | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8}
    | {"qk_nope_head_dim": 16, "v_head_dim": 12, "head_dim": 8, "moe_intermediate_size": 48}
    | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    | {"first_k_dense_replace": 1},
    # Its last layer has no rotary embedding, but a scale for each position.
    "beam": _COMMON
    | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    | {"n_group": 2, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"] * 2},
    # Its attention is not told the window; only its mask is.
    "phimoe": _COMMON | _EXPERTS | {"sliding_window": WINDOW},
    "gpt_oss": _COMMON
    | _EXPERTS
    | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
}


@dataclass(frozen=True)
class SmallModel:
    """A checkpoint, prompts, and the greedy continuation of each prompt alone."""

    path: Path
    prompts: list[list[int]]
    continuations: list[list[int]]


def make_small_model(name: str, path: Path) -> SmallModel:
    save_checkpoint(name, path)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, 128, (length,), generator=generator).tolist() for length in (11, 3, 17, 6)
    ]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return SmallModel(path, prompts, [_continue_greedily(model, prompt) for prompt in prompts])


def save_checkpoint(name: str, path: Path) -> None:
    """Weights large enough that greedy continuations do not settle on one token."""
    model_type = name.removesuffix("_tied")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**CONFIGS[name]))
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter is embedding:
                parameter.normal_(std=0.02)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)


def _continue_greedily(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()
