"""A pipeline without a model, for tests of what drives pipelines."""

import asyncio
from collections import deque

from gllm_ray.errors import PipelineError, StageLostError
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


class RepairableFakePipeline(FakePipeline):
    """Breaks when the test says so, or when it computes a poison, and can be repaired.

    Attributes:
        poisons: Prompts' first tokens that break it.
        num_repairs: So far, those that failed included.
        may_repair: Clear it to make repairs wait.
        refusals: Errors that the next repairs raise.
    """

    def __init__(self, *, poisons=frozenset()) -> None:
        super().__init__()
        self.poisons = poisons
        self.num_repairs = 0
        self.may_repair = asyncio.Event()
        self.may_repair.set()
        self.refusals: deque[PipelineError] = deque()
        self._losses: asyncio.Queue[PipelineError] = asyncio.Queue()

    def lose(self, error: PipelineError) -> None:
        """What a look at the stages tells."""
        self._losses.put_nowait(error)

    async def next_result(self) -> MicroBatchResult:
        batch = self._queue[0]
        if any(item.token_ids[0] in self.poisons for item in batch.sequences):
            self.failure = StageLostError(f"poisoned by micro-batch {batch.batch_id}")
        return await super().next_result()

    async def watch(self) -> None:
        raise await self._losses.get()

    async def repair(self) -> None:
        self.num_repairs += 1
        self._queue.clear()
        await self.may_repair.wait()
        if self.refusals:
            raise self.refusals.popleft()
        self.failure = None
