"""What a response shows of its prompts: their text, and how likely the model found their tokens."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

from gllm_ray.errors import PipelineError
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
    return [
        echoes[index // n].begin(output, is_told=index % n == 0)
        for index, output in enumerate(outputs)
    ]


class _Spelled(NamedTuple):
    """A prompt, and how likely the model found its tokens, where that is asked for."""

    text: str
    scored: tuple[ScoredToken, ...]


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
        self._prompt = prompt
        self._token_ids = token_ids
        self._num_likely = body.logprobs
        self._is_all = body.max_tokens == 0
        self._tokenizer = tokenizer
        # The first output makes it, for all of them.
        self._spelled: asyncio.Future[_Spelled]
        self._spelled = asyncio.get_running_loop().create_future()

    async def begin(self, output: Deltas, *, is_told: bool) -> Deltas:
        """An output of the prompt, and the prompt before it.

        Args:
            output: What follows the prompt.
            is_told: It is the prompt's first output, to which its log probabilities are told.

        Raises:
            PipelineError: They were not told.
        """
        async with aclosing(output):
            first = await anext(output, None)
            if first is None:
                return
            if is_told:
                # In a thread, because a long prompt takes long.
                spelled = await asyncio.to_thread(self._spell, first.prompt_logprobs)
                self._spelled.set_result(spelled)
            text, scored = await self._spelled
            yield self._before(first, text, scored)
            async for delta in output:
                yield _behind(delta, text)

    def _spell(self, told: bytes | None) -> _Spelled:
        prompt = self._prompt
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        if self._num_likely is None:
            return _Spelled(text, ())
        if told is None:
            raise PipelineError("the last stage did not tell log probabilities of a prompt")
        return _Spelled(text, self._score(told, text))

    def _before(self, delta: TextDelta, text: str, scored: tuple[ScoredToken, ...]) -> TextDelta:
        if self._is_all:
            return replace(
                delta,
                text=text,
                token_ids=(),
                finish_reason=FinishReason.LENGTH,
                scored=scored,
                stop_reason=None,
            )
        behind = _behind(delta, text)
        return replace(behind, text=text + delta.text, scored=(*scored, *behind.scored))

    def _score(self, told: bytes, text: str) -> tuple[ScoredToken, ...]:
        of_others = read_prompt_logprobs(told, len(self._token_ids) - 1)
        logprobs = [TokenLogprobs(each.logprob, each.top[: self._num_likely]) for each in of_others]
        offsets = self._tokenizer.text_offsets(self._token_ids, text)
        return tuple(map(ScoredToken, self._token_ids, offsets, [None, *logprobs]))


def _behind(delta: TextDelta, prompt: str) -> TextDelta:
    """What stands behind the text of a prompt."""
    if not delta.scored:
        return delta
    shift = len(prompt)
    scored = (token._replace(text_offset=shift + token.text_offset) for token in delta.scored)
    return replace(delta, scored=tuple(scored))


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
