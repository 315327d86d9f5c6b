"""How the log probabilities of a prompt travel: as bytes, which who passes them on need not read.

A record for each token, all of one length. As numbers of Python they would be ten times as large.
"""

from typing import NamedTuple

import numpy as np


class PromptTokenLogprobs(NamedTuple):
    """How likely the model found a token of a prompt; see `TokenLogprobs`.

    Attributes:
        logprob: The token's.
        rank: 1 where no token was more likely, and so on.
        top: Ids and log probabilities of the most likely tokens, the likeliest first.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def pack_prompt_logprobs(
    logprobs: np.ndarray, ranks: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray
) -> bytes:
    """Spell what is known of some tokens; what is spelled of the next ones may be put behind it.

    Args:
        logprobs: `[num_tokens]`, see `PromptTokenLogprobs`, like the others.
        ranks: `[num_tokens]`.
        top_ids: `[num_tokens, num_likely]`.
        top_logprobs: `[num_tokens, num_likely]`.
    """
    records = np.empty(len(logprobs), dtype=_record(top_ids.shape[1]))
    records["logprob"], records["rank"] = logprobs, ranks
    records["top_ids"], records["top_logprobs"] = top_ids, top_logprobs
    return records.tobytes()


def read_prompt_logprobs(packed: bytes, num_tokens: int) -> list[PromptTokenLogprobs]:
    """What was spelled of so many tokens."""
    if not num_tokens:
        return []
    num_likely = (len(packed) // num_tokens - _record(0).itemsize) // 8
    records = np.frombuffer(packed, dtype=_record(num_likely), count=num_tokens)
    columns = (records[name].tolist() for name in ("logprob", "rank", "top_ids", "top_logprobs"))
    return [
        PromptTokenLogprobs(logprob, rank, tuple(zip(ids, logprobs, strict=True)))
        for logprob, rank, ids, logprobs in zip(*columns, strict=True)
    ]


def _record(num_likely: int) -> np.dtype:
    return np.dtype(
        [
            ("logprob", "<f4"),
            ("rank", "<i4"),
            ("top_ids", "<i4", (num_likely,)),
            ("top_logprobs", "<f4", (num_likely,)),
        ]
    )
