"""Log probabilities as OpenAI's two routes spell them."""

from collections.abc import Callable, Sequence
from typing import Any

from gllm_ray.model.prompt_logprobs import PromptTokenLogprobs
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
    """Those of a completion: the likeliest tokens, and always the token's own."""

    def spell(token_id: int) -> str:
        return _token(token_bytes(token_id))

    def spell_top(token: ScoredToken) -> dict[str, float] | None:
        if token.logprobs is None:
            return None
        likely = {spell(token.token_id): token.logprobs.logprob}
        for token_id, logprob in token.logprobs.top:
            likely.setdefault(spell(token_id), logprob)  # other tokens may be spelled alike
        return likely

    return {
        "tokens": [spell(token.token_id) for token in scored],
        "token_logprobs": [token.logprobs and token.logprobs.logprob for token in scored],
        "top_logprobs": [spell_top(token) for token in scored],
        "text_offset": [token.text_offset for token in scored],
    }


def prompt_logprobs(
    token_ids: Sequence[int],
    told: Sequence[PromptTokenLogprobs],
    num_likely: int,
    token_bytes: TokenBytes,
) -> list[dict[str, Any] | None]:
    """Those of a prompt as vLLM spells them: null, then by id each token's own and the likeliest.

    Args:
        token_ids: The prompt.
        told: Of each of its tokens but the first.
        num_likely: How many of the likeliest to show.
        token_bytes: What a token stands for.
    """

    def spell(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = _token(token_bytes(token_id))
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    spelled: list[dict[str, Any] | None] = [None]
    for token_id, (logprob, rank, top) in zip(token_ids[1:], told, strict=True):
        tokens = {str(token_id): spell(token_id, logprob, rank)}
        for place, (likely_id, its_logprob) in enumerate(top[:num_likely], 1):
            tokens.setdefault(str(likely_id), spell(likely_id, its_logprob, place))
        spelled.append(tokens)
    return spelled


def _token(text: bytes) -> str:
    """A token as text; one that is no text by itself by its bytes, as OpenAI writes them."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
