"""One stream for each request, out of as many replicas as it takes.

What is kept of a request is what its client has got, in tokens, so a replica that takes over
computes prompt and output anew and goes on: greedy and seeded tokens are those that the lost one
would have said, for a draw depends on seed and position alone.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from gllm_ray.config import FrontEndConfig
from gllm_ray.engine.client import NOT_BEGUN
from gllm_ray.engine.journal import Journal
from gllm_ray.errors import OverloadedError, PipelineError
from gllm_ray.interfaces import ReplicaSet
from gllm_ray.messages import FinishReason, GenerationRequest, OpenRequest, TokenEvent

logger = logging.getLogger(__name__)

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.1, 1.0
_BURST_S = 2.0  # between errors of the same cause
_PUBLIC_MESSAGE = (
    "the replica that held the request was lost, and no other finished it; send it again"
)


class ResumingClient:
    """Runs requests on replicas that may be lost.

    Args:
        replicas: Where they run.
        config: How long a request goes on.
        on_resumption: Called when a replica takes over what another had accepted.
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        config: FrontEndConfig,
        on_resumption: Callable[[], None] = lambda: None,
    ) -> None:
        self._replicas = replicas
        self._config = config
        self._on_resumption = on_resumption
        self._journal = Journal()
        self._latest_error_s = -math.inf

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request to its end; closing the generator early aborts it.

        Yields:
            As `EngineClient.generate`; whether replicas were lost does not show.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: The replica it came to takes no requests now, or none was there to take
                it within its `queue_timeout_s`.
            PipelineError: Too many replicas were lost under it, or none took it in time.
        """
        self._journal.open(OpenRequest(request=request))
        patience = _Patience(self._config, request.queue_timeout_s)
        try:
            while request.request_id in self._journal:
                try:
                    async with aclosing(self._attempt(request, patience)) as steps:
                        async for step in steps:
                            self._journal.record(step)
                            yield step
                except PipelineError as error:
                    self._log(error)
                    await patience.wait_after(error)
        finally:
            self._journal.forget(request.request_id)

    def _log(self, error: PipelineError) -> None:
        """Tell why a replica was lost, once for all the requests that it held."""
        now_s = asyncio.get_running_loop().time()
        if now_s > self._latest_error_s + _BURST_S:
            logger.warning("requests go on at another replica: %s", error)
        self._latest_error_s = now_s

    async def _attempt(
        self, request: GenerationRequest, patience: "_Patience"
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """The events that one replica adds to those recorded.

        Raises:
            OverloadedError: It takes no requests now, or none was there in time.
            PipelineError: It was lost, or is broken.
        """
        output_token_ids = self._journal.output_of(request.request_id)
        steps = self._replicas.run(patience.with_time_left(request), output_token_ids)
        async with aclosing(steps):
            try:
                async with asyncio.timeout_at(patience.until_s):
                    await anext(steps, None)
            except TimeoutError:
                patience.check_queue_time()
                raise PipelineError("no replica was there to take it") from None
            except OverloadedError as error:
                if output_token_ids is None:
                    raise
                raise PipelineError(f"no replica had room for it: {error}") from error
            if output_token_ids is not None:
                self._on_resumption()
            self._journal.accept(request.request_id)
            patience.note_acceptance()
            async for step in steps:
                last = step[-1]
                if last.finish_reason is FinishReason.ERROR:  # its pipeline is broken
                    if step[:-1]:
                        yield step[:-1]
                    raise PipelineError(last.error or "the pipeline broke")
                yield step
                if last.finish_reason is not None:
                    return
        raise PipelineError("the replica ended the stream before the request was complete")


class _Patience:
    """How long a request is tried again, on the clock of the event loop.

    Args:
        config: How long it goes on.
        queue_timeout_s: The request's own.
    """

    def __init__(self, config: FrontEndConfig, queue_timeout_s: float | None) -> None:
        self._config = config
        self._num_losses = 0
        self._is_accepted = False
        self._pause_s = _MIN_PAUSE_S
        self._retry_until_s = math.inf
        self._queue_until_s = math.inf
        if queue_timeout_s is not None:
            self._queue_until_s = asyncio.get_running_loop().time() + queue_timeout_s

    @property
    def until_s(self) -> float | None:
        """When a replica must have taken it; None: whenever there is one."""
        until_s = min(self._retry_until_s, self._queue_until_s)
        return None if until_s == math.inf else until_s

    def with_time_left(self, request: GenerationRequest) -> GenerationRequest:
        """The request, which may wait for as long as it has not waited yet."""
        if self._queue_until_s == math.inf:
            return request
        left_s = self._queue_until_s - asyncio.get_running_loop().time()
        return replace(request, queue_timeout_s=max(left_s, 0.0))

    def check_queue_time(self) -> None:
        """Give up a request that has waited for as long as it may.

        Raises:
            OverloadedError: It has.
        """
        if asyncio.get_running_loop().time() >= self._queue_until_s:
            raise OverloadedError(NOT_BEGUN)

    def note_acceptance(self) -> None:
        """A replica has the request."""
        self._is_accepted = True
        self._pause_s = _MIN_PAUSE_S
        self._retry_until_s = self._queue_until_s = math.inf

    async def wait_after(self, error: PipelineError) -> None:
        """Wait until it is worth another attempt.

        Raises:
            OverloadedError: It has waited for as long as it may.
            PipelineError: It is not.
        """
        self.check_queue_time()
        now_s = asyncio.get_running_loop().time()
        if self._retry_until_s == math.inf:
            self._retry_until_s = now_s + self._config.resume_timeout_s
        if self._is_accepted:
            self._is_accepted = False
            self._num_losses += 1
            if self._num_losses > self._config.max_losses:
                raise _gave_up(f"{self._num_losses} replicas were lost under it", error)
            return
        # A replica that refused may be the only one, and is replaced after some seconds.
        if now_s + self._pause_s > self._retry_until_s:
            limit_s = self._config.resume_timeout_s
            raise _gave_up(f"none took it for {limit_s:g} s (frontend.resume_timeout_s)", error)
        await asyncio.sleep(min(self._pause_s, self._queue_until_s - now_s))
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)


def _gave_up(reason: str, error: PipelineError) -> PipelineError:
    message = f"gave the request up: {reason}; the latest error: {error}"
    return PipelineError(message, public_message=_PUBLIC_MESSAGE)
