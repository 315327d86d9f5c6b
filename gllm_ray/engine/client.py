"""One stream of events for each request, out of the one stream an engine gives.

The engine's events are fetched for all requests at once, so the cost of a fetch, such as a call to
another process, is shared; a consumer that lags gets what gathered meanwhile in large pieces.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from gllm_ray.engine.completion import OutputCompleteError
from gllm_ray.errors import GllmRayError, InvalidRequestError, OverloadedError, PipelineError
from gllm_ray.interfaces import EngineEndpoint
from gllm_ray.messages import FinishReason, GenerationRequest, OpenRequest, TokenEvent

logger = logging.getLogger(__name__)

# A client that reads again after minutes must not hold the others of this process up: what is made
# of so many events, log probabilities included, takes milliseconds.
MAX_EVENTS_AT_ONCE = 64

NOT_BEGUN = "the request waited longer than it may, because nothing could take it; send it again"


class _Stream:
    """Events of one request that its consumer has not taken yet."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.has_news = asyncio.Event()


class EngineClient:
    """Runs requests on an engine, each in a stream of its own.

    Args:
        endpoint: The engine; nobody else may call its `next_events`.
    """

    def __init__(self, endpoint: EngineEndpoint) -> None:
        self._endpoint = endpoint
        self._streams: dict[str, _Stream] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._pump_task: asyncio.Task[None] | None = None
        self._failure: PipelineError | None = None

    async def start(self) -> None:
        """Begin to fetch events; called once, before the first request."""
        self._pump_task = asyncio.create_task(self._pump())
        self._pump_task.add_done_callback(self._on_pump_done)

    async def close(self) -> None:
        """End every open stream with a `PipelineError`; the engine itself goes on."""
        if self._pump_task is not None:
            self._pump_task.cancel()
            await asyncio.wait([self._pump_task])
        await asyncio.gather(*self._aborts)

    async def check_health(self) -> None:
        """Return if requests can be served.

        Raises:
            PipelineError: The engine is broken.
        """
        self._raise_if_broken()

    async def generate(
        self,
        request: GenerationRequest,
        output_token_ids: tuple[int, ...] | None = None,
        *,
        tells_acceptance: bool = False,
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request; closing the generator early aborts it.

        `OutputCompleteError`, thrown into it, aborts it as one that is complete.

        Args:
            request: What to generate.
            output_token_ids: What its client has got of it from another engine, which had accepted
                it and is lost; None: it is new.
            tells_acceptance: Yield first, once the engine has accepted it, a list without events.

        Yields:
            The events since the last yield, at least one and `MAX_EVENTS_AT_ONCE` at most; the last
            list ends with the terminal event.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: The engine takes no requests now, or none within `queue_timeout_s`.
            PipelineError: The engine is broken, or broke while it held the request.
        """
        self._raise_if_broken()
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request_id={request.request_id!r} is in use already")
        stream = self._streams[request.request_id] = _Stream()
        is_alive, num_output_tokens = True, None
        try:
            try:
                await self._submit(request, output_token_ids)
            except GllmRayError:
                is_alive = False
                raise
            if tells_acceptance:
                yield []
            while is_alive:
                events = await self._take(stream)
                is_alive = events[-1].finish_reason is None
                yield events
        except OutputCompleteError as end:
            num_output_tokens = end.num_output_tokens
            raise
        finally:
            self._streams.pop(request.request_id, None)
            if is_alive and self._failure is None:
                await self._abort(request.request_id, num_output_tokens)

    async def abort(self, request_id: str) -> None:
        """End a request for whom its consumer cannot; its stream ends with the event of an abort.

        The event is ours, because an engine that is being replaced tells of none. Ignored unless
        the request is open.
        """
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.events.append(TokenEvent(request_id, finish_reason=FinishReason.ABORT))
            stream.has_news.set()
            await self._abort(request_id)

    async def _submit(self, request: GenerationRequest, output: tuple[int, ...] | None) -> None:
        if output is not None:
            await self._endpoint.restore([OpenRequest(request=request, output_token_ids=output)])
            return
        try:
            async with asyncio.timeout(request.queue_timeout_s):
                await self._endpoint.add(request)
        except TimeoutError:  # its scheduler is being replaced
            self._begin_abort(request.request_id)
            raise OverloadedError(NOT_BEGUN) from None

    async def _take(self, stream: _Stream) -> list[TokenEvent]:
        while not stream.events:
            self._raise_if_broken()
            stream.has_news.clear()
            await stream.has_news.wait()
        events = stream.events[:MAX_EVENTS_AT_ONCE]
        del stream.events[:MAX_EVENTS_AT_ONCE]
        return events

    def _raise_if_broken(self) -> None:
        if self._failure is not None:
            # Without this, each raise would add its frames to the one before.
            raise self._failure.with_traceback(None)

    async def _abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        await asyncio.shield(self._begin_abort(request_id, num_output_tokens))

    def _begin_abort(
        self, request_id: str, num_output_tokens: int | None = None
    ) -> asyncio.Task[None]:
        """Abort in a task of its own: the consumer is often being cancelled, again and again."""

        async def abort() -> None:
            with contextlib.suppress(PipelineError):
                await self._endpoint.abort(request_id, num_output_tokens)

        task = asyncio.create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
        return task

    async def _pump(self) -> None:
        while True:
            for event in await self._endpoint.next_events():
                stream = self._streams.get(event.request_id)
                if stream is not None:  # Else it was closed early.
                    stream.events.append(event)
                    stream.has_news.set()

    def _on_pump_done(self, pump: asyncio.Task[None]) -> None:
        error = None if pump.cancelled() else pump.exception()
        if isinstance(error, PipelineError):
            self._failure = error
        elif error is None:
            self._failure = PipelineError("the service is shutting down")
        else:
            logger.error("fetching events failed", exc_info=error)
            self._failure = PipelineError(f"internal error: {type(error).__name__}")
        for stream in self._streams.values():
            stream.has_news.set()
