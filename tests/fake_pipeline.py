"""A pipeline without a model, for tests of what drives pipelines."""

import asyncio
from collections import deque

from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch, MicroBatchResult
from tests.factories import result_of


class FakePipeline:
    """Answers each micro-batch by `result_of` once the test lets it, or at once.

    Attributes:
        submitted: Every micro-batch so far.
        failure: Set it to break the pipeline at the next result.
    """

    def __init__(self, *, is_held: bool = False) -> None:
        self.submitted: list[MicroBatch] = []
        self.failure: PipelineError | None = None
        self.is_closed = False
        self._queue: deque[MicroBatch] = deque()
        self._may_answer = asyncio.Event()
        if not is_held:
            self._may_answer.set()

    def let_go(self) -> None:
        self._may_answer.set()

    def submit(self, batch: MicroBatch) -> None:
        self.submitted.append(batch)
        self._queue.append(batch)

    async def next_result(self) -> MicroBatchResult:
        await self._may_answer.wait()
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return result_of(self._queue.popleft())

    async def close(self) -> None:
        self.is_closed = True
