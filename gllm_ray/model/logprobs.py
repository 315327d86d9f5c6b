"""How likely the model finds tokens, for the rows that ask.

The numbers are those of the logits as they are: temperature, top k and the like, and what a grammar
rules out, do not show. vLLM calls them raw log probabilities.
"""

from collections.abc import Sequence

import numpy as np
import torch

from gllm_ray.messages import SamplingParams, TokenLogprobs
from gllm_ray.model.inputs import to_device

# Logits that are looked at together; each takes some 20 bytes.
_MAX_WORKSPACE = 2**22
# Less likely than anything; JSON can spell neither an infinity nor what is no number.
MIN_LOGPROB = -9999.0


def find_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], params: Sequence[SamplingParams]
) -> tuple[TokenLogprobs | None, ...]:
    """The log probabilities of drawn tokens, and the most likely ones beside them.

    Args:
        logits: `[rows, vocab_size]`, as the model gave them.
        token_ids: What was drawn from each row.
        params: Which rows ask, and for how many; the others cost nothing.

    Returns:
        One for each row, None for those that do not ask; empty if none does.
    """
    asking = [row for row, rule in enumerate(params) if rule.num_logprobs is not None]
    if not asking:
        return ()
    found: list[TokenLogprobs | None] = [None] * len(params)
    step = rows_at_once(logits)
    for first in range(0, len(asking), step):
        rows = asking[first : first + step]
        nums = [params[row].num_logprobs or 0 for row in rows]
        told = _find(logits, rows, [token_ids[row] for row in rows], max(nums))
        for row, num, (logprob, ids, logprobs) in zip(rows, nums, told, strict=True):
            found[row] = TokenLogprobs(logprob, tuple(zip(ids[:num], logprobs[:num], strict=True)))
    return tuple(found)


def rows_at_once(logits: torch.Tensor) -> int:
    """Rows of logits whose log probabilities there may be at a time."""
    return max(1, _MAX_WORKSPACE // logits.shape[-1])


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of each token in each row, in float32; all of them numbers."""
    log_probs = logits.float().log_softmax(dim=-1)
    return log_probs.nan_to_num_(nan=MIN_LOGPROB).clamp_(min=MIN_LOGPROB)


def _find(
    logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], num: int
) -> list[tuple[float, list[int], list[float]]]:
    """Of each of these rows the token's, and the ids and log probabilities of the likeliest."""
    indices, tokens = to_device(np.array([rows, token_ids]), logits.device)
    log_probs = log_probabilities(logits[indices])
    drawn = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
    top, ids = log_probs.topk(min(num, log_probs.shape[-1]), dim=-1)
    return list(zip(drawn.tolist(), ids.tolist(), top.tolist(), strict=True))
