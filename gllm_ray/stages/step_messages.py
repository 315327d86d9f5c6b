"""How a stage gets its steps, and tells their outcome, without Ray.

Messages reach a stage from two sides, in an order of their own: micro-batches from who schedules,
and answers from the stage before. A step begins when both are there.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gllm_ray.errors import GllmRayError
from gllm_ray.messages import InboxAddress
from gllm_ray.stages.inbox import Inbox, Message, Outbox

# What a message begins with. After it come: of a micro-batch its id, what it continues, and its
# metadata; of an answer the id and what the step returned; of a failure the id, stage and reason.
BATCH, ANSWER, FAILURE, STOP = range(4)

# Kept for what may continue them: more than there can be micro-batches in flight.
_MAX_ANSWERS = 512


def batch_message(batch_id: int, continues: int | None, metadata: bytes) -> Message:
    """Tell a stage a micro-batch; see `MicroBatch`."""
    return [BATCH, batch_id, continues, metadata]


@dataclass(frozen=True, slots=True)
class StepFailure:
    """Why a micro-batch has no answer.

    Attributes:
        stage_id: The stage that failed first.
        reason: In one line.
    """

    stage_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
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
        is_first: Whether the stage waits for the answers that micro-batches continue, and not for
            those of a stage before it.
    """

    def __init__(self, inbox: Inbox, *, is_first: bool) -> None:
        self._inbox = inbox
        self._is_first = is_first
        self._batches: deque[tuple[int, int | None, bytes]] = deque()
        self._answers: dict[int, object | StepFailure] = {}

    def next(self) -> Step | None:
        """Wait for the next step; None: there will be no more."""
        while True:
            if self._batches:
                batch_id, continues, metadata = self._batches[0]
                awaited = continues if self._is_first else batch_id
                if awaited is None or awaited in self._answers:
                    self._batches.popleft()
                    return Step(batch_id, metadata, self._answer_to(awaited))
            kind, *content = self._inbox.read()
            if kind == STOP:
                return None
            if kind == BATCH:
                self._batches.append(tuple(content))
                continue
            batch_id, *answer = content
            self._answers[batch_id] = StepFailure(*answer) if kind == FAILURE else answer[0]
            if len(self._answers) > _MAX_ANSWERS:
                del self._answers[next(iter(self._answers))]

    def _answer_to(self, awaited: int | None) -> object | StepFailure:
        if self._is_first:  # several may continue the same
            return self._answers.get(awaited)
        return self._answers.pop(awaited)


def run_steps(
    stage_id: int,
    steps: StepQueue,
    run_step: Callable[[bytes, object], object],
    onward: Sequence[InboxAddress],
) -> bool:
    """Run a stage's steps, and tell the answer to each.

    Args:
        stage_id: The stage.
        steps: What comes in.
        run_step: `Stage.step` of the epoch.
        onward: The inboxes to tell: of the next stage; for the last one of who schedules and, with
            the ring, of the first stage.

    Returns:
        Whether a step failed, here or before, which was told then; else it was said to stop.
    """
    outboxes = [Outbox(address) for address in onward]
    try:
        while (step := steps.next()) is not None:
            message = _outcome(stage_id, step, run_step)
            for outbox in outboxes:
                outbox.write(message)
            if message[0] == FAILURE:
                return True
        return False
    finally:
        for outbox in outboxes:
            outbox.close()


def _outcome(stage_id: int, step: Step, run_step: Callable[[bytes, object], object]) -> Message:
    failure = step.previous
    if not isinstance(failure, StepFailure):
        try:
            return [ANSWER, step.batch_id, run_step(step.metadata, step.previous)]
        except GllmRayError as error:
            failure = StepFailure(stage_id, str(error))
    return [FAILURE, step.batch_id, failure.stage_id, failure.reason]
