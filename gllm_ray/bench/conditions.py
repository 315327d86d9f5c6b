"""What a measurement ran beside: load average and CPU seconds."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import psutil

# Tells the CPU seconds that some processes have taken so far.
CpuClock = Callable[[], float]
# What the processes of our services are called.
_PARTS = {
    "proxy": ("haproxy", "ray::ProxyActor"),
    "replica": ("ray::ServeReplica",),
    "scheduler": ("ray::SchedulerActor",),
    "stages": ("ray::StageActor",),
}


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


def part_clocks(pid: int) -> dict[str, CpuClock]:
    """A clock for each part of a service of ours, of which `pid` is the root."""
    return {name: partial(tree_cpu_s, pid, titles) for name, titles in _PARTS.items()}


def tree_cpu_s(pid: int, titles: Sequence[str] = ("",)) -> float:
    """CPU seconds of a process and its descendants on this machine, ended ones included.

    Of a process that is gone they are not known, and are 0.

    Args:
        pid: The root.
        titles: Only processes count whose command, by which Ray tells what they are, has one of
            these in it.
    """
    total_s = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline()[:1])
                if not any(title in command for title in titles):
                    continue
                times = process.cpu_times()
                total_s += times.user + times.system
                total_s += times.children_user + times.children_system
    return total_s


def _load_average() -> float:
    return round(os.getloadavg()[0], 2)
