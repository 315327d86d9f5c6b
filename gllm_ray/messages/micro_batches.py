"""Between the scheduler and the stages, real or simulated: what to compute, and what came of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from gllm_ray.messages.requests import SamplingParams, TokenLogprobs


class ScheduledSequence(NamedTuple):
    """One sequence's share of a micro-batch: a prefill chunk or one decode.

    Attributes:
        seq_id: The sequence, unique in the life of a scheduler.
        epoch: How often the sequence's KV was given up before; the same when the result comes.
        start: Position of the first of `token_ids`, so the tokens whose KV exists already.
        token_ids: The tokens to compute, at positions `start`, `start + 1`, ... In a micro-batch
            that continues another, the one of a decode may be `~i`, see `MicroBatch.continues`.
        block_table: Ids of the KV blocks for positions 0 up to the last of `token_ids`.
        sampling: How to draw the next token, or None for a chunk that does not end its prompt.
        output_token_ids: For a chunk that ends the prompt of a sequence whose draws depend on it,
            its output so far; else None.
        prompt_token_ids: With it, the tokens of the request's prompt, each once, where draws depend
            on them.
    """

    seq_id: int
    epoch: int
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    sampling: SamplingParams | None
    output_token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens of this sequence in the micro-batch."""
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """Position after the last scheduled token: the context length, and the next position."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One pass through all stages.

    Attributes:
        batch_id: Counts up from 0 in submit order.
        sequences: Decodes first, then prefill chunks; each sequence at most once.
        block_copies: Source and target of KV blocks that each layer copies after it has written
            this micro-batch's KV and before any row attends. No source is a target.
        continues: An earlier micro-batch whose result may not be known yet: a token id `~i` here
            stands for the i-th token of it. None: all token ids are known.
        ended: Sequences whose draws depend on their output that ended since the micro-batch before,
            and are in none any more.
        scored_chunks: Of prefill chunks whose tokens are told log probabilities of: the index of
            the sequence, how many of the most likely tokens to tell with each, and the prompt's
            token after the chunk, None where the prompt ends.
    """

    batch_id: int
    sequences: tuple[ScheduledSequence, ...]
    block_copies: tuple[tuple[int, int], ...] = ()
    continues: int | None = None
    ended: tuple[int, ...] = ()
    scored_chunks: tuple[tuple[int, int, int | None], ...] = ()

    @cached_property
    def num_tokens(self) -> int:
        """Rows of the packed batch, over all sequences."""
        return sum(len(seq.token_ids) for seq in self.sequences)


class SampledTokens(NamedTuple):
    """What the last stage says to a micro-batch; see `MicroBatchResult`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    failures: tuple[tuple[int, str], ...] = ()
    prompt_logprobs: tuple[bytes, ...] = ()


class StageTime(NamedTuple):
    """How long a stage computed a micro-batch, waiting for its neighbours left out."""

    stage_id: int
    batch_id: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchResult:
    """The tokens sampled by the last stage.

    Attributes:
        batch_id: The micro-batch this answers.
        token_ids: One for each sequence whose `sampling` is set, in the micro-batch's order.
        logprobs: Those of each token, None where its sequence wants none; empty where none does.
        failures: Which of the tokens are none, by their index, and why: their sequences cannot go
            on.
        prompt_logprobs: Of each of `MicroBatch.scored_chunks`, those of the tokens that follow its
            rows in the prompt.
        stage_times: What the stages measured since the last result, of this micro-batch or of
            earlier ones; a device that computes asynchronously tells late.
    """

    batch_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    failures: tuple[tuple[int, str], ...] = ()
    prompt_logprobs: tuple[bytes, ...] = ()
    stage_times: tuple[StageTime, ...] = ()
