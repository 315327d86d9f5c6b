"""Log probabilities as OpenAI's two routes spell them."""

from collections.abc import Callable, Sequence
from typing import Any

from gllm_ray.serving.text_stream import ScoredToken

TokenBytes = Callable[[int], bytes]


def chat_logprobs(scored: Sequence[ScoredToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """Those of a chat completion: the likeliest tokens, the drawn one only if it is one of them."""

    def spell(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_bytes(token_id)
        return {"token": _token(text), "logprob": logprob, "bytes": list(text)}

    content = [
        {
            **spell(token.token_id, token.logprobs.logprob),
            "top_logprobs": [spell(*likely) for likely in token.logprobs.top],
        }
        for token in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(scored: Sequence[ScoredToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """Those of a completion: the likeliest tokens, and always the drawn one."""

    def spell(token_id: int) -> str:
        return _token(token_bytes(token_id))

    top = []
    for token in scored:
        likely = {spell(token.token_id): token.logprobs.logprob}
        for token_id, logprob in token.logprobs.top:
            likely.setdefault(spell(token_id), logprob)  # other tokens may be spelled alike
        top.append(likely)
    return {
        "tokens": [spell(token.token_id) for token in scored],
        "token_logprobs": [token.logprobs.logprob for token in scored],
        "top_logprobs": top,
        "text_offset": [token.text_offset for token in scored],
    }


def _token(text: bytes) -> str:
    """A token as text; one that is no text by itself by its bytes, as OpenAI writes them."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
