"""One token stream in the scheduler: its tokens, its blocks, and how far both are computed."""

from enum import StrEnum

from gllm_ray.messages import GenerationRequest, ScheduledSequence

Rank = tuple[float, float, int]  # lower is admitted first and preempted last; ends with the id


class SequenceState(StrEnum):
    """What a sequence holds: a state's name says it."""

    WAITING = "waiting"  # no block
    PREFILLING = "prefilling"  # blocks for its whole prompt, part of it not yet scheduled
    DECODING = "decoding"  # blocks for every computed token; grows block by block
    ENDING = "ending"  # blocks only for what is in flight; nothing is scheduled any more


class Sequence:
    """A request's tokens and its place in the KV cache.

    A preempted sequence starts over with prompt and output as its prompt, so `token_ids` is all
    there is to prefill, and `num_computed_tokens` all that is done or on its way.

    Attributes:
        token_ids: Prompt, then output. The last may be `~i`: the i-th token that the oldest
            micro-batch in flight is going to sample.
        block_table: Ids of the blocks held, in the order of the positions they serve.
        block_hashes: The salt's hash, then those of the leading full blocks that were asked for.
        num_computed_tokens: Tokens whose KV exists or is in flight.
        num_in_flight: Submitted and uncommitted micro-batches that hold this sequence.
        epoch: How often its KV was given up.
        is_aborted: It ends at the commit of its last micro-batch in flight.
        has_ended: It has ended, and is gone at the commit of its last micro-batch in flight.
        rank: Its place in the order of admission; given by the queue.
        predicted_output_tokens: How long the output will be in all, if there is a prediction.
        token_s: When its latest token came, on the driver's clock.
        num_prompt_tokens: Tokens of the request's prompt.
        num_cached_tokens: Tokens found in the prefix cache when it was first admitted.
        max_num_tokens: Prompt and output tokens at which it ends.
        sampling: How the request draws; here, like the next two, because each token asks for it.
        stop_token_ids: Tokens that end the request.
        request_id: The request's.
        prompt_logprobs: What the stages told of the prompt so far; None: nothing is asked for, or
            all of it is with the client.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "epoch",
        "has_ended",
        "is_aborted",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_prompt_tokens",
        "predicted_output_tokens",
        "prompt_logprobs",
        "rank",
        "request",
        "request_id",
        "sampling",
        "seq_id",
        "state",
        "stop_token_ids",
        "token_ids",
        "token_s",
    )

    def __init__(self, seq_id: int, request: GenerationRequest) -> None:
        self.seq_id = seq_id
        self.request = request
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.stop_token_ids = request.stop_token_ids
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_cached_tokens = 0
        self.max_num_tokens = self.num_prompt_tokens + request.max_tokens
        self.block_table: tuple[int, ...] = ()
        self.block_hashes: list[bytes] = []
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.epoch = 0
        self.state = SequenceState.WAITING
        self.is_aborted = False
        self.has_ended = False
        self.rank: Rank = (0.0, 0.0, seq_id)
        self.predicted_output_tokens: int | None = None
        self.token_s = 0.0
        is_scored = request.num_prompt_logprobs is not None
        self.prompt_logprobs: list[bytes] | None = [] if is_scored else None

    @property
    def num_tokens(self) -> int:
        """Prompt tokens and output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Output tokens still to come, at most."""
        return self.max_num_tokens - len(self.token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """Output tokens still to come as predicted; see `SequenceLoad`."""
        num_tokens = len(self.token_ids)
        remaining = self.max_num_tokens - num_tokens
        if self.predicted_output_tokens is None:
            return remaining
        expected = self.num_prompt_tokens + self.predicted_output_tokens - num_tokens
        return min(expected, remaining) if expected > 0 else remaining

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that no micro-batch has computed or is computing."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def may_end(self) -> bool:
        """Whether the latest token may be the last, if it is one of `stop_token_ids`."""
        rules = self.sampling.logit_rules
        return rules is None or len(self.token_ids) > rules.min_end

    def schedule_chunk(self, num_tokens: int) -> ScheduledSequence:
        """Put the next `num_tokens` uncomputed tokens in flight."""
        start = self.num_computed_tokens
        end = start + num_tokens
        self.num_computed_tokens = end
        self.num_in_flight += 1
        tokens = tuple(self.token_ids[start:end])
        sampling, output = None, None
        prompt: tuple[int, ...] = ()
        if end == len(self.token_ids):
            sampling = self.sampling
            if sampling.needs_output:
                output = tuple(self.token_ids[self.num_prompt_tokens :])
            if sampling.needs_prompt:
                prompt = tuple(set(self.request.prompt_token_ids))
        return ScheduledSequence(
            self.seq_id, self.epoch, start, tokens, self.block_table, sampling, output, prompt
        )

    def schedule_decode(self) -> ScheduledSequence:
        """Put the one uncomputed token in flight."""
        start = self.num_computed_tokens
        self.num_computed_tokens = start + 1
        self.num_in_flight += 1
        token = (self.token_ids[-1],)
        # The class itself takes three times as long, and this runs for every token.
        return tuple.__new__(
            ScheduledSequence,
            (self.seq_id, self.epoch, start, token, self.block_table, self.sampling, None, ()),
        )

    def restart(self) -> None:
        """Forget all computed KV, and a token not known yet; the caller has taken the blocks."""
        if self.token_ids[-1] < 0:
            self.token_ids.pop()
        self.block_table = ()
        self.num_computed_tokens = 0
        if self.prompt_logprobs:
            self.prompt_logprobs = []  # all of the prompt is computed again
        self.epoch += 1
        self.state = SequenceState.WAITING
