"""The seams: Protocols that have more than one implementation."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from gllm_ray.messages import (
    GenerationRequest,
    MicroBatch,
    MicroBatchResult,
    OpenRequest,
    TokenEvent,
)


class Pipeline(Protocol):
    """A chain of stages that runs micro-batches in order.

    Implemented by the stages of one process, by a chain of Ray actors, and by a fake for tests.
    """

    def submit(self, batch: MicroBatch) -> None:
        """Start a micro-batch; returns before any stage has run it.

        Called by the engine alone, in the order of `batch_id`. Raises nothing: what goes wrong
        comes out of `next_result`.
        """

    async def next_result(self) -> MicroBatchResult:
        """Wait for the oldest submitted micro-batch that was not yet returned.

        Raises:
            PipelineError: The pipeline is broken; no later call succeeds.
        """

    async def close(self) -> None:
        """Stop the stages; results not yet returned are lost."""


class RepairablePipeline(Pipeline, Protocol):
    """A pipeline whose stages can be replaced; implemented by Ray actors, and by a fake."""

    async def watch(self) -> None:
        """Wait until the pipeline breaks, also where no result would tell.

        Raises:
            PipelineError: What broke it.
        """

    async def repair(self) -> None:
        """Make a broken pipeline work again. What was in flight, and all KV, is lost.

        Raises:
            PipelineError: It could not be done; it may be tried again.
        """


class EngineEndpoint(Protocol):
    """How a client reaches an engine: in this process, or behind a Ray actor handle."""

    async def add(self, request: GenerationRequest) -> None:
        """Accept a request, or raise.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: The engine takes no requests now.
            PipelineError: The engine is broken.
        """

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """Go on with the requests of another engine, which had accepted them and is lost.

        Raises:
            InvalidRequestError: One of them can never be served here.
            PipelineError: The engine is broken.
        """

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        """End a request early; unknown or finished ids are ignored.

        Args:
            request_id: Which one.
            num_output_tokens: Its output is complete with so many tokens, as with a stop string;
                None: it is given up.
        """

    async def next_events(self) -> list[TokenEvent]:
        """Wait for events, then return all that gathered since the last call.

        Raises:
            PipelineError: The engine is broken and every event has been returned.
        """


class ReplicaSet(Protocol):
    """Engines of the same model, any of which may run a request."""

    def run(
        self, request: GenerationRequest, output_token_ids: tuple[int, ...] | None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request on one of them; see `EngineClient.generate`, which tells acceptance here.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: The engine takes no requests now.
            PipelineError: The engine was lost or is broken, or there is none.
        """
