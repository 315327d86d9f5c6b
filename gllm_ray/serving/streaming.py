"""Streamed responses: server-sent events that never end without saying why.

What is between a service and its clients often takes a connection for dead on which nothing comes
for a minute, as while a request waits in a queue or a lost stage is replaced. So a stream that has
nothing to tell sends a comment now and then, which clients ignore.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import Protocol

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from gllm_ray.errors import GllmRayError
from gllm_ray.serving.errors import HttpError
from gllm_ray.serving.text_stream import TextDelta

logger = logging.getLogger(__name__)


_MANY_SCORED = 512
_COMMENT: Message = {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}


class EventWriter(Protocol):
    """Spells a response as server-sent events."""

    def write(self, delta: TextDelta) -> str:
        """The events for a delta, if there are any."""

    def write_end(self) -> str:
        """The events after the last delta."""

    def write_error(self, error: HttpError) -> str:
        """The events instead of the deltas that an error leaves out."""


async def stream_response(
    deltas: AsyncGenerator[TextDelta, None],
    writer: EventWriter,
    keep_alive_s: float | None,
) -> "SseResponse":
    """Wait for the first delta, so that an error before it gets its own status code.

    Args:
        deltas: What the outputs say, at least one.
        writer: Makes events of it.
        keep_alive_s: How long the stream may be silent, and so the longest wait; None: for ever.
    """
    first = asyncio.ensure_future(anext(deltas))
    try:
        await asyncio.wait([first], timeout=keep_alive_s)
    except asyncio.CancelledError:
        await _close(first, deltas)  # the first may have come at the same time
        raise
    if first.done():
        first.result()
    events = sse_events(first, deltas, writer)
    return SseResponse(events, first, deltas, keep_alive_s)


async def sse_events(
    first: Awaitable[TextDelta],
    rest: AsyncGenerator[TextDelta, None],
    writer: EventWriter,
) -> AsyncGenerator[str, None]:
    """The events of a stream: one piece for each delta, then the writer's end.

    An error becomes the last event.
    """
    try:
        delta: TextDelta | None = await first
        while delta is not None:
            is_long = len(delta.scored) > _MANY_SCORED
            # In a thread, because what is told of a long prompt takes long.
            piece = await asyncio.to_thread(writer.write, delta) if is_long else writer.write(delta)
            if piece:
                yield piece
            if delta.num_tokens > 1:  # The client lags, and more may be there to be taken at once.
                await asyncio.sleep(0)
            delta = await anext(rest, None)
    except Exception as error:  # The status is sent, and a mere end would look like success.
        if not isinstance(error, GllmRayError):
            logger.exception("a stream failed")
        yield writer.write_error(HttpError.of(error))
        return
    yield writer.write_end()


class SseResponse(StreamingResponse):
    """A stream of events that closes its source however it ends.

    Args:
        events: What is sent.
        first: What `events` waits for first, which it may not have begun to do.
        rest: What it reads then.
        keep_alive_s: How long it may be silent; None: for ever.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        first: asyncio.Future[TextDelta],
        rest: AsyncGenerator[TextDelta, None],
        keep_alive_s: float | None,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._first = first
        self._rest = rest
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends, or the client or the server gives it up."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await _close(self._first, self._rest)

    async def stream_response(self, send: Send) -> None:
        """Send the events, and comments where they keep the client waiting."""
        if self._keep_alive_s is None:
            await super().stream_response(send)
            return
        sender = _AliveSender(send, self._keep_alive_s)
        keeping_alive = asyncio.create_task(sender.keep_alive())
        try:
            await super().stream_response(sender.send)
        finally:
            keeping_alive.cancel()


class _AliveSender:
    """Sends messages, and a comment whenever the latest was some time ago."""

    def __init__(self, send: Send, period_s: float) -> None:
        self._send = send
        self._period_s = period_s
        self._now_s = asyncio.get_running_loop().time
        self._latest_s = self._now_s()
        self._lock = asyncio.Lock()  # a client that reads nothing gets no comments on top

    async def send(self, message: Message) -> None:
        async with self._lock:
            await self._send(message)
            self._latest_s = self._now_s()

    async def keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._latest_s + self._period_s - self._now_s())
            async with self._lock:
                if self._now_s() >= self._latest_s + self._period_s:
                    await self._send(_COMMENT)
                    self._latest_s = self._now_s()


async def _close(first: asyncio.Future[TextDelta], rest: AsyncGenerator[TextDelta, None]) -> None:
    """Close both, however often whoever waits for it is cancelled."""

    async def close() -> None:
        first.cancel()
        await asyncio.wait([first])
        await rest.aclose()

    await asyncio.shield(asyncio.create_task(close()))
