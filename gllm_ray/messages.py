"""The values that cross a boundary: frozen, slotted, and free of tensors.

`MicroBatch` and its result are the whole protocol between the scheduler and the stages, real or
simulated; `GenerationRequest` and `TokenEvent` are the whole protocol between a client of the
engine and the engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    BLAMED = "blamed"  # it breaks a stage whenever it runs, or no token may follow its output
    EXPIRED = "expired"  # its deadline passed while it waited for its first micro-batch


class LogitRules(NamedTuple):
    """What is done to the logits of a sequence before their temperature, also for a greedy draw.

    As in vLLM, each acts on what those before it left, in this order.

    Attributes:
        allowed_token_ids: The only tokens that may be drawn; empty: all may.
        bad_words: Tokens of texts that may not be drawn: where an output ends with all of one but
            its last token, that one may not follow.
        end_token_ids: Tokens that may not be drawn yet at positions before `min_end`.
        min_end: The least position at which the output may end.
        logit_bias: Token ids, each once, and what is added to their logits.
        repetition_penalty: Logits above 0 of tokens in prompt or output are divided by it, others
            multiplied.
        frequency_penalty: Taken off a token's logit for each time that the output has it.
        presence_penalty: Taken off the logits of tokens that the output has.
    """

    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    end_token_ids: tuple[int, ...] = ()
    min_end: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether there are any, which count the tokens before."""
        return self.repetition_penalty != 1 or bool(self.frequency_penalty or self.presence_penalty)

    @property
    def needs_output(self) -> bool:
        """Whether they depend on the output so far."""
        return self.has_penalties or bool(self.bad_words)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one token is drawn from the logits of a sequence.

    As in vLLM, each of temperature, `min_p`, `top_k` and `top_p` acts on what those before it left.

    Attributes:
        temperature: 0 means greedy; otherwise the logits are divided by it.
        top_p: Keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: Keep this many most likely tokens; 0 keeps all.
        min_p: Drop tokens below this share of the most likely one, in [0, 1].
        seed: Together with the position it fixes the draw, whatever the batch.
        num_logprobs: How many of the most likely tokens to tell with each drawn one, and what each
            of them had for a log probability; None: nothing is told.
        grammar: What the output has to match, in llguidance's spelling; empty: anything.
        logit_rules: What comes before all of them; None: nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    num_logprobs: int | None = None
    grammar: str = ""
    logit_rules: LogitRules | None = None

    @property
    def needs_output(self) -> bool:
        """Whether a draw depends on the output so far."""
        return bool(self.grammar) or (
            self.logit_rules is not None and self.logit_rules.needs_output
        )

    @property
    def needs_prompt(self) -> bool:
        """Whether a draw depends on the tokens of the prompt, beside the logits."""
        return self.logit_rules is not None and self.logit_rules.repetition_penalty != 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client asked for, in tokens.

    Attributes:
        request_id: Unique among the requests alive in the pipeline.
        prompt_token_ids: At least one token.
        max_tokens: Output tokens after which the request ends with `length`; at least 1.
        stop_token_ids: Any of these ends the request with `stop`; the token counts as output.
        cache_salt: Only requests of the same salt share KV blocks of a common prompt prefix.
        priority: Lower is served first.
        tenant: Who shares prefill fairly with other tenants, where the service is so configured.
        expected_output_tokens: The client's own prediction of its output length, if it has one.
        queue_timeout_s: Seconds the request may wait for its first micro-batch; None: as long as
            the service allows. Where no scheduler was there to take it, the time in its queue
            begins anew.
        num_prompt_logprobs: How many of the most likely tokens to tell with each token of the
            prompt, and what each of them had for a log probability; None: nothing is told.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    priority: int = 0
    tenant: str = ""
    expected_output_tokens: int | None = None
    queue_timeout_s: float | None = None
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """A request that has not ended, and the output its client has got."""

    request: GenerationRequest
    output_token_ids: tuple[int, ...] = ()


