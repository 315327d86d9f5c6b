"""What a response shows of its prompts: their text, and how likely the model found their tokens."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from gllm_ray.messages import FinishReason, GenerationRequest, TokenLogprobs
from gllm_ray.model.prompt_logprobs import read_prompt_logprobs
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.logprobs import prompt_logprobs
from gllm_ray.serving.openai_protocol import CompletionRequest
from gllm_ray.serving.openai_responses import ResponseHead
from gllm_ray.serving.text_stream import ScoredToken, TextDelta

Deltas = AsyncGenerator[TextDelta, None]


def with_echo(
    outputs: Sequence[Deltas],
    body: CompletionRequest,
    requests: Sequence[GenerationRequest],
    tokenizer: Tokenizer,
) -> list[Deltas]:
    """The outputs of a completion, each with its prompt before it.

    Args:
        outputs: What follows the prompts, those of a prompt side by side; all of them are read.
        body: What they are the answer to.
        requests: What they are the outputs of.
        tokenizer: The model's.
    """
    n = body.outputs_per_prompt
    echoes = [
        _Echo(prompt, request.prompt_token_ids, body, tokenizer)
        for prompt, request in zip(body.prompt, requests[::n], strict=True)
    ]
    return [echoes[index // n].begin(output) for index, output in enumerate(outputs)]


class _Echo:
    """A prompt that its outputs begin with.

    Args:
        prompt: As the body has it.
        token_ids: What the model was given.
        body: What else it asks for.
        tokenizer: The model's.
    """

    def __init__(
        self,
        prompt: str | list[int],
        token_ids: Sequence[int],
        body: CompletionRequest,
        tokenizer: Tokenizer,
    ) -> None:
        self._text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        self._token_ids = token_ids
        self._num_likely = body.logprobs
        self._is_all = body.max_tokens == 0
        self._tokenizer = tokenizer
        # The first output is told, for all of them.
        self._scored: asyncio.Future[tuple[ScoredToken, ...]]
        self._scored = asyncio.get_running_loop().create_future()

    async def begin(self, output: Deltas) -> Deltas:
        """An output of the prompt, and the prompt before it."""
        has_begun = False
        async with aclosing(output):
            async for delta in output:
                yield self._behind(delta) if has_begun else await self._before(delta)
                has_begun = True

    async def _before(self, delta: TextDelta) -> TextDelta:
        scored: tuple[ScoredToken, ...] = ()
        if self._num_likely is not None:
            if delta.prompt_logprobs is not None:
                # In a thread, because a long prompt takes long.
                self._scored.set_result(await asyncio.to_thread(self._score, delta.prompt_logprobs))
            scored = await self._scored
        if self._is_all:
            return replace(
                delta,
                text=self._text,
                token_ids=(),
                finish_reason=FinishReason.LENGTH,
                scored=scored,
                stop_reason=None,
            )
        behind = self._behind(delta)
        return replace(behind, text=self._text + delta.text, scored=(*scored, *behind.scored))

    def _behind(self, delta: TextDelta) -> TextDelta:
        """What stands behind the prompt."""
        if not delta.scored:
            return delta
        shift = len(self._text)
        scored = (token._replace(text_offset=shift + token.text_offset) for token in delta.scored)
        return replace(delta, scored=tuple(scored))

    def _score(self, told: bytes) -> tuple[ScoredToken, ...]:
        of_others = read_prompt_logprobs(told, len(self._token_ids) - 1)
        logprobs = [TokenLogprobs(each.logprob, each.top[: self._num_likely]) for each in of_others]
        offsets = self._tokenizer.text_offsets(self._token_ids, self._text)
        return tuple(map(ScoredToken, self._token_ids, offsets, [None, *logprobs]))


def add_prompt_logprobs(
    response: dict[str, Any],
    head: ResponseHead,
    num_likely: int,
    requests: Sequence[GenerationRequest],
    outputs: Sequence[TextDelta],
) -> None:
    """Add to a response, as vLLM does, what the model found of its prompts.

    Args:
        response: Its body; that of a chat is told itself, a completion's choices are told each.
        head: What it was made with.
        num_likely: How many of the likeliest tokens to show.
        requests: What the outputs are of.
        outputs: The first one of each prompt was told.
    """
    shown: list[dict[str, Any] | None] = []
    for request, output, choice in zip(requests, outputs, response["choices"], strict=True):
        if output.prompt_logprobs is not None:
            token_ids = request.prompt_token_ids
            told = read_prompt_logprobs(output.prompt_logprobs, len(token_ids) - 1)
            shown = prompt_logprobs(token_ids, told, num_likely, head.token_bytes)
        (response if head.is_chat else choice)["prompt_logprobs"] = shown
