"""The engine: drives one scheduler over one pipeline in real time.

It is the only event loop that touches the scheduler, so the scheduler needs no lock.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import NoReturn

from gllm_ray.engine.supervisor import Supervisor
from gllm_ray.errors import OverloadedError, PipelineError
from gllm_ray.interfaces import Pipeline
from gllm_ray.messages import EngineLoad, GenerationRequest, OpenRequest, TokenEvent
from gllm_ray.scheduling import Scheduler

logger = logging.getLogger(__name__)


class Engine:
    """Keeps a pipeline full and gathers what comes out of it.

    An `EngineEndpoint` for clients in the same process; an actor that owns one offers the same
    methods to other processes.

    Args:
        scheduler: Decides; the engine is its only caller.
        pipeline: Computes; closed with the engine.
        supervisor: Repairs it; None leaves it broken, and ends every request with an error.
    """

    def __init__(
        self, scheduler: Scheduler, pipeline: Pipeline, supervisor: Supervisor | None = None
    ) -> None:
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._supervisor = supervisor
        self._is_paused = False
        self._events: list[TokenEvent] = []
        self._has_events = asyncio.Event()
        self._has_work = asyncio.Event()
        self._failure: PipelineError | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to serve; called once, inside the event loop."""
        self._loop_task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop serving and stop the stages; open requests get no further event."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        await self._pipeline.close()

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: Too much waits already.
            PipelineError: The pipeline is broken.
        """
        self._raise_if_broken()
        try:
            self._scheduler.add(request, _now_s())
        except OverloadedError:
            self._fill_pipeline()  # what came in the same turn may wait no more
            self._scheduler.add(request, _now_s())
        self._set_alarm()
        self._wake()

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """Go on with the requests of another engine, which had accepted them and is lost.

        Raises:
            InvalidRequestError: One of them can never be served here.
            PipelineError: The pipeline is broken.
        """
        self._raise_if_broken()
        for request in requests:
            self._scheduler.restore(request)
        self._wake()

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        """End a request early; see `EngineEndpoint.abort`."""
        self._deliver(self._scheduler.abort(request_id, num_output_tokens))

    async def next_events(self) -> list[TokenEvent]:
        """Wait for events, then return all that gathered since the last call.

        Raises:
            PipelineError: The pipeline is broken and every event has been returned.
        """
        while not self._events:
            self._raise_if_broken()
            self._has_events.clear()
            await self._has_events.wait()
        events, self._events = self._events, []
        return events

    def load(self) -> EngineLoad:
        """How much the engine holds now.

        Raises:
            PipelineError: The pipeline is broken.
        """
        self._raise_if_broken()
        return self._scheduler.load()

    async def step(self) -> None:
        """Fill the pipeline, then take one result out of it."""
        self._fill_pipeline()
        if self._scheduler.num_in_flight == 0:
            self._has_work.clear()
            await self._has_work.wait()
            return
        result = await self._pipeline.next_result()
        self._deliver(self._scheduler.commit(result, _now_s()))

    def _fill_pipeline(self) -> None:
        is_working = self._failure is None and not self._is_paused
        while is_working and (batch := self._scheduler.schedule(_now_s())) is not None:
            self._pipeline.submit(batch)

    def _wake(self) -> None:
        # Requests that arrive in one turn of the event loop then share a micro-batch.
        asyncio.get_running_loop().call_soon(self._fill_pipeline)
        self._has_work.set()

    def _set_alarm(self) -> None:
        """Wake up when a waiting request may expire."""
        if self._alarm is not None:
            self._alarm.cancel()
        deadline_s = self._scheduler.next_deadline_s
        loop = asyncio.get_running_loop()
        self._alarm = None if deadline_s is None else loop.call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self._deliver(self._scheduler.expire(_now_s()))
        self._set_alarm()

    async def _run(self) -> None:
        try:
            while self._supervisor is not None:
                error = await self._supervisor.run_until_broken(self._step_for_ever())
                self._is_paused = True
                await self._supervisor.recover(error, self._scheduler, self._deliver)
                self._is_paused = False
            await self._step_for_ever()
        except PipelineError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("engine loop broke")
            self._fail(PipelineError(f"internal error: {type(error).__name__}"))

    async def _step_for_ever(self) -> NoReturn:
        while True:
            await self.step()

    def _fail(self, error: PipelineError) -> None:
        logger.error("pipeline lost: %s", error)
        self._failure = error
        self._deliver(self._scheduler.fail_all(error.public_message))
        self._has_events.set()

    def _deliver(self, events: list[TokenEvent]) -> None:
        if events:
            self._events += events
            self._has_events.set()
            if self._supervisor is not None:
                self._supervisor.observe(events, self._scheduler)
                self._has_work.set()  # it may have let others in

    def _raise_if_broken(self) -> None:
        if self._failure is not None:
            # Without this, each raise would add its frames to those before.
            raise self._failure.with_traceback(None)


def _now_s() -> float:
    """The clock that timers of the event loop go by."""
    return asyncio.get_running_loop().time()
