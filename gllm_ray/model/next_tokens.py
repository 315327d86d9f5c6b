"""From the logits of a micro-batch to its tokens, and what is told of them."""

import torch

from gllm_ray.messages import MicroBatch, SampledTokens
from gllm_ray.model.constraints import RunningGrammars
from gllm_ray.model.logit_changes import LogitChanges
from gllm_ray.model.logprobs import find_logprobs
from gllm_ray.model.running_outputs import RunningOutputs
from gllm_ray.model.sampler import sample


def draw_tokens(
    logits: torch.Tensor, batch: MicroBatch, grammars: RunningGrammars, outputs: RunningOutputs
) -> SampledTokens:
    """Draw a token for each sequence whose `sampling` is set.

    Args:
        logits: `[rows, vocab_size]`, a row for each of these sequences.
        batch: The micro-batch.
        grammars: Those of the sequences that have one; they advance by what is drawn.
        outputs: Those that logit rules depend on; so do they.
    """
    drawn = [seq for seq in batch.sequences if seq.sampling is not None]
    params = [seq.sampling for seq in drawn]
    grammars.forget(batch.ended)
    outputs.forget(batch.ended)
    rows = {row: seq for row, seq in enumerate(drawn) if seq.sampling.grammar}
    allowed, failures = grammars.restrict(logits, rows) if rows else (logits, {})
    changes = LogitChanges.of(drawn, outputs)
    token_ids = sample(allowed, params, [seq.end for seq in drawn], changes)
    refused = grammars.advance(rows, token_ids)
    failures |= refused | changes.note(token_ids, refused)
    logprobs = find_logprobs(logits, token_ids, params)
    return SampledTokens(token_ids, logprobs, tuple(failures.items()))
