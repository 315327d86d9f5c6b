"""Streamed responses: server-sent events that never end without saying why."""

import asyncio
import logging
from collections.abc import AsyncGenerator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gllm_ray.errors import GllmRayError
from gllm_ray.serving.errors import HttpError
from gllm_ray.serving.openai_responses import ChunkWriter
from gllm_ray.serving.text_stream import TextDelta

logger = logging.getLogger(__name__)


async def stream_response(
    deltas: AsyncGenerator[TextDelta, None], writer: ChunkWriter, num_prompt_tokens: int
) -> "SseResponse":
    """Wait for the first delta, so that an error before it gets its own status code."""
    first = await anext(deltas)
    return SseResponse(sse_events(first, deltas, writer, num_prompt_tokens), deltas)


async def sse_events(
    first: TextDelta,
    rest: AsyncGenerator[TextDelta, None],
    writer: ChunkWriter,
    num_prompt_tokens: int,
) -> AsyncGenerator[str, None]:
    """The events of a stream: one piece for each delta, then usage and `[DONE]`.

    An error after the first delta becomes the last event.
    """
    num_output_tokens = 0
    delta: TextDelta | None = first
    try:
        while delta is not None:
            num_output_tokens += delta.num_tokens
            if piece := writer.write(delta):
                yield piece
            if delta.num_tokens > 1:  # The client lags, and more may be there to be taken at once.
                await asyncio.sleep(0)
            delta = await anext(rest, None)
    except Exception as error:  # The status is sent, and a mere end would look like success.
        if not isinstance(error, GllmRayError):
            logger.exception("a stream failed")
        yield f"data: {HttpError.of(error).body()}\n\n"
        return
    yield writer.write_end(num_prompt_tokens, num_output_tokens)


class SseResponse(StreamingResponse):
    """A stream of events that closes its source however it ends.

    Args:
        events: What is sent.
        source: What `events` reads from, which it may not have begun to do.
    """

    def __init__(
        self, events: AsyncGenerator[str, None], source: AsyncGenerator[TextDelta, None]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends, or the client or the server gives it up."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._source.aclose()
