"""Drawing the next tokens from logits, each row by its own rules.

A draw is a pure function of the row's logits, its rules, its seed, its position and, given
penalties, the earlier tokens: each kept token draws an exponential number from a counter-based
hash, and the one whose number is the smallest for its probability wins. What else is in the batch,
and how it was split, never shows.

Logits that differ in their last bits, as those of a sequence that is computed again do, hardly ever
change the winner. With one uniform number looked up in cumulative probabilities they do, the more
often the larger the vocabulary, for each boundary between two tokens moves a little.

Source: the exponential race, or Gumbel-max trick (Maddison, Tarlow and Minka, 2014).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gllm_ray.messages import SamplingParams
from gllm_ray.model.inputs import to_device
from gllm_ray.model.logit_changes import NO_CHANGES, LogitChanges

# Enough candidates for nearly every row; the few rows that need more are sorted in full.
_NUM_CANDIDATES = 256
# Logits that are drawn from at a time; a sort in full takes some 70 bytes for each.
_MAX_WORKSPACE = 2**22
# Below this the most likely token is all but certain, so it is taken as it is.
_MIN_TEMPERATURE = 1e-5
# Wider than any real logit, and no difference of two overflows over `_MIN_TEMPERATURE`.
_MAX_LOGIT = 1e30
_MASK_64 = 2**64 - 1
_MASK_31 = 2**31 - 1


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    changes: LogitChanges = NO_CHANGES,
) -> tuple[int, ...]:
    """Draw one token per row; a row of whatever numbers, NaN included, gets a valid one.

    Args:
        logits: `[rows, vocab_size]`.
        params: How to draw, one per row.
        positions: Position the drawn token will have in its sequence, one per row.
        changes: What some of the rows' rules do to their logits before all else.
    """
    if not params:
        return ()
    vocab_size = logits.shape[-1]
    tokens = _argmax(logits)
    is_open = torch.zeros_like(tokens)
    every_token = torch.arange(vocab_size, dtype=torch.int32, device=logits.device).unsqueeze(0)

    def draw(rows: Sequence[int], num_candidates: int | None) -> None:
        for part, index, changed in _in_parts(logits, rows, changes):
            columns = to_device(_columns(part, params, positions, vocab_size), logits.device)
            probs = _probabilities(changed, columns)
            if num_candidates is None:
                tokens[index] = _race(probs, every_token, columns)
            else:
                tokens[index], is_open[index] = _draw_among(probs, num_candidates, columns)

    drawn = [row for row, rule in enumerate(params) if rule.temperature >= _MIN_TEMPERATURE]
    cut = [row for row in drawn if not _keeps_all(params[row], vocab_size)]
    draw([row for row in drawn if _keeps_all(params[row], vocab_size)], None)
    draw(cut, min(_NUM_CANDIDATES, vocab_size))
    greedy = [row for row in changes.rows if params[row].temperature < _MIN_TEMPERATURE]
    for _, index, changed in _in_parts(logits, greedy, changes):
        tokens[index] = _argmax(changed)
    # The one time that the device is waited for, but for rows the candidates are not enough for.
    drawn_tokens, open_rows = torch.stack([tokens, is_open]).tolist()
    if not any(open_rows):
        return tuple(drawn_tokens)
    draw([row for row, open_ in enumerate(open_rows) if open_], vocab_size)
    return tuple(tokens.tolist())


def _in_parts(
    logits: torch.Tensor, rows: Sequence[int], changes: LogitChanges
) -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor]]:
    """Some of the rows at a time, their index, and a float32 copy of their logits, changed."""
    step = max(1, _MAX_WORKSPACE // logits.shape[-1])
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        index = to_device(np.array(part), logits.device)
        changed = logits[index].float()
        changes.apply(changed, part)
        yield part, index, changed


def _keeps_all(rule: SamplingParams, vocab_size: int) -> bool:
    return not 0 < rule.top_k < vocab_size and rule.top_p >= 1 and rule.min_p <= 0


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    # torch's takes ten times as long as numpy's, which knows no bfloat16: but where the largest
    # number is above 0, its bits are the largest integer.
    if logits.dtype is not torch.bfloat16:
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    largest = torch.from_numpy(logits.view(torch.int16).numpy().argmax(axis=-1))
    is_above_0 = logits.gather(-1, largest.unsqueeze(-1)).squeeze(-1) > 0
    if not is_above_0.all():
        largest[~is_above_0] = _argmax(logits[~is_above_0].float())
    return largest


def race_numbers(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Exponential numbers that look random in all arguments, float32 `[rows, tokens]`.

    Args:
        keys: int32 `[rows, 2]`, those of `race_keys`.
        token_ids: int32 `[rows, tokens]` or `[1, tokens]`.

    Source: lowbias32 (Wellons, 2018), of `factor * token_id + offset` modulo 2**32.
    """
    factor, offset = keys.unsqueeze(-1).unbind(1)
    state = token_ids * factor + offset
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        # What an arithmetic shift fills in is masked out.
        state = (state ^ (state >> shift & (1 << 32 - shift) - 1)) * multiplier
    state ^= state >> 16 & 0xFFFF
    # Inside (0, 1), small ones to their last bit: only those win for unlikely tokens.
    uniforms = ((state & _MASK_31).float() + 0.5) * (2**-31 * (1 - 2**-23))
    return uniforms.neg_().log1p_().neg_()


