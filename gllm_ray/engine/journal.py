"""What the clients of an engine have got so far, so that another engine can go on with it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from gllm_ray.errors import InvalidRequestError, PipelineError, SchedulerLostError
from gllm_ray.interfaces import EngineEndpoint
from gllm_ray.messages import GenerationRequest, OpenRequest, TokenEvent

T = TypeVar("T")


class Journal:
    """The requests that have not ended, in the order in which they came."""

    def __init__(self) -> None:
        self._requests: dict[str, OpenRequest] = {}  # as they came
        self._output: dict[str, list[int]] = {}  # of those that an engine accepted

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def is_pending(self, request_id: str) -> bool:
        """Whether the request is open, and no engine is known to have accepted it."""
        return request_id in self._requests and request_id not in self._output

    def accepted(self) -> list[OpenRequest]:
        """The requests that an engine accepted."""
        return [
            replace(request, output_token_ids=tuple(self._output[request_id]))
            for request_id, request in self._requests.items()
            if request_id in self._output
        ]

    def output_of(self, request_id: str) -> tuple[int, ...] | None:
        """What the client of a request has got; None: no engine is known to have accepted it."""
        output = self._output.get(request_id)
        return None if output is None else tuple(output)

    def open(self, request: OpenRequest) -> None:
        """Note a request that is about to be sent to an engine.

        Raises:
            InvalidRequestError: Its id is that of an open one.
        """
        request_id = request.request.request_id
        if request_id in self._requests:
            raise InvalidRequestError(f"request_id={request_id!r} is in use already")
        self._requests[request_id] = request

    def accept(self, request_id: str) -> None:
        """An engine accepted a request; ignored unless it is open."""
        if self.is_pending(request_id):
            self._output[request_id] = [*self._requests[request_id].output_token_ids]

    def record(self, events: Iterable[TokenEvent]) -> None:
        """Note what the clients get; events of requests that are not open are ignored."""
        for request_id, token_id, finish_reason, *_ in events:
            if finish_reason is not None:
                self.forget(request_id)
            elif token_id is not None and request_id in self._requests:
                # Its first token may overtake the answer that it was accepted.
                if request_id not in self._output:
                    self.accept(request_id)
                self._output[request_id].append(token_id)

    def forget(self, request_id: str) -> None:
        """A request ended, or was refused or given up."""
        self._requests.pop(request_id, None)
        self._output.pop(request_id, None)


class JournaledEndpoint:
    """An `EngineEndpoint` whose requests outlive the engine: another goes on with them.

    While there is no engine, all but aborts wait for the next.

    Args:
        engine: The first one. Once it is lost, every call raises `SchedulerLostError`.

    Attributes:
        loss: Done when the engine is lost; until `resume`, which makes another.
    """

    def __init__(self, engine: EngineEndpoint) -> None:
        self._journal = Journal()
        self._failure: PipelineError | None = None
        self._is_settled = asyncio.Event()  # there is an engine, or there will be none
        self._engine: EngineEndpoint | None = None
        self._begin_with(engine)

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request; see `EngineEndpoint.add`."""
        await self._submit(OpenRequest(request=request), is_new=True)

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """Go on with requests of another engine; see `EngineEndpoint.restore`."""
        for request in requests:
            await self._submit(request, is_new=False)

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        """End a request early; see `EngineEndpoint.abort`."""
        self._journal.forget(request_id)
        engine = self._engine
        if engine is not None:
            try:
                await engine.abort(request_id, num_output_tokens)
            except SchedulerLostError as error:
                self.note_loss(engine, error)

    async def next_events(self) -> list[TokenEvent]:
        """Wait for events; see `EngineEndpoint.next_events`."""
        events = await self.ask(lambda engine: engine.next_events())
        self._journal.record(events)
        return events

    async def ask(self, call: Callable[[EngineEndpoint], Awaitable[T]]) -> T:
        """The answer of an engine; another one is asked if it is lost meanwhile.

        Raises:
            PipelineError: There is no engine any more, or it is broken.
        """
        while True:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            engine = self._engine
            if engine is None:
                await self._is_settled.wait()
                continue
            try:
                answer = await call(engine)
            except SchedulerLostError as error:
                self.note_loss(engine, error)
            else:
                # The next engine goes by the journal, which does not have this answer.
                if engine is self._engine:
                    return answer

    def note_loss(self, engine: EngineEndpoint, error: SchedulerLostError) -> None:
        """An engine is lost; ignored unless it is the one in use."""
        if engine is self._engine:
            self._engine = None
            self._is_settled.clear()
            self.loss.set_result(error)

    async def resume(self, engine: EngineEndpoint) -> None:
        """Go on with another engine, after a loss.

        Raises:
            PipelineError: It cannot go on; another may be tried.
        """
        requests = self._journal.accepted()
        await engine.restore(requests)
        self._begin_with(engine)
        for request in requests:
            if request.request.request_id not in self._journal:  # aborted meanwhile
                await self.abort(request.request.request_id)

    def fail(self, error: PipelineError) -> None:
        """Give up, after a loss: every call raises the error."""
        self._failure = error
        self._is_settled.set()

    async def _submit(self, request: OpenRequest, *, is_new: bool) -> None:
        request_id = request.request.request_id

        async def submit(engine: EngineEndpoint) -> None:
            # An engine that is lost before it answers may have told of tokens nevertheless.
            if self._journal.is_pending(request_id):
                await (engine.add(request.request) if is_new else engine.restore([request]))

        self._journal.open(request)
        try:
            await self.ask(submit)
        except BaseException:
            self._journal.forget(request_id)
            raise
        self._journal.accept(request_id)

    def _begin_with(self, engine: EngineEndpoint) -> None:
        self.loss: asyncio.Future[SchedulerLostError] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._is_settled.set()
