"""How long a stage computes, told without ever waiting for its device."""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, Self

import torch

from gllm_ray.messages import StageTime, StepInterval

_NUM_INTERVALS = 4096


class Event(Protocol):
    """A moment in the work of a device; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Come to pass once the device has done all that it was given so far."""

    def query(self) -> bool:
        """Whether it came to pass."""

    def elapsed_time(self, end: Self) -> float:
        """Milliseconds from this event to `end`."""


class HostEvent:
    """An event of a device that has done its work when the call returns."""

    def record(self) -> None:
        """See `Event`."""
        self._time_s = time.perf_counter()

    def query(self) -> bool:
        """See `Event`."""
        return True

    def elapsed_time(self, end: Self) -> float:
        """See `Event`."""
        return 1000 * (end._time_s - self._time_s)


def event_type(device: str) -> Callable[[], Event]:
    """What marks moments on a device, `cpu` or `cuda`."""
    if device == "cuda":
        return functools.partial(torch.cuda.Event, enable_timing=True)
    return HostEvent


class Stopwatch:
    """Times the micro-batches of one stage.

    Args:
        stage_id: Position of the stage in the pipeline.
        new_event: Makes an event of the stage's device.
    """

    def __init__(self, stage_id: int, new_event: Callable[[], Event]) -> None:
        self._stage_id = stage_id
        self._new_event = new_event
        self._running: deque[tuple[int, float, Event, Event]] = deque()
        self._intervals: deque[StepInterval] = deque(maxlen=_NUM_INTERVALS)

    @contextmanager
    def measure(self, batch_id: int) -> Iterator[None]:
        """Time the work that the device is given within."""
        start, end = self._new_event(), self._new_event()
        start_s = time.time()
        start.record()
        yield
        end.record()
        self._running.append((batch_id, start_s, start, end))

    def take(self) -> list[StageTime]:
        """The times that became known since the last call, oldest first."""
        times = []
        while self._running and self._running[0][-1].query():
            batch_id, start_s, start, end = self._running.popleft()
            time_s = start.elapsed_time(end) / 1000
            times.append(StageTime(self._stage_id, batch_id, time_s))
            self._intervals.append(
                StepInterval(batch_id=batch_id, start_s=start_s, end_s=start_s + time_s)
            )
        return times

    def intervals(self) -> tuple[StepInterval, ...]:
        """When the latest of these micro-batches were computed, oldest first."""
        return tuple(self._intervals)
