"""From the token events of a request to the growth of its text."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from gllm_ray.engine.completion import OutputCompleteError, complete
from gllm_ray.errors import (
    GllmRayError,
    InvalidRequestError,
    OverloadedError,
    PipelineError,
)
from gllm_ray.messages import FinishReason, TokenEvent, TokenLogprobs
from gllm_ray.model.detokenizer import Detokenizer
from gllm_ray.serving.tool_parsers import CallDelta, ToolParser, merge_calls
from gllm_ray.serving.tool_use import ToolUse


class ScoredToken(NamedTuple):
    """A token of an output, and how likely the model found it.

    Attributes:
        token_id: The token.
        text_offset: Characters of the choice's text before it.
        logprobs: Its own, and the likeliest ones; None for the first token of a prompt.
    """

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """How far one output grew.

    Attributes:
        index: Which of the response's outputs, from 0.
        text: The new text, possibly empty.
        token_ids: The new tokens.
        finish_reason: Set on the last delta of the output, and only there; `tool_calls` if it ended
            after such.
        scored: Each of the new tokens, whether its text is here, held back or never to come; empty
            unless the request asks for log probabilities.
        calls: What tool calls grew by; in a stream, then there is no text.
        stop_reason: Beside the finish reason, the client's own stop string or stop token that ended
            the output, if one did.
        num_cached_tokens: Set on the first delta of the output, and only there; see `TokenEvent`.
        prompt_logprobs: The same.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    scored: tuple[ScoredToken, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    stop_reason: str | int | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: bytes | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens are new."""
        return len(self.token_ids)


async def text_deltas(
    index: int, events: AsyncGenerator[list[TokenEvent], None], detokenizer: Detokenizer
) -> AsyncGenerator[TextDelta, None]:
    """Turn each list of events into one delta; a complete stop string ends `events`.

    Raises:
        OverloadedError: The request waited too long for its first token.
        PipelineError: The server ended the request before it was complete.
    """
    num_tokens = 0
    async with aclosing(events):
        async for step in events:
            delta = _text_delta(index, step, detokenizer)
            num_tokens += delta.num_tokens
            try:
                yield delta
            finally:  # also if the reader wants no more, for the output is complete all the same
                if delta.finish_reason is not step[-1].finish_reason:
                    await complete(events, OutputCompleteError(num_tokens))
            if delta.finish_reason is not None:
                return


def _text_delta(index: int, events: Sequence[TokenEvent], detokenizer: Detokenizer) -> TextDelta:
    text = ""
    token_ids: list[int] = []
    scored: list[ScoredToken] = []
    for event in events:
        if event.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH):
            raise _failure(event)
        if event.token_id is not None:
            token_ids.append(event.token_id)
            if event.logprobs is not None:
                scored.append(ScoredToken(event.token_id, detokenizer.num_chars, event.logprobs))
            # A token that ends the output has no text, unless that is asked for.
            if event.finish_reason is not FinishReason.STOP or detokenizer.rule.is_included:
                text += detokenizer.step(event.token_id)
        if event.finish_reason is not None and detokenizer.matched is None:
            text += detokenizer.flush()
        if detokenizer.matched is not None:
            break
    reason, stop_reason = _reasons(events[-1], detokenizer)
    return TextDelta(
        index,
        text,
        tuple(token_ids),
        reason,
        tuple(scored),
        stop_reason=stop_reason,
        num_cached_tokens=events[0].num_cached_tokens,
        prompt_logprobs=events[0].prompt_logprobs,
    )


def _reasons(
    last: TokenEvent, detokenizer: Detokenizer
) -> tuple[FinishReason | None, str | int | None]:
    """The finish reason and the stop reason, if the output ends here."""
    if detokenizer.matched is not None:
        return FinishReason.STOP, detokenizer.matched
    is_told = (
        last.finish_reason is FinishReason.STOP and last.token_id in detokenizer.rule.token_ids
    )
    return last.finish_reason, last.token_id if is_told else None


async def with_tool_calls(
    deltas: AsyncGenerator[TextDelta, None], parser: ToolParser, use: ToolUse
) -> AsyncGenerator[TextDelta, None]:
    """The same output, with the calls in its text as such, each piece in a delta of its own."""
    num_calls = 0
    async with aclosing(deltas):
        async for delta in deltas:
            pieces = parser.step(delta.text)
            if delta.finish_reason is not None:
                pieces += parser.flush()
            token_ids, scored = delta.token_ids, delta.scored
            of_prompt = delta.num_cached_tokens, delta.prompt_logprobs
            for piece in pieces:
                text, calls = "", ()
                if isinstance(piece, str):
                    text = piece
                else:
                    num_calls += piece.name is not None
                    calls = (piece,) if use.is_parallel or num_calls <= 1 else ()
                yield TextDelta(delta.index, text, token_ids, None, scored, calls, None, *of_prompt)
                token_ids, scored, of_prompt = (), (), (None, None)
            reason = delta.finish_reason
            if num_calls and use.finishes_with_calls and reason is FinishReason.STOP:
                reason = "tool_calls"
            if token_ids or reason is not None:
                stop = delta.stop_reason
                yield TextDelta(delta.index, "", token_ids, reason, scored, (), stop, *of_prompt)


def _failure(event: TokenEvent) -> GllmRayError:
    message = event.error or "the server ended the request early; send it again"
    if event.finish_reason is FinishReason.BLAMED:
        return InvalidRequestError(message, code="request_breaks_engine")  # clients do not retry it
    if event.finish_reason is FinishReason.EXPIRED:
        return OverloadedError(message, event.retry_after_s or 1.0)
    return PipelineError(message, public_message=message)


async def merge_deltas(
    streams: Sequence[AsyncGenerator[TextDelta, None]],
) -> AsyncGenerator[TextDelta, None]:
    """Yield the deltas of several outputs as they come; if one fails, all are closed."""
    pending = {asyncio.ensure_future(anext(stream, None)): stream for stream in streams}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = pending.pop(task)
                delta = task.result()
                if delta is not None:
                    yield delta
                    pending[asyncio.ensure_future(anext(stream, None))] = stream
    finally:
        # Shielded, because a server may cancel again and again who reads for a client that is gone.
        await asyncio.shield(asyncio.create_task(_close(streams, pending)))


async def _close(
    streams: Sequence[AsyncGenerator[TextDelta, None]],
    pending: Collection[asyncio.Future[TextDelta | None]],
) -> None:
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for stream in streams:
        await stream.aclose()


async def collect_outputs(
    deltas: AsyncGenerator[TextDelta, None], num_outputs: int
) -> list[TextDelta]:
    """Wait for the end of every output; each as one delta, in the order of their index."""
    grown: list[list[TextDelta]] = [[] for _ in range(num_outputs)]
    async with aclosing(deltas):
        async for delta in deltas:
            grown[delta.index].append(delta)
    return [
        TextDelta(
            index,
            "".join(delta.text for delta in output),
            tuple(chain.from_iterable(delta.token_ids for delta in output)),
            output[-1].finish_reason,
            tuple(chain.from_iterable(delta.scored for delta in output)),
            tuple(merge_calls(chain.from_iterable(delta.calls for delta in output))),
            output[-1].stop_reason,
            output[0].num_cached_tokens,
            output[0].prompt_logprobs,
        )
        for index, output in enumerate(grown)
    ]
