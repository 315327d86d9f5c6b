"""How a stage gets its steps, and tells their outcome, without Ray.

Messages reach a stage from two sides, in an order of their own: micro-batches from who schedules,
and answers from the stage before. A step begins when both are there.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gllm_ray.errors import GllmRayError
from gllm_ray.messages import InboxAddress
from gllm_ray.stages.inbox import Inbox, Message, Outbox

# What a message begins with. After it come: of a micro-batch its id, what it continues, and its
# metadata; of an answer the id and what the step returned; of a failure the id, stage and reason.
BATCH, ANSWER, FAILURE, STOP = range(4)


def batch_message(batch_id: int, continues: int | None, metadata: bytes) -> Message:
    """Tell a stage a micro-batch; see `MicroBatch`."""
    return [BATCH, batch_id, continues, metadata]


class StepFailure(NamedTuple):
    """Why a micro-batch has no answer.

    Attributes:
        stage_id: The stage that failed first.
        reason: In one line.
    """

    stage_id: int
    reason: str


class Step(NamedTuple):
    """What a stage is to do.

    Attributes:
        batch_id: The micro-batch.
        metadata: The same, as a `MetadataDecoder` reads it.
        previous: See `Stage.step`; or why there is nothing to do.
    """

    batch_id: int
    metadata: bytes
    previous: object | StepFailure


class StepQueue:
    """The steps of one stage in one epoch; read by one thread.

    Args:
        inbox: Where their parts come in.
        is_connected: Whether there will be more.
        max_in_flight: Micro-batches that the pipeline may hold, for the first stage: it waits for
            the answers that micro-batches continue. None: for those of the stage before.
    """

    def __init__(
        self, inbox: Inbox, is_connected: Callable[[], bool], max_in_flight: int | None
    ) -> None:
        self._inbox = inbox
        self._is_connected = is_connected
        self._max_in_flight = max_in_flight
        self._batches: deque[tuple[int, int | None, bytes]] = deque()
        self._answers: dict[int, object | StepFailure] = {}

    def next(self) -> Step | None:
        """Wait for the next step; None: there will be no more.

        Raises:
            RuntimeError: A message was lost.
        """
        while True:
            if self._batches and self._is_answered(*self._batches[0][:2]):
                batch_id, continues, metadata = self._batches.popleft()
                return Step(batch_id, metadata, self._take_answer(batch_id, continues))
            message = self._inbox.read()
            if message is None and self._is_connected():
                continue
            kind, *content = message or [STOP]
            if kind == STOP:
                return None
            if kind == BATCH:
                self._batches.append(tuple(content))
            else:
                batch_id, *answer = content
                self._answers[batch_id] = StepFailure(*answer) if kind == FAILURE else answer[0]

    def _is_answered(self, batch_id: int, continues: int | None) -> bool:
        if self._max_in_flight is not None:
            return continues is None or self._has_come(continues)
        oldest = next(iter(self._answers), batch_id)
        if oldest != batch_id:
            raise RuntimeError(
                f"a message was lost: micro-batch {batch_id} is due, the answer to {oldest} came"
            )
        return bool(self._answers)

    def _has_come(self, continues: int) -> bool:
        """Whether the answer is here that a micro-batch continues."""
        if continues in self._answers:
            return True
        latest = next(reversed(self._answers), continues)
        if latest > continues:  # they come in order
            raise RuntimeError(
                f"a message was lost: the answer to micro-batch {continues} is due, that to "
                f"{latest} came"
            )
        return False

    def _take_answer(self, batch_id: int, continues: int | None) -> object | StepFailure:
        if self._max_in_flight is None:
            return self._answers.pop(batch_id)
        while len(self._answers) > self._max_in_flight:
            del self._answers[next(iter(self._answers))]  # what it answers is no more in flight
        return None if continues is None else self._answers[continues]


def run_steps(
    stage_id: int,
    steps: StepQueue,
    run_step: Callable[[bytes, object], object],
    onward: Sequence[InboxAddress],
) -> StepFailure | None:
    """Run a stage's steps, and tell the answer to each.

    Args:
        stage_id: The stage.
        steps: What comes in.
        run_step: `Stage.step` of the epoch.
        onward: The inboxes to tell: of the next stage; for the last one of who schedules and, with
            the ring, of the first stage.

    Returns:
        Why a step failed, here or before, which was told onward, too; None: there are no more.

    Raises:
        RuntimeError: A message was lost.
    """
    outboxes = [Outbox(address) for address in onward]
    try:
        while (step := steps.next()) is not None:
            answer = _run_step(stage_id, step, run_step)
            has_failed = isinstance(answer, StepFailure)
            kind, content = (FAILURE, answer) if has_failed else (ANSWER, [answer])
            for outbox in outboxes:
                outbox.write([kind, step.batch_id, *content])
            if has_failed:
                return answer
        return None
    finally:
        for outbox in outboxes:
            outbox.close()


def _run_step(
    stage_id: int, step: Step, run_step: Callable[[bytes, object], object]
) -> object | StepFailure:
    if isinstance(step.previous, StepFailure):
        return step.previous
    try:
        return run_step(step.metadata, step.previous)
    except GllmRayError as error:
        return StepFailure(stage_id, str(error))
