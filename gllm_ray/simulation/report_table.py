"""A report as plain text, for a terminal."""

from collections.abc import Iterable, Sequence

from gllm_ray.simulation.metrics import FINISHED, IdleCause
from gllm_ray.simulation.report import ReplicaReport, Report, StageReport, Summary

_MAX_CHANGES = 12  # in a line of the table


def format_report(report: Report) -> str:
    """The report as aligned tables, without a line break at the end."""
    sections = [_totals(report), _distributions(report), _stages(report)]
    return "\n\n".join(_aligned(rows) for rows in sections)


def _totals(report: Report) -> list[list[str]]:
    tokens = f"{report.input_tokens_per_s:.1f} input and {report.output_tokens_per_s:.1f} output"
    rows = [
        ["simulated time", f"{report.wall_s:.3f} s"],
        ["requests", _ended(report)],
        ["throughput", f"{report.requests_per_s:.3f} requests/s, {tokens} tokens/s"],
    ]
    if (slo := report.slo) is not None:
        limits = {"TTFT": slo.ttft_s, "TPOT": slo.tpot_s, "E2E": slo.e2e_s}
        words = [f"{name} <= {limit:g} s" for name, limit in limits.items() if limit is not None]
        goodput = f"{report.goodput_per_s:.3f} requests/s, {report.goodput_ratio:.1%}"
        rows.append(["goodput", f"{goodput} of all ({', '.join(words) or 'no limit'})"])
    mean, peak = report.kv_utilization_mean, report.kv_utilization_peak
    rows.append(["KV cache in use", f"{mean:.1%} on average, {peak:.1%} at most"])
    if report.prefix_hit_ratio:
        rows.append(["prefix caches", f"{report.prefix_hit_ratio:.1%} of the prompt tokens found"])
    rows.append(["preemptions", str(report.num_preemptions)])
    rows.append(["micro-batches", str(report.num_micro_batches)])
    if report.ideal_ratio is not None:
        ideal = "stages never idle, micro-batches of the best size"
        rows.append(["of the ideal", f"{report.ideal_ratio:.1%} ({ideal})"])
    if len(report.replicas.changes) > 1:
        rows.append(["replicas", _replicas(report.replicas)])
    return rows


def _replicas(replicas: ReplicaReport) -> str:
    words = f"{replicas.mean:.1f} on average, {replicas.min} to {replicas.max}"
    if len(replicas.changes) > _MAX_CHANGES:
        return f"{words}, {len(replicas.changes) - 1} changes"
    counts = ", ".join(f"{count} from {time_s:.0f} s" for time_s, count in replicas.changes)
    return f"{words}: {counts}"


def _ended(report: Report) -> str:
    """Requests by how they ended, those first that got all of their output."""
    counts = {reason: count for reason, count in report.num_ended.items() if count}
    finished = {reason: counts.pop(reason) for reason in FINISHED if reason in counts}
    words = [f"{count} {reason}" for reason, count in counts.items()]
    if finished:
        hows = [f"{count} {reason}" for reason, count in finished.items()]
        how = ", ".join(hows if len(finished) > 1 else finished)
        words.insert(0, f"{sum(finished.values())} finished ({how})")
    return ", ".join(words) or "none"


def _distributions(report: Report) -> list[list[str]]:
    rows = [["", "mean", "p50", "p90", "p99"]]
    for name, latency in (
        ("TTFT (ms)", report.ttft_s),
        ("TPOT (ms)", report.tpot_s),
        ("ITL (ms)", report.itl_s),
        ("E2E (ms)", report.e2e_s),
        ("queue time (ms)", report.queue_s),
    ):
        rows.append([name, *(f"{1000 * value:.1f}" for value in _values(latency))])
    for name, size in (
        ("tokens of a micro-batch", report.batch_tokens),
        ("decodes of a micro-batch", report.batch_decodes),
    ):
        rows.append([name, *(f"{value:.1f}" for value in _values(size))])
    return rows


def _values(summary: Summary) -> tuple[float, ...]:
    return summary.mean, summary.p50, summary.p90, summary.p99


def _stages(report: Report) -> list[list[str]]:
    causes = list(IdleCause)
    if not report.pipeline.bubble_ratio[IdleCause.REPAIR]:
        causes.remove(IdleCause.REPAIR)
    rows = [["", "busy", *(f"idle: {cause.replace('_', ' ')}" for cause in causes)]]
    rows += [_shares(f"stage {index}", stage, causes) for index, stage in enumerate(report.stages)]
    return [*rows, _shares("all stages", report.pipeline, causes)]


def _shares(name: str, stage: StageReport, causes: Iterable[IdleCause]) -> list[str]:
    shares = [stage.utilization, *(stage.bubble_ratio[cause] for cause in causes)]
    return [name, *(f"{share:.1%}" for share in shares)]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_text = len(widths) == 2
    lines = []
    for name, *cells in rows:
        padded = [
            cell if is_text else cell.rjust(width)
            for cell, width in zip(cells, widths[1:], strict=True)
        ]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)