class TokenLogprobs(NamedTuple):
    """How likely the model found a token, and which ones it found most likely.

    Natural logarithms of the model's own distribution: of its logits as they are, before the
    temperature and before any token is ruled out.

    Attributes:
        logprob: Of the token that was drawn.
        top: Ids and log probabilities of the most likely tokens, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenEvent(NamedTuple):
    """What happened to a request in one step: a token, an end, or both.

    A named tuple, like `ScheduledSequence`, because one is made for every token.

    Attributes:
        token_id: The new output token, or None when the request ended without one.
        finish_reason: Set on the terminal event, and only there.
        error: The message for the client when `finish_reason` is `error`, `blamed` or `expired`.
        retry_after_s: Seconds after which a retry is worth it, when it is `expired`.
        logprobs: Those of the token, where the request asks for them.
        num_cached_tokens: With the request's first token alone, how many tokens of its prompt were
            found in the prefix cache when it was first admitted.
        prompt_logprobs: With it, those of the prompt's tokens but the first, where the request asks
            for them; `model.prompt_logprobs` reads them.
    """

    request_id: str
    token_id: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    retry_after_s: float | None = None
    logprobs: TokenLogprobs | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: bytes | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInfo:
    """What a stage holds after it loaded its shard.

    Attributes:
        stage_id: Position in the pipeline, from 0.
        node: Host name of the process, for messages.
        first_layer: First decoder layer held.
        last_layer: One past the last decoder layer held.
        num_parameters: Parameters held, shared ones counted once.
        weight_bytes: Memory these parameters take.
        kv_block_bytes: Memory one KV block takes, over the stage's layers.
        max_kv_blocks: Blocks that fit into the memory left for the KV cache.
        attention: Which implementation runs, and why if a faster one does not; empty where nothing
            is computed.
        startup_s: How long each phase of the stage's start took, in order; they do not overlap.
    """

    stage_id: int
    node: str
    first_layer: int
    last_layer: int
    num_parameters: int
    weight_bytes: int
    kv_block_bytes: int
    max_kv_blocks: int
    attention: str = ""
    startup_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUnderWay:
    """What a stage does at this moment.

    Attributes:
        batch_id: The micro-batch that it computes, or whose end it waits for; -1: none, it joins
            its edges.
        num_tokens: The micro-batch's.
        elapsed_s: Since the stage began with it.
    """

    batch_id: int
    num_tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInterval:
    """When a stage computed a micro-batch, in seconds of the node's wall clock.

    It starts when the stage hands the work to its device, which may have earlier work to do.
    """

    batch_id: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How much an engine holds at this moment.

    Attributes:
        num_requests: Requests accepted and not ended.
        num_waiting_requests: Those of them that hold no KV blocks.
        num_waiting_tokens: Prompt tokens not yet scheduled, cached ones included.
        num_in_flight: Micro-batches submitted and not committed.
        kv_utilization: Share of the KV blocks in use, 0 to 1; cached ones are not.
        num_preemptions: Preemptions since the start.
        num_prefix_queried_tokens: Tokens of admitted prompts since the start, a preempted
            sequence's included, that were looked up in the prefix cache.
        num_prefix_hit_tokens: Those of them that were found there, and not computed again.
        num_prompt_tokens: Prompt tokens of the requests accepted since the start.
        drain_tokens_per_s: Prompt tokens scheduled a second while others had to wait, in the last
            10 s of that; 0: none had to.
        prefill_capacity_tokens_per_s: The same while half of the KV blocks were free, so that they
            waited for nothing but their prefill.
    """

    num_requests: int
    num_waiting_requests: int
    num_waiting_tokens: int
    num_in_flight: int
    kv_utilization: float
    num_preemptions: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
    num_prompt_tokens: int
    drain_tokens_per_s: float
    prefill_capacity_tokens_per_s: float


class EdgeAddress(NamedTuple):
    """Where the upstream end of an edge waits for the downstream end."""

    host: str
    port: int


class InboxAddress(NamedTuple):
    """Where messages to a process of the pipeline go; see `stages.inbox.Inbox`.

    Attributes:
        host: Of its node.
        port: There.
        public_key: Whoever knows it may write.
    """

    host: str
    port: int
    public_key: bytes