def race_keys(seed: int, position: int) -> tuple[int, int]:
    """The keys of a draw's hash, each a signed number of 32 bits.

    Source: the finalizer of splitmix64 (Steele, Lea and Flood, 2014), applied to each in turn.
    """
    state = _splitmix64(_splitmix64(seed & _MASK_64) ^ position)
    return (state >> 32 | 1) - 2**31, (state & 2**32 - 1) - 2**31


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)


def _columns(
    rows: Sequence[int], params: Sequence[SamplingParams], positions: Sequence[int], vocab_size: int
) -> np.ndarray:
    """Temperature, top k, top p, min p and the two keys of each row, float64."""

    def column(rule: SamplingParams, position: int) -> tuple[float, ...]:
        top_k = min(rule.top_k or vocab_size, vocab_size)
        keys = race_keys(rule.seed, position)
        return rule.temperature, top_k, rule.top_p, rule.min_p, *keys

    return np.array([column(params[row], positions[row]) for row in rows])


def _probabilities(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of each token, at the row's temperature. Overwrites the logits."""
    logits = logits.nan_to_num_(nan=-_MAX_LOGIT).clamp_(-_MAX_LOGIT, _MAX_LOGIT)
    logits = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(columns[:, :1].float())
    return torch.softmax(logits, dim=-1)


def _race(probs: torch.Tensor, token_ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The column of each row that wins; never one of probability below 0."""
    return probs.div_(race_numbers(columns[:, -2:].int(), token_ids.int())).argmax(dim=-1)


def _draw_among(
    probs: torch.Tensor, num_candidates: int, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the most likely tokens.

    Returns:
        The token of each row, and 1 where the candidates are not enough to tell it, else 0.
    """
    vocab_size = probs.shape[-1]
    _, top_k, top_p, min_p, *_ = columns.unsqueeze(-1).unbind(1)
    candidates, ids = _most_likely(probs, num_candidates)
    cumulative = candidates.cumsum(dim=-1, dtype=torch.float64)
    # As in vLLM: min p goes first, then top k; top p counts against the mass that the two leave.
    in_top_k = torch.arange(num_candidates, device=ids.device) < top_k
    in_min_p = candidates >= min_p * candidates[:, :1]
    left = in_top_k & in_min_p
    keeps_all_ranks = (top_k >= vocab_size) & (min_p <= 0)
    mass = torch.where(keeps_all_ranks, 1.0, (candidates * left).sum(dim=-1, keepdim=True))
    in_top_p = (cumulative - candidates < top_p * mass) | (top_p >= 1)
    kept = left & in_top_p & (candidates > 0)
    kept[:, 0] = True

    is_cut_before = (top_k <= num_candidates) | ~in_min_p[:, -1:]
    is_mass_known = keeps_all_ranks | is_cut_before | (top_p >= 1)
    # Tokens as likely as the last candidate may be missing among the candidates.
    is_cut_inside = ~(kept & (candidates <= candidates[:, -1:])).any(dim=-1, keepdim=True)
    is_done = (is_cut_inside & is_mass_known) | (num_candidates == vocab_size)

    winner = _race(torch.where(kept, candidates, -1.0), ids, columns)
    return ids.gather(-1, winner.unsqueeze(-1)).squeeze(-1), (~is_done).long().squeeze(-1)


def _most_likely(probs: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row and their token ids, equal ones in the order of their ids."""
    if num == probs.shape[-1]:
        return probs.sort(dim=-1, descending=True, stable=True)
    ids = probs.topk(num, sorted=False).indices.sort(dim=-1).values
    largest, order = probs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return largest, ids.gather(-1, order)
