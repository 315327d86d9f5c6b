"""The events of an engine, on their way from its process to that of its clients.

They go as messages, one for each step, which cost either process a third of what the answer to an
actor's call does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, NoReturn

from gllm_ray.errors import PipelineError, SchedulerLostError
from gllm_ray.messages import FinishReason, InboxAddress, TokenEvent, TokenLogprobs
from gllm_ray.stages.inbox import Inbox, Outbox

# How long the last messages of an engine that gave up may take after it has told so.
_LAST_MESSAGES_S = 1.0


async def send_events(
    next_events: Callable[[], Awaitable[list[TokenEvent]]], address: InboxAddress
) -> NoReturn:
    """Send the events of an engine as they come.

    Args:
        next_events: See `EngineEndpoint.next_events`; nobody else may call it.
        address: Of an `EventStream`.

    Raises:
        PipelineError: The engine is broken, and every event has been sent.
    """
    outbox = Outbox(address)
    numbers = count()
    try:
        while True:
            events = await next_events()
            outbox.write([next(numbers), events])
    except PipelineError:
        outbox.write([next(numbers), []])
        raise
    finally:
        outbox.close()


class EventStream:
    """The end that reads; made and used within one event loop.

    Args:
        host: Address of this node in the cluster.
        send: Begins `send_events` in the engine's process, and fails as that does.
    """

    def __init__(self, host: str, send: Callable[[InboxAddress], Awaitable[NoReturn]]) -> None:
        self._inbox = Inbox(host)
        self._num_read = 0
        self._events: list[TokenEvent] = []
        self._has_news = asyncio.Event()
        self._is_complete = False
        self._failure: PipelineError | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inbox.fileno(), self._read)
        self._sending = asyncio.ensure_future(send(self._inbox.address))
        self._sending.add_done_callback(self._on_end_of_sending)

    async def next(self) -> list[TokenEvent]:
        """Wait for events, then return all that came since the last call.

        Raises:
            SchedulerLostError: The engine's process was lost, or a message from it.
            PipelineError: The engine is broken, and every event has been returned.
        """
        while not self._events:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            self._has_news.clear()
            await self._has_news.wait()
        events, self._events = self._events, []
        return events

    def _read(self) -> None:
        # Until none is left, because the file becomes readable only when one more comes.
        while (message := self._inbox.read_if_any()) is not None:
            number, events = message
            if number != self._num_read:
                self._fail(SchedulerLostError(f"message {self._num_read} of the scheduler is lost"))
                return
            self._num_read += 1
            self._events += map(_read_event, events)
            self._is_complete = not events
        self._has_news.set()
        if self._is_complete and self._sending.done():
            self._end()

    def _on_end_of_sending(self, sending: asyncio.Future[NoReturn]) -> None:
        is_over = sending.cancelled() or isinstance(sending.exception(), SchedulerLostError)
        if is_over or self._is_complete:
            self._end()
        else:  # the last messages may be slower than the news that there are no more
            self._loop.call_later(_LAST_MESSAGES_S, self._end)

    def _end(self) -> None:
        error = None if self._sending.cancelled() else self._sending.exception()
        if not isinstance(error, PipelineError):
            error = PipelineError(f"the scheduler sends no events any more: {error!r}")
        self._fail(error)

    def _fail(self, error: PipelineError) -> None:
        if self._failure is None:
            self._failure = error
            self._loop.remove_reader(self._inbox.fileno())
            self._inbox.close()
            self._has_news.set()


def _read_event(fields: Any) -> TokenEvent:  # noqa: ANN401 - as MessagePack has it
    event = TokenEvent(*fields)
    if event.finish_reason is not None:
        event = event._replace(finish_reason=FinishReason(event.finish_reason))
    if event.logprobs is not None:
        logprob, top = event.logprobs
        event = event._replace(logprobs=TokenLogprobs(logprob, tuple(map(tuple, top))))
    return event
