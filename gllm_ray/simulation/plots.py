"""Draws what a simulation did, as PNG or SVG; needs the `plots` extra."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.metrics import StageInterval
from gllm_ray.simulation.plan_ranking import frontier
from gllm_ray.simulation.quantile_sketch import QuantileSketch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg")
_NUM_CDF_POINTS = 200
_LIMITS_SHOWN = 3.0
_LABEL_POINTS = 7


def check_chart(path: Path) -> None:
    """Refuse a chart that could not be drawn.

    Raises:
        ConfigError: matplotlib is not installed, or `path` ends in neither .png nor .svg.
    """
    if path.suffix not in _FORMATS:
        raise ConfigError(f"{path}: must end in {' or '.join(_FORMATS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "matplotlib is not installed, and charts need it: pip install 'gllm_ray[plots]'"
        ) from error


def plot_pipeline(
    intervals: Iterable[StageInterval],
    path: Path,
    *,
    window_s: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Draw a Gantt chart: a row for each stage, a bar for each micro-batch.

    A bar has its label where that fits; what is left between bars are bubbles.

    Args:
        intervals: At best some hundred in the window, so that labels fit.
        path: Ends in .png or .svg; overwritten.
        window_s: From when until when; None: all of the intervals.
        title: Above the chart.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    plot_pipelines({title: intervals}, path, window_s=window_s)


def plot_pipelines(
    runs: Mapping[str, Iterable[StageInterval]],
    path: Path,
    *,
    window_s: tuple[float, float] | None = None,
) -> None:
    """Draw the Gantt charts of several simulations, one below the other, over the same time.

    Args:
        runs: The intervals under the title of each chart; at best some hundred in the window.
        path: Ends in .png or .svg; overwritten.
        window_s: From when until when; None: all of the intervals.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    charts = [_rows(intervals, window_s) for intervals in runs.values()]
    height = sum(0.7 + 0.35 * len(rows) for rows in charts)
    with _charts(path, height=height, num_charts=len(charts)) as (figure, all_axes):
        for axes, rows, title in zip(all_axes, charts, runs, strict=True):
            _draw_rows(axes, rows)
            axes.set_title(title)
        all_axes[-1].set_xlabel("time (s)")
        if window_s is not None:
            all_axes[-1].set_xlim(window_s)
        # How wide a bar is on paper is known once everything around the charts has its place.
        figure.draw_without_rendering()
        for axes, rows in zip(all_axes, charts, strict=True):
            _label_rows(axes, rows)


def plot_utilization(
    intervals: Iterable[StageInterval],
    path: Path,
    *,
    spans_s: Sequence[tuple[float, float]],
    num_stages: int,
    end_s: float,
    num_bins: int = 100,
    title: str = "",
) -> None:
    """Draw how busy the stages are over time: the mean over all, and the least and most busy.

    Only replicas that run at the time count; where none does there is a gap.

    Args:
        intervals: All of a simulation.
        path: Ends in .png or .svg; overwritten.
        spans_s: From when to when each replica ran, by its number.
        num_stages: Of each replica.
        end_s: The chart's right edge.
        num_bins: Points along the chart.
        title: Above the chart.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    curves = utilization_over_time(
        intervals, spans_s, num_stages=num_stages, end_s=end_s, num_bins=num_bins
    )
    with _chart(path, title) as axes:
        times_s = [(index + 0.5) * end_s / num_bins for index in range(num_bins)]
        columns = [
            [share for share in column if share is not None] or [nan]
            for column in zip(*curves.values(), strict=True)
        ]
        axes.fill_between(
            times_s, list(map(min, columns)), list(map(max, columns)), alpha=0.3, label="all stages"
        )
        axes.plot(times_s, [sum(column) / len(column) for column in columns], label="mean")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("time (s)")
        axes.set_ylabel("stage utilization")
        axes.legend()


def plot_latency_cdf(
    latencies_s: Mapping[str, QuantileSketch],
    path: Path,
    *,
    quantity: str = "latency",
    title: str = "",
) -> None:
    """Draw which share of the latencies is at most how long.

    Args:
        latencies_s: A curve for each label, in seconds.
        path: Ends in .png or .svg; overwritten.
        quantity: What the latencies are.
        title: Above the chart.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    with _chart(path, title) as axes:
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
    limit_s: float | None = None,
    title: str = "",
) -> None:
    """Draw how latency grows with throughput, and the frontier of several curves.

    A point is on the frontier if no other has a higher throughput at no higher latency.

    Args:
        curves: For each label, throughput and latency in seconds at each load.
        path: Ends in .png or .svg; overwritten.
        throughput: What the throughput is, with its unit.
        latency: What the latency is.
        limit_s: The latency to stay below, of which the chart shows at most the triple; None:
            there is none.
        title: Above the chart.

    Raises:
        ConfigError: matplotlib is not installed, or `path` is neither.
    """
    with _chart(path, title) as axes:
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        if len(curves) > 1:
            everything = [point for points in curves.values() for point in points]
            best = frontier(everything, lambda point: -point[0], lambda point: point[1])
            axes.plot(*zip(*best, strict=True), color="gold", lw=8, zorder=0, label="frontier")
        axes.set_xlabel(throughput)
        axes.set_ylabel(f"{latency} (s)")
        axes.set_ylim(bottom=0)
        if limit_s is not None:
            axes.axhline(limit_s, color="black", linestyle="--", label=f"limit {limit_s:g} s")
            axes.set_ylim(top=min(axes.get_ylim()[1], _LIMITS_SHOWN * limit_s))
        axes.legend()


