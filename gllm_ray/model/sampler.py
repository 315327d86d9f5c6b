"""Drawing the next tokens from logits, each row by its own rules.

A draw is a pure function of the row's logits, its rules, its seed and its position: one uniform
number from a counter-based hash, looked up in the cumulative probabilities of the kept tokens,
most likely first. What else is in the batch, and how it was split, never shows.
"""

from collections.abc import Sequence

import numpy as np
import torch

from gllm_ray.messages import SamplingParams
from gllm_ray.model.inputs import to_device

# Enough candidates for nearly every row; the few rows that need more are sorted in full.
_NUM_CANDIDATES = 256
# Logits that are drawn from at a time; a sort in full takes some 70 bytes for each.
_MAX_WORKSPACE = 2**22
# Below this the most likely token is all but certain, so it is taken as it is.
_MIN_TEMPERATURE = 1e-5
# Wider than any real logit, and no difference of two overflows over `_MIN_TEMPERATURE`.
_MAX_LOGIT = 1e30
_MASK_64 = 2**64 - 1


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> tuple[int, ...]:
    """Draw one token per row; a row of whatever numbers, NaN included, gets a valid one.

    Args:
        logits: `[rows, vocab_size]`.
        params: How to draw, one per row.
        positions: Position the drawn token will have in its sequence, one per row.
    """
    if not params:
        return ()
    vocab_size = logits.shape[-1]
    tokens = _argmax(logits)
    is_open = torch.zeros_like(tokens)

    def draw(rows: Sequence[int], num_candidates: int) -> None:
        step = max(1, _MAX_WORKSPACE // vocab_size)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            columns = to_device(_columns(part, params, positions, vocab_size), logits.device)
            index = to_device(np.array(part), logits.device)
            tokens[index], is_open[index] = _draw(logits[index].float(), columns, num_candidates)

    drawn = [row for row, rule in enumerate(params) if rule.temperature >= _MIN_TEMPERATURE]
    draw(drawn, min(_NUM_CANDIDATES, vocab_size))
    # The one time that the device is waited for, but for rows the candidates are not enough for.
    drawn_tokens, open_rows = torch.stack([tokens, is_open]).tolist()
    if not any(open_rows):
        return tuple(drawn_tokens)
    draw([row for row, open_ in enumerate(open_rows) if open_], vocab_size)
    return tuple(tokens.tolist())


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type == "cpu":
        # torch's takes ten times as long as numpy's.
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random in both arguments.

    Source: the finalizer of splitmix64 (Steele, Lea and Flood, 2014), applied to each in turn.
    """
    return (_splitmix64(_splitmix64(seed & _MASK_64) ^ position) >> 11) / 2**53


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)


def _columns(
    rows: Sequence[int], params: Sequence[SamplingParams], positions: Sequence[int], vocab_size: int
) -> np.ndarray:
    """Temperature, top k, top p, min p and the uniform number of each row, float64."""

    def column(rule: SamplingParams, position: int) -> tuple[float, ...]:
        top_k = min(rule.top_k or vocab_size, vocab_size)
        number = uniform(rule.seed, position)
        return rule.temperature, top_k, rule.top_p, rule.min_p, number

    return np.array([column(params[row], positions[row]) for row in rows])


def _draw(
    logits: torch.Tensor, columns: torch.Tensor, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the most likely tokens; see `_draw_among`. Overwrites the logits."""
    logits = logits.nan_to_num_(nan=-_MAX_LOGIT).clamp_(-_MAX_LOGIT, _MAX_LOGIT)
    logits = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(columns[:, :1].float())
    return _draw_among(torch.log_softmax(logits, dim=-1), num_candidates, columns)


def _draw_among(
    log_probs: torch.Tensor, num_candidates: int, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the most likely tokens.

    Returns:
        The token of each row, and 1 where the candidates are not enough to tell it, else 0.
    """
    vocab_size = log_probs.shape[-1]
    _, top_k, top_p, min_p, uniforms = columns.unsqueeze(-1).unbind(1)
    candidates, ids = _most_likely(log_probs, num_candidates)
    candidates = candidates.double().exp()
    cumulative = candidates.cumsum(dim=-1)
    in_top_k = torch.arange(num_candidates, device=ids.device) < top_k
    keeps_all_ranks = top_k >= vocab_size
    top_k_mass = torch.where(
        keeps_all_ranks, 1.0, (candidates * in_top_k).sum(dim=-1, keepdim=True)
    )
    in_top_p = (cumulative - candidates < top_p * top_k_mass) | (top_p >= 1)
    kept = in_top_k & in_top_p & (candidates >= min_p * candidates[:, :1])

    keeps_all = keeps_all_ranks & (top_p >= 1) & (min_p <= 0)
    kept_mass = torch.where(keeps_all, 1.0, (candidates * kept).sum(dim=-1, keepdim=True))
    target = uniforms * kept_mass
    rank = (cumulative <= target).sum(dim=-1, keepdim=True)
    rank = rank.minimum(kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    is_mass_known = keeps_all_ranks | (top_k <= num_candidates) | (top_p >= 1)
    is_cut_inside = ~kept[:, -1:] & is_mass_known
    is_done = is_cut_inside | (keeps_all & (target < cumulative[:, -1:]))
    # Tokens as likely as the last candidate may be missing among the candidates.
    is_done &= candidates.gather(-1, rank) > candidates[:, -1:]
    is_done |= num_candidates == vocab_size
    return ids.gather(-1, rank).squeeze(-1), (~is_done).long().squeeze(-1)


def _most_likely(log_probs: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row and their token ids, equal ones in the order of their ids."""
    if num == log_probs.shape[-1]:
        return log_probs.sort(dim=-1, descending=True, stable=True)
    ids = log_probs.topk(num, sorted=False).indices.sort(dim=-1).values
    largest, order = log_probs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return largest, ids.gather(-1, order)
