"""Between a client of the engine and the engine: what to generate, and what came of it."""

from dataclasses import dataclass
from enum import StrEnum
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
