"""When a stage's times are told, on a device whose work the test does step by step."""

import time
from collections import deque

import pytest

from gllm_ray.messages import StageTime
from gllm_ray.stages.stopwatch import HostEvent, Stopwatch


class Device:
    """Work is queued at once and done when the test says so, like that of a GPU."""

    def __init__(self) -> None:
        self._queue: deque[DeviceEvent] = deque()
        self._now_ms = 1000.0

    def new_event(self) -> "DeviceEvent":
        return DeviceEvent(self._queue)

    def reach_next_event(self, after_ms: float) -> None:
        self._now_ms += after_ms
        self._queue.popleft().time_ms = self._now_ms


class DeviceEvent:
    def __init__(self, queue: "deque[DeviceEvent]") -> None:
        self._queue = queue
        self.time_ms: float | None = None

    def record(self) -> None:
        self._queue.append(self)

    def query(self) -> bool:
        return self.time_ms is not None

    def elapsed_time(self, end: "DeviceEvent") -> float:
        return end.time_ms - self.time_ms


def test_a_time_is_told_once_and_only_after_the_device_has_done_the_work():
    device = Device()
    stopwatch = Stopwatch(3, device.new_event)
    for batch_id in (7, 8, 9):
        with stopwatch.measure(batch_id):
            assert stopwatch.take() == []
    device.reach_next_event(after_ms=50)
    assert stopwatch.take() == []
    device.reach_next_event(after_ms=4)
    assert stopwatch.take() == [StageTime(3, 7, 0.004)]
    assert stopwatch.take() == []
    for after_ms in (10, 2, 10, 1):
        device.reach_next_event(after_ms)
    assert stopwatch.take() == [StageTime(3, 8, 0.002), StageTime(3, 9, 0.001)]
    assert [step.batch_id for step in stopwatch.intervals()] == [7, 8, 9]


def test_on_the_host_a_time_is_that_of_the_work_and_known_at_once():
    stopwatch = Stopwatch(0, HostEvent)
    start = time.perf_counter()
    with stopwatch.measure(5):
        time.sleep(0.02)
    wall_s = time.perf_counter() - start
    time.sleep(0.02)
    (told,) = stopwatch.take()
    assert (told.stage_id, told.batch_id) == (0, 5)
    assert 0.02 <= told.time_s <= wall_s
    (step,) = stopwatch.intervals()
    assert step.end_s - step.start_s == pytest.approx(told.time_s, abs=1e-6)


def test_a_step_that_failed_has_no_time():
    stopwatch = Stopwatch(0, HostEvent)
    with pytest.raises(ValueError, match="broken"), stopwatch.measure(0):
        raise ValueError("broken")
    assert stopwatch.take() == []
