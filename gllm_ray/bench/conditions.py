"""What a measurement ran beside: load average and CPU seconds."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import psutil

# Tells the CPU seconds that some processes have taken so far.
CpuClock = Callable[[], float]


@dataclass(slots=True, kw_only=True)
class Conditions:
    """Those of one measurement; complete when it has ended.

    Attributes:
        load_average_before: Of the last minute, at its beginning.
        load_average_after: Of the last minute, at its end.
        cpu_s: CPU seconds of each group of processes meanwhile. They count busy-waiting, too.
    """

    load_average_before: float
    load_average_after: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def watch_conditions(clocks: Mapping[str, CpuClock]) -> Iterator[Conditions]:
    """Note the conditions of what runs within; the clocks tell of groups of processes by name."""
    conditions = Conditions(load_average_before=_load_average())
    before_s = {name: clock() for name, clock in clocks.items()}
    yield conditions
    conditions.cpu_s = {name: round(clock() - before_s[name], 3) for name, clock in clocks.items()}
    conditions.load_average_after = _load_average()


def own_cpu_s() -> float:
    """CPU seconds of this process alone."""
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def descendants_cpu_s() -> float:
    """CPU seconds of all processes that this one has started, directly or not."""
    return tree_cpu_s(os.getpid()) - own_cpu_s()


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants on this machine, ended ones included.

    Of a process that is gone they are not known, and are 0.
    """
    total_s = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total_s += times.user + times.system
                total_s += times.children_user + times.children_system
    return total_s


def _load_average() -> float:
    return round(os.getloadavg()[0], 2)
