"""How likely the model finds the tokens of prompts: each by the logits of the row before it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from gllm_ray.messages import MicroBatch
from gllm_ray.model.inputs import to_device
from gllm_ray.model.logprobs import log_probabilities, rows_at_once
from gllm_ray.model.prompt_logprobs import pack_prompt_logprobs

# Rows whose logits there are at a time; those of all rows of a chunk may take gigabytes.
_MAX_ROWS = 256

LogitsOf = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def decoding_once(model: nn.Module) -> Iterator[None]:
    """Within it, a model of transformers decodes at its first call alone.

    What the decoder said there is all that it says, so further calls compute logits of other rows.
    """
    decoder = model.get_decoder()
    decode, outputs = decoder.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - its model's business
        if not outputs:
            outputs.append(decode(*args, **kwargs))
        return outputs[0]

    decoder.forward = forward
    try:
        yield
    finally:
        decoder.forward = decode


def score_prompts(
    batch: MicroBatch, logits_of: LogitsOf, device: torch.device
) -> tuple[bytes, ...]:
    """The log probabilities that `MicroBatch.scored_chunks` ask for; see `MicroBatchResult`.

    Args:
        batch: The micro-batch.
        logits_of: Computes the logits of rows of it.
        device: Where.
    """
    row_starts = [0, *accumulate(len(seq.token_ids) for seq in batch.sequences)]
    told = []
    for index, num_likely, following in batch.scored_chunks:
        targets = batch.sequences[index].token_ids[1:]
        if following is not None:
            targets = (*targets, following)
        parts = []
        for first in range(0, len(targets), _MAX_ROWS):
            part = targets[first : first + _MAX_ROWS]
            rows = row_starts[index] + first + np.arange(len(part))
            parts.append(_score(logits_of(to_device(rows, device)), part, num_likely))
        told.append(b"".join(parts))
    return tuple(told)


def _score(logits: torch.Tensor, token_ids: Sequence[int], num_likely: int) -> bytes:
    """What each row finds of its token."""
    tokens = to_device(np.array(token_ids)[:, None], logits.device)
    parts = []
    step = rows_at_once(logits)
    for some, own in zip(logits.split(step), tokens.split(step), strict=True):
        log_probs = log_probabilities(some)
        logprobs = log_probs.gather(-1, own)
        ranks = (log_probs > logprobs).sum(dim=-1) + 1
        top, ids = log_probs.topk(min(num_likely, log_probs.shape[-1]), dim=-1)
        parts.append((logprobs.squeeze(-1), ranks, ids, top))
    columns = zip(*parts, strict=True)
    return pack_prompt_logprobs(*(torch.cat(column).cpu().numpy() for column in columns))
