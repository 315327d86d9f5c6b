"""Where the time of a start goes, by phase."""

import time
from collections.abc import Mapping, Sequence

from gllm_ray.messages import StageInfo


class PhaseClock:
    """Measures phases that follow each other without a gap.

    Attributes:
        times_s: Wall time of each ended phase, in order.
    """

    def __init__(self) -> None:
        self.times_s: dict[str, float] = {}
        self._last_s = time.monotonic()

    def end(self, phase: str) -> None:
        """The time since the last phase ended, or since this was made, belongs to `phase`."""
        now_s = time.monotonic()
        self.times_s[phase] = now_s - self._last_s
        self._last_s = now_s


def describe_startup(startup_s: Mapping[str, float], stages: Sequence[StageInfo]) -> str:
    """A line for the replica's phases and one for each stage's, with its longest phase."""
    lines = [f"start-up of the replica: {_phases(startup_s)}"]
    for stage in stages:
        longest = max(stage.startup_s, key=stage.startup_s.__getitem__)
        lines.append(
            f"start-up of stage {stage.stage_id}: {_phases(stage.startup_s)}; longest: {longest}"
        )
    return "\n".join(lines)


def _phases(times_s: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {time_s:.2f} s" for phase, time_s in times_s.items())
