"""From a validated body to token requests that fit the model, or a refusal that says why not."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import GenerationRequest, LogitRules, SamplingParams
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.conversation import Conversation
from gllm_ray.serving.logit_rules import bad_word_tokens, logit_rules, stop_token_ids
from gllm_ray.serving.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
)
from gllm_ray.serving.output_format import OutputGrammar, output_grammar
from gllm_ray.serving.token_ids import check_token_ids

_DEFAULT_COMPLETION_TOKENS = 16
# Of a response; each takes some 400 bytes while it is spelled.
_MAX_PROMPT_LOGPROBS = 2**18
# More than any vocabulary has, and few enough for a message to carry.
_MAX_TOP_K = 2**31 - 1
# The increment of splitmix64: no seed that a client counts up to meets another seed's outputs.
_SEED_STRIDE = 0x9E3779B97F4A7C15


class _Wanted(NamedTuple):
    """What a body asks of each output, whatever the prompt; see `SamplingParams`."""

    grammar: str
    stop_token_ids: frozenset[int]
    logit_rules: LogitRules | None


@dataclass(frozen=True, slots=True)
class RequestBuilder:
    """Makes token requests for one model.

    Attributes:
        tokenizer: The model's.
        max_model_len: Tokens of prompt and output a sequence may have.
    """

    tokenizer: Tokenizer
    max_model_len: int

    async def from_chat(self, body: ChatCompletionRequest, name: str) -> list[GenerationRequest]:
        """A request for each answer to a conversation; by default it may fill the context.

        Raises:
            InvalidRequestError: The model cannot serve it.
        """
        if body.tool_use is not None:
            body.tool_use.check(self.tokenizer)
        wanted = await self._wanted(body)
        prompt = await self.chat_prompt(body)
        _refuse_empty(prompt, "messages")
        max_tokens = self._max_tokens(
            len(prompt), body.answer_limit, default=self.max_model_len, param="messages"
        )
        requests = self._requests(body, wanted, name, 0, prompt, max_tokens)
        _refuse_endless_logprobs(body, requests)
        return requests

    async def from_completion(self, body: CompletionRequest, name: str) -> list[GenerationRequest]:
        """A request for each output of each prompt, those of a prompt side by side.

        Raises:
            InvalidRequestError: The model cannot serve one of them, or they are too many.
        """
        body.check_num_outputs()
        wanted = await self._wanted(body)
        requests: list[GenerationRequest] = []
        for text_or_ids in body.prompt:
            prompt = text_or_ids
            if isinstance(prompt, str):
                prompt = await self.text_prompt(prompt)
            _refuse_empty(prompt, "prompt")
            max_tokens = self._max_tokens(
                len(prompt), body.max_tokens, default=_DEFAULT_COMPLETION_TOKENS, param="prompt"
            )
            requests += self._requests(body, wanted, name, len(requests), prompt, max_tokens)
        _refuse_endless_logprobs(body, requests)
        return requests

    async def chat_prompt(self, conversation: Conversation) -> list[int]:
        """The tokens of a conversation, as the model's chat template spells it.

        Raises:
            InvalidRequestError: The template refuses it, or it cannot fit.
        """
        conversation.check(self.tokenizer)
        num_chars = sum(message.num_chars for message in conversation.messages)
        self._refuse_endless(num_chars, "messages")
        # In a thread, because a long text takes long.
        return await asyncio.to_thread(conversation.apply_template, self.tokenizer)

    async def text_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text; see `Tokenizer.encode`.

        Raises:
            InvalidRequestError: It cannot fit, however it is cut into tokens.
        """
        self._refuse_endless(len(text), "prompt")
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def _wanted(self, body: GenerationParams) -> _Wanted:
        ends = stop_token_ids(body, self.tokenizer)
        words = body.bad_words or ()
        # In a thread, as below, because long texts take long.
        bad = await asyncio.to_thread(bad_word_tokens, words, self.tokenizer) if words else ()
        rules = logit_rules(body, self.tokenizer, ends, bad)
        return _Wanted(await self._grammar(body), ends, rules)

    async def _grammar(self, body: GenerationParams) -> str:
        """What the outputs have to match, once it is known that they can; empty: anything.

        Raises:
            InvalidRequestError: They cannot.
        """
        is_forced = body.tool_use is not None and body.tool_use.is_forced
        if not (body.response_format or body.structured_outputs or is_forced):
            return ""
        # In a thread, as below, because a long grammar takes long.
        wanted = await asyncio.to_thread(_wanted_grammar, body)
        if wanted is None:
            return ""
        _check_may_end(body, wanted.param, self.tokenizer.stop_token_ids)
        try:
            await asyncio.to_thread(lambda: self.tokenizer.grammars.compile(wanted.grammar))
        except InvalidRequestError as error:
            message = f"{wanted.param} cannot be followed: {error}"
            raise InvalidRequestError(message, param=wanted.param) from error
        return wanted.grammar

    def _requests(
        self,
        body: GenerationParams,
        wanted: _Wanted,
        name: str,
        first_index: int,
        prompt: Sequence[int],
        max_tokens: int,
    ) -> list[GenerationRequest]:
        """A request for each output of a prompt; `first_index` is that of the first."""
        check_token_ids("prompt", prompt, self.tokenizer.vocab_size)
        min_tokens = body.min_tokens or 0
        _refuse_more_than(max_tokens, min_tokens)
        prompt_token_ids = tuple(prompt)
        if wanted.logit_rules is not None and min_tokens:
            rules = wanted.logit_rules._replace(min_end=len(prompt_token_ids) + min_tokens)
            wanted = wanted._replace(logit_rules=rules)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return [
            GenerationRequest(
                request_id=f"{name}-{first_index + output}",
                prompt_token_ids=prompt_token_ids,
                # Where none are wanted, one is drawn all the same, and not shown.
                max_tokens=max(max_tokens, 1),
                sampling=self._sampling(body, wanted, _seed_of_output(seed, output)),
                stop_token_ids=wanted.stop_token_ids,
                cache_salt=body.cache_salt or "",
                priority=body.priority or 0,
                tenant=body.user or "",
                expected_output_tokens=body.expected_output_tokens,
                queue_timeout_s=body.queue_timeout_s,
                # What is told to one output is shown with all.
                num_prompt_logprobs=None if output else body.num_prompt_logprobs,
            )
            for output in range(body.outputs_per_prompt)
        ]

    def _sampling(self, body: GenerationParams, wanted: _Wanted, seed: int) -> SamplingParams:
        defaults = self.tokenizer.sampling_defaults
        top_k = defaults.top_k if body.top_k is None else body.top_k
        return SamplingParams(
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            top_k=min(max(top_k, 0), _MAX_TOP_K),
            min_p=defaults.min_p if body.min_p is None else body.min_p,
            seed=seed,
            num_logprobs=body.num_logprobs,
            grammar=wanted.grammar,
            logit_rules=wanted.logit_rules,
        )

    def _max_tokens(
        self, num_prompt_tokens: int, requested: int | None, *, default: int, param: str
    ) -> int:
        """The output's limit; a default never makes a prompt too long."""
        room = self.max_model_len - num_prompt_tokens
        max_tokens = min(default, max(room, 1)) if requested is None else requested
        num_drawn = max(max_tokens, 1)
        if num_drawn > room:
            raise self._too_long(
                f"you requested {num_prompt_tokens + num_drawn} tokens ({num_prompt_tokens} in "
                f"the {param}, {num_drawn} in the completion)",
                param,
            )
        return max_tokens

    def _refuse_endless(self, num_chars: int, param: str) -> None:
        """Spare the tokenizer a text that cannot fit, however it is cut into tokens."""
        if num_chars > self.max_model_len * self.tokenizer.max_token_chars:
            raise self._too_long(f"you sent {num_chars} characters in the {param}", param)

    def _too_long(self, excess: str, param: str) -> InvalidRequestError:
        # Clients know a context overflow by the words before the number.
        return InvalidRequestError(
            f"This model's maximum context length is {self.max_model_len} tokens. "
            f"However, {excess}. Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )


def _wanted_grammar(body: GenerationParams) -> OutputGrammar | None:
    wanted = output_grammar(body.response_format, body.structured_outputs)
    calls = body.tool_use and body.tool_use.grammar()
    if wanted is not None and calls is not None:
        raise InvalidRequestError(
            f"tool_choice and {wanted.param} both constrain the output; leave one of them out",
            param="tool_choice",
        )
    return wanted or calls


def _check_may_end(body: GenerationParams, followed: str, end_token_ids: frozenset[int]) -> None:
    """An output that follows a parameter has to end where it is complete."""
    for name in ("ignore_eos", "min_tokens"):
        if value := getattr(body, name):
            raise InvalidRequestError(
                f"{name}={value}: an output that follows {followed} has to end where it is "
                "complete; leave one of them out",
                param=name,
            )
    if body.allowed_token_ids and end_token_ids.isdisjoint(body.allowed_token_ids):
        raise InvalidRequestError(
            f"allowed_token_ids has none of {sorted(end_token_ids)}, but an output that follows "
            f"{followed} has to end, with one of these, where it is complete; add one",
            param="allowed_token_ids",
        )


def _seed_of_output(seed: int, output: int) -> int:
    """A seed of 64 bits, with sign, for each output of a prompt; the first has the prompt's."""
    return (seed + output * _SEED_STRIDE + 2**63) % 2**64 - 2**63


def _refuse_more_than(max_tokens: int, min_tokens: int) -> None:
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens={min_tokens} is more than max_tokens={max_tokens}; lower it, or raise "
            "max_tokens",
            param="min_tokens",
        )


def _refuse_endless_logprobs(body: GenerationParams, requests: Sequence[GenerationRequest]) -> None:
    """Bound what a response may have to tell of its prompts, which each output repeats."""
    if body.num_prompt_logprobs is None:
        return
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    num_told = num_tokens * (1 + body.num_prompt_logprobs)
    if num_told > _MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"you asked for {num_told} log probabilities of prompts ({num_tokens} tokens, those of "
            f"each output counted, times 1 + {body.num_prompt_logprobs}); the limit is "
            f"{_MAX_PROMPT_LOGPROBS}, so send fewer or shorter prompts at once, or ask for fewer "
            "of the likeliest tokens",
            param="logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
        )


def _refuse_empty(prompt: Sequence[int], param: str) -> None:
    if not prompt:
        raise InvalidRequestError(f"the {param} must have at least one token", param=param)
