"""The micro-batches in flight: submitted and not yet committed."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch, MicroBatchResult
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.scheduling.settings import SchedulerSettings
from gllm_ray.scheduling.step import Step


class Flight(NamedTuple):
    """A micro-batch in flight.

    Attributes:
        batch: As the stages got it.
        step: What it was made of.
        load: What it makes each stage compute.
    """

    batch: MicroBatch
    step: Step
    load: StepLoad


class Flights:
    """Those in flight, the oldest first; in the ring, the oldest may count as committed.

    Args:
        settings: How many stages there are, and whether they are a ring.
        num_ahead: Micro-batches that the policy may want beside one for each stage.

    Attributes:
        max_pending: How many there may be that do not count as committed.
        next_batch_id: Of the next micro-batch.
    """

    def __init__(self, settings: SchedulerSettings, num_ahead: int) -> None:
        self.max_pending = settings.max_in_flight or settings.num_stages + num_ahead
        self.next_batch_id = 0
        self._is_ring = settings.ring
        self._num_full = min(self.max_pending, settings.num_stages)  # no stage is left idle
        self._flights: deque[Flight] = deque()
        self._num_anticipated = 0  # of these, the oldest; one at most

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights)

    @property
    def max_in_flight(self) -> int:
        """How many there may be."""
        return self.max_pending + self._is_ring

    @property
    def is_full(self) -> bool:
        """Whether no other may be added before a commit."""
        return len(self._flights) - self._num_anticipated >= self.max_pending

    @property
    def pending(self) -> list[Step]:
        """What is in those that do not count as committed."""
        return [flight.step for flight in islice(self._flights, self._num_anticipated, None)]

    @property
    def latest_load(self) -> StepLoad:
        """What the latest one makes each stage compute."""
        return self._flights[-1].load

    def add(
        self, step: Step, block_copies: tuple[tuple[int, int], ...], ended: tuple[int, ...] = ()
    ) -> Flight:
        """Make a micro-batch of what was selected."""
        batch = MicroBatch(
            batch_id=self.next_batch_id,
            sequences=tuple(step.items),
            block_copies=block_copies,
            continues=self._source_of(step),
            ended=ended,
            scored_chunks=tuple(step.scored_chunks),
        )
        self.next_batch_id += 1
        self._flights.append(flight := Flight(batch, step, step.load()))
        return flight

    def anticipate(self) -> Step | None:
        """Count the oldest as committed, if this is a ring, and full; returns what is in it."""
        is_full = len(self._flights) >= self._num_full
        if not self._is_ring or self._num_anticipated or not is_full:
            return None
        self._num_anticipated = 1
        return self._flights[0].step

    def land(self, result: MicroBatchResult) -> tuple[Step, bool]:
        """Take out the one that a result belongs to.

        Returns:
            What is in it, and whether it counted as committed.

        Raises:
            PipelineError: The result is not that of the oldest.
        """
        flight = self._flights[0] if self._flights else None
        if flight is None or flight.batch.batch_id != result.batch_id:
            due = "none" if flight is None else flight.batch.batch_id
            raise PipelineError(f"result of micro-batch {result.batch_id} came, {due} is due")
        if len(flight.step.sampling) != len(result.token_ids):
            raise PipelineError(
                f"micro-batch {result.batch_id} samples {len(flight.step.sampling)} tokens, "
                f"its result has {len(result.token_ids)}"
            )
        is_anticipated, self._num_anticipated = bool(self._num_anticipated), 0
        self._flights.popleft()
        return flight.step, is_anticipated

    def clear(self) -> None:
        """Forget all of them: the pipeline lost them."""
        self._flights.clear()
        self._num_anticipated = 0

    def _source_of(self, step: Step) -> int | None:
        """The micro-batch whose tokens a step refers to."""
        decodes = step.items[: step.num_decodes] if self._num_anticipated else ()
        if any(item.token_ids[0] < 0 for item in decodes):
            return self._flights[0].batch.batch_id
        return None
