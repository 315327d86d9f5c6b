"""What one simulation leaves for its user: a table, JSON, a trace and charts."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from gllm_ray.errors import ConfigError
from gllm_ray.messages import FinishReason
from gllm_ray.simulation.chrome_trace import write_chrome_trace
from gllm_ray.simulation.metrics import StageInterval
from gllm_ray.simulation.plots import plot_latency_cdf, plot_pipeline
from gllm_ray.simulation.report import Report
from gllm_ray.simulation.report_table import format_report
from gllm_ray.simulation.simulator import SimulationResult

_NUM_BARS = 10  # of each stage in a Gantt chart, so that their labels can be read


def format_result(result: SimulationResult) -> str:
    """The report as a table, why requests were refused, and which constants are nominal."""
    sections = (format_report(result.report), _error_note(result), nominal_note(result.report))
    return "\n\n".join(filter(None, sections))


def _error_note(result: SimulationResult) -> str:
    """Why requests were refused; empty where none was."""
    error, count = result.requests.first_error, result.report.num_ended[FinishReason.ERROR]
    return f"{count} requests cannot be served, the first because {error}" if error else ""


def nominal_note(report: Report) -> str:
    """One line; empty where all constants were fitted."""
    names = report.nominal_constants
    return f"nominal constants, not fitted to measurements: {', '.join(names)}" if names else ""


def write_json(path: Path, value: object) -> None:
    """Write a report, or several; overwrites the file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_trace(path: Path, intervals: Iterable[StageInterval]) -> None:
    """Write a trace that Perfetto shows; overwrites the file."""
    with path.open("w", encoding="utf-8") as file:
        write_chrome_trace(intervals, file)


def plot_gantt(path: Path, result: SimulationResult, start_s: float | None) -> None:
    """Draw some micro-batches of each stage.

    Args:
        path: Ends in .png or .svg; overwritten.
        result: With its intervals.
        start_s: From when on; None: half-way.

    Raises:
        ConfigError: matplotlib is not installed, `path` is neither, or no micro-batch begins later.
    """
    begin_s = result.report.wall_s / 2 if start_s is None else start_s
    num_rows = len(result.report.stages) * result.report.replicas.max
    window_s = gantt_window_s(result.intervals, begin_s, _NUM_BARS * num_rows)
    if window_s is None:
        raise ConfigError(
            f"--gantt-start-s {begin_s:g}: no micro-batch begins then or later; must be < "
            f"{result.report.wall_s:g}, the end of the simulation"
        )
    start_s, end_s = window_s
    bars = [bar for bar in result.intervals if bar.end_s > start_s and bar.start_s < end_s]
    plot_pipeline(bars, path, window_s=window_s)


def gantt_window_s(
    intervals: Iterable[StageInterval], begin_s: float, num_bars: int
) -> tuple[float, float] | None:
    """From when to when about `num_bars` micro-batches compute; None: none begins so late.

    It ends where the first stages do with the last of these, while later stages still compute.

    Args:
        intervals: All of a simulation.
        begin_s: What begins before does not count.
        num_bars: Of all stages together.
    """
    later = (interval for interval in intervals if interval.start_s >= begin_s)
    bars = list(islice(later, num_bars))
    if not bars:
        return None
    ends_s = [bar.end_s for bar in bars if bar.stage_id == 0] or [bar.end_s for bar in bars]
    return min(bar.start_s for bar in bars), max(ends_s)


def plot_latencies(path: Path, result: SimulationResult) -> None:
    """Draw the distributions of all latencies.

    Raises:
        ConfigError: matplotlib is not installed, or `path` ends in neither .png nor .svg.
    """
    requests = result.requests
    sketches = {
        "TTFT": requests.ttft_s,
        "TPOT": requests.tpot_s,
        "ITL": requests.itl_s,
        "E2E": requests.e2e_s,
        "queue time": requests.queue_s,
    }
    plot_latency_cdf(sketches, path)
