"""Draws what a simulation did, as PNG or SVG; needs the `plots` extra."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.metrics import StageInterval
from gllm_ray.simulation.quantile_sketch import QuantileSketch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".png", ".svg")
_NUM_COLORS = 10  # of matplotlib's cycle, C0 to C9
_NUM_CDF_POINTS = 200


def plot_pipeline(intervals: Iterable[StageInterval], path: Path) -> None:
    """Draw a Gantt chart: a row for each stage, a bar for each micro-batch, with its label.

    Args:
        intervals: At best some hundred; what fills the chart's width.
        path: Ends in .png or .svg; overwritten.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    rows: dict[tuple[int, int], list[StageInterval]] = {}
    for interval in intervals:
        rows.setdefault((interval.replica_id, interval.stage_id), []).append(interval)
    with _chart(path, height=1 + 0.4 * len(rows)) as axes:
        for row, place in enumerate(sorted(rows)):
            axes.broken_barh(
                [(interval.start_s, interval.end_s - interval.start_s) for interval in rows[place]],
                (row - 0.4, 0.8),
                facecolors=[f"C{interval.batch_id % _NUM_COLORS}" for interval in rows[place]],
            )
            for interval in rows[place]:
                middle_s = (interval.start_s + interval.end_s) / 2
                axes.text(middle_s, row, interval.label, ha="center", va="center", clip_on=True)
        names = [f"replica {replica}, stage {stage}" for replica, stage in sorted(rows)]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set_xlabel("time (s)")


def plot_utilization(
    intervals: Iterable[StageInterval], path: Path, *, end_s: float, num_bins: int = 100
) -> None:
    """Draw how busy the stages are over time: the mean over all, and the least and most busy.

    Args:
        intervals: All of a simulation.
        path: Ends in .png or .svg; overwritten.
        end_s: The chart's right edge.
        num_bins: Points along the chart.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    curves = list(utilization_over_time(intervals, end_s=end_s, num_bins=num_bins).values())
    with _chart(path) as axes:
        times_s = [(index + 0.5) * end_s / num_bins for index in range(num_bins)]
        columns = list(zip(*curves, strict=True)) or [(0.0,)] * num_bins
        axes.fill_between(
            times_s, list(map(min, columns)), list(map(max, columns)), alpha=0.3, label="all stages"
        )
        axes.plot(times_s, [sum(column) / len(column) for column in columns], label="mean")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("time (s)")
        axes.set_ylabel("stage utilization")
        axes.legend()


def plot_latency_cdf(
    latencies_s: Mapping[str, QuantileSketch], path: Path, *, quantity: str = "latency"
) -> None:
    """Draw which share of the latencies is at most how long.

    Args:
        latencies_s: A curve for each label, in seconds.
        path: Ends in .png or .svg; overwritten.
        quantity: What the latencies are.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    with _chart(path) as axes:
        shares = [index / _NUM_CDF_POINTS for index in range(_NUM_CDF_POINTS + 1)]
        for label, sketch in latencies_s.items():
            axes.plot([sketch.quantile(share) for share in shares], shares, label=label)
        axes.set_xlabel(f"{quantity} (s)")
        axes.set_ylabel("share of values")
        axes.legend()


def plot_throughput_latency(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    throughput: str = "output tokens/s",
    latency: str = "p99 TPOT",
) -> None:
    """Draw how latency grows with throughput.

    Args:
        curves: For each label, throughput and latency in seconds at each load.
        path: Ends in .png or .svg; overwritten.
        throughput: What the throughput is, with its unit.
        latency: What the latency is.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    with _chart(path) as axes:
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xlabel(throughput)
        axes.set_ylabel(f"{latency} (s)")
        axes.set_ylim(bottom=0)
        axes.legend()


def utilization_over_time(
    intervals: Iterable[StageInterval], *, end_s: float, num_bins: int
) -> dict[tuple[int, int], list[float]]:
    """The share of each of equal spans, from 0 to `end_s`, in which a stage computed.

    Returns:
        Under replica and stage, one share for each span; a stage that never computed is missing.
    """
    width_s = end_s / num_bins
    busy: dict[tuple[int, int], list[float]] = {}
    for interval in intervals:
        bins = busy.setdefault((interval.replica_id, interval.stage_id), [0.0] * num_bins)
        first = int(interval.start_s / width_s)
        last = min(int(interval.end_s / width_s), num_bins - 1)
        for index in range(first, last + 1):
            begin_s = max(interval.start_s, index * width_s)
            finish_s = min(interval.end_s, (index + 1) * width_s)
            bins[index] += max(0.0, finish_s - begin_s) / width_s
    return busy


@contextmanager
def _chart(path: Path, height: float = 4.0) -> Iterator["Axes"]:
    """What to draw on; it is written to `path` at the end."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"{path}: must end in {' or '.join(_FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "matplotlib is not installed, and charts need it: pip install 'gllm_ray[plots]'"
        ) from error
    figure = Figure(figsize=(8, height), layout="constrained")
    yield figure.add_subplot()
    figure.savefig(path)
