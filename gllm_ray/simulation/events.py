"""The queue of what happens next in virtual time."""

from enum import IntEnum
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

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


class Event(NamedTuple, Generic[T]):
    """Something that happens.

    Attributes:
        time_s: When.
        kind: What.
        number: How many were pushed before it.
        payload: To what.
    """

    time_s: float
    kind: EventKind
    number: int
    payload: T


class EventQueue(Generic[T]):
    """Events by time, then by kind, then in the order in which they were pushed."""

    def __init__(self) -> None:
        self._heap: list[Event[T]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, time_s: float, kind: EventKind, payload: T) -> None:
        """Let something happen."""
        heappush(self._heap, Event(time_s, kind, self._num_pushed, payload))
        self._num_pushed += 1

    def postpone(self, event: Event[T], time_s: float) -> None:
        """Let an event that was popped happen later, still before what was pushed after it."""
        heappush(self._heap, event._replace(time_s=time_s))

    def pop(self) -> Event[T]:
        """What happens next; the queue is not empty."""
        return heappop(self._heap)
