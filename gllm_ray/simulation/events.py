"""The queue of what happens next in virtual time."""

from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")


class EventKind(IntEnum):
    """What happens; of events at one moment the smaller goes first.

    Results free what arrivals may take, and a micro-batch is formed when all that a moment brings
    is known.
    """

    RESULT = 0
    STAGE_LOST = 1
    READY = 2
    SCALE = 3
    ARRIVAL = 4
    EXPIRY = 5
    SCHEDULE = 6


@dataclass(frozen=True, slots=True)
class Event(Generic[T]):
    """Something that happens.

    Attributes:
        time_s: When.
        kind: What.
        payload: To what.
    """

    time_s: float
    kind: EventKind
    payload: T


class EventQueue(Generic[T]):
    """Events by time, then by kind, then in the order in which they were pushed."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, EventKind, int, T]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, time_s: float, kind: EventKind, payload: T) -> None:
        """Let something happen."""
        self._num_pushed += 1
        heappush(self._heap, (time_s, kind, self._num_pushed, payload))

    def pop(self) -> Event[T]:
        """What happens next; the queue is not empty."""
        time_s, kind, _, payload = heappop(self._heap)
        return Event(time_s, kind, payload)