def utilization_over_time(
    intervals: Iterable[StageInterval],
    spans_s: Sequence[tuple[float, float]],
    *,
    num_stages: int,
    end_s: float,
    num_bins: int,
) -> dict[tuple[int, int], list[float | None]]:
    """The share of each of equal bins, from 0 to `end_s`, in which a stage computed.

    Args:
        intervals: All of a simulation.
        spans_s: From when to when each replica ran, by its number.
        num_stages: Of each replica.
        end_s: Where the last bin ends.
        num_bins: How many.

    Returns:
        Under replica and stage, for each bin the share of the time for which the replica ran; None:
        it did not.
    """
    width_s = end_s / num_bins
    busy_s = {
        (replica_id, stage_id): [0.0] * num_bins
        for replica_id in range(len(spans_s))
        for stage_id in range(num_stages)
    }
    for interval in intervals:
        bins_s = busy_s[interval.replica_id, interval.stage_id]
        first = int(interval.start_s / width_s)
        last = min(int(interval.end_s / width_s), num_bins - 1)
        for index in range(first, last + 1):
            bins_s[index] += _overlap_s(interval.start_s, interval.end_s, index, width_s)
    shares: dict[tuple[int, int], list[float | None]] = {}
    for (replica_id, stage_id), bins_s in busy_s.items():
        ran_s = [_overlap_s(*spans_s[replica_id], index, width_s) for index in range(num_bins)]
        shares[replica_id, stage_id] = [
            min(1.0, part_s / all_s) if all_s else None
            for part_s, all_s in zip(bins_s, ran_s, strict=True)
        ]
    return shares


def _overlap_s(start_s: float, end_s: float, index: int, width_s: float) -> float:
    """How much of a time lies within a bin."""
    return max(0.0, min(end_s, (index + 1) * width_s) - max(start_s, index * width_s))


def _rows(
    intervals: Iterable[StageInterval], window_s: tuple[float, float] | None
) -> dict[tuple[int, int], list[StageInterval]]:
    """What each replica's stages do, of which some is in the window."""
    first_s, last_s = window_s or (-inf, inf)
    rows: dict[tuple[int, int], list[StageInterval]] = {}
    for interval in intervals:
        row = rows.setdefault((interval.replica_id, interval.stage_id), [])
        if interval.end_s > first_s and interval.start_s < last_s:
            row.append(interval)
    return dict(sorted(rows.items()))


def _draw_rows(axes: "Axes", rows: Mapping[tuple[int, int], Sequence[StageInterval]]) -> None:
    from matplotlib import colormaps

    # Every other of these colors is light, so that text on it can be read.
    colors = [colormaps["tab20"](index) for index in range(1, 20, 2)]
    for row, intervals in enumerate(rows.values()):
        axes.broken_barh(
            [(interval.start_s, interval.end_s - interval.start_s) for interval in intervals],
            (row - 0.4, 0.8),
            facecolors=[colors[interval.batch_id % len(colors)] for interval in intervals],
        )
    has_one_replica = len({replica_id for replica_id, _ in rows}) == 1
    names = [
        f"stage {stage_id}" if has_one_replica else f"replica {replica_id}, stage {stage_id}"
        for replica_id, stage_id in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0)


def _label_rows(axes: "Axes", rows: Mapping[tuple[int, int], Sequence[StageInterval]]) -> None:
    """Write labels on those bars that are wide enough, where they are in the chart."""
    left_s, right_s = axes.get_xlim()
    pixels_per_s = axes.bbox.width / (right_s - left_s)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _LABEL_POINTS}
    probe = axes.text(0, 0, "", **style)
    widths: dict[str, float] = {}  # in pixels; the stages of a micro-batch share their label
    for row, intervals in enumerate(rows.values()):
        for interval in intervals:
            label = interval.label
            if label not in widths:
                probe.set_text(label)
                widths[label] = probe.get_window_extent().width
            start_s, end_s = max(interval.start_s, left_s), min(interval.end_s, right_s)
            if widths[label] <= (end_s - start_s) * pixels_per_s:
                axes.text((start_s + end_s) / 2, row, label, **style)
    probe.remove()


@contextmanager
def _chart(path: Path, title: str) -> Iterator["Axes"]:
    """What to draw on; it is written to `path` at the end."""
    with _charts(path) as (_, (axes,)):
        axes.set_title(title)
        yield axes


@contextmanager
def _charts(
    path: Path, height: float = 4.0, num_charts: int = 1
) -> Iterator[tuple["Figure", Sequence["Axes"]]]:
    """Charts below each other, of the same times; written to `path` at the end."""
    check_chart(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    yield figure, list(figure.subplots(num_charts, sharex=True, squeeze=False)[:, 0])
    figure.savefig(path)
