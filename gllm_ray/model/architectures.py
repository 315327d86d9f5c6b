"""Which architectures are served, and why the others are not.

A type is served once its greedy tokens were seen to equal `generate`'s for 1, 2 and 4 stages in
float32 with chunked prefill and mixed batches. Anything else is refused, because a model whose
state or attention is not fully covered answers with wrong tokens rather than with an error.
"""

from typing import Any

_SERVED = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe cwm deepseek_v2
    deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2
    gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 hyperclovax jais2 jetmoe kolibri1 laguna llama mellum mimo_v2_flash minicpm3 minimax_m2
    ministral ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3
    olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open
    stablelm starcoder2 vaultgemma youtu
"""

_REASONS = {
    "it keeps recurrent, convolution or linear-attention state beside the KV cache": """
        qwen3_next qwen3_5_text qwen3_5_moe_text jamba bamba mamba mamba2 falcon_mamba falcon_h1
        nemotron_h granitemoehybrid olmo_hybrid recurrent_gemma zamba zamba2 bailing_hybrid lfm2
        lfm2_moe lfm3 minimax kimi_linear rwkv xlstm zaya
    """,
    "its attention is computed outside of transformers' attention interface": """
        falcon gptj gpt_neo codegen bloom mpt gpt_neox_japanese diffllama doge
    """,
    "its sparse-attention indexer needs a dense mask": """
        deepseek_v32 deepseek_v4 glm_moe_dsa axk2 hy_v4 dots3_note minimax_m3_vl_text
    """,
    "its layers share KV, or its masks are not those of plain or sliding-window attention": """
        gemma3n_text gemma4_text gemma4_unified llama4_text cohere_compass_text
    """,
    "its attention adds a position bias": "inkling_text inkling2_text",
}


def refusal_reason(model_type: str, config: dict[str, Any]) -> str | None:
    """Why a model with this `config.json` cannot be served, or None if it can."""
    if model_type in _SERVED.split():
        return _unusual_setting(config)
    for reason, model_types in _REASONS.items():
        if model_type in model_types.split():
            return reason
    if "auto_map" in config:
        return "it needs code of its own (auto_map), and code from a checkpoint is never run"
    if "text_config" in config:
        return "it reads more than text; use the text-only checkpoint of the same model"
    return "its tokens were never compared with those of transformers' generate"


def _unusual_setting(config: dict[str, Any]) -> str | None:
    """Why this variant of a served architecture cannot be served, or None if it can."""
    width = config.get("hidden_size")
    if config.get("word_embed_proj_dim", width) != width:
        return "its embedding is projected to another width (word_embed_proj_dim)"
    odd_layers = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if odd_layers:
        return f"it has layers of type {', '.join(sorted(odd_layers))}"
    return None
